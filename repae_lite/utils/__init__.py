"""Knows no paper: files that are whole or not there, locks, safe pickles, state dicts, pixels, processes."""

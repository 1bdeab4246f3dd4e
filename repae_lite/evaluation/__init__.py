"""Judging: metrics, statistics over seeds, the small evaluation network."""

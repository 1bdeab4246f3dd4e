"""Judging results: metrics, statistics over seeds, and the small evaluation network."""

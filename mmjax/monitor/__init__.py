"""Logs and displays of a run: metrics, goodput, progress and tables."""

"""Analyses of a traced program: what it holds and what it costs."""

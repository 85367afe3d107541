"""Optimization algorithms that the optimizer of a config may name."""

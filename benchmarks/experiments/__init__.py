"""Experiments: what a recipe reaches over several seeds, and what its parts give."""

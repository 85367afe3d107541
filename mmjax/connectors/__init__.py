"""Connectors that a model may name in its config."""

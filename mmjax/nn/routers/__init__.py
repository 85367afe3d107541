"""Routers that a block with experts may name in its config."""

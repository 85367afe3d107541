"""Layers and operations that blocks and objectives are made of."""

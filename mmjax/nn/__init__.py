"""Layers and operations that blocks and objectives are made of.

The axis letters in names (`x_BSD`) and docstrings (`[B, S, D]`) are those of `mmjax.core.axes`.
"""

"""Modalities: raw examples to arrays, and arrays to tokens."""

"""Decoding, composing and diffusion of sequences."""

"""Spans of sequences in the form for viewing: pictures in place of patches and colours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax.generation.spans import Span
from mmjax.modalities.image import as_pixels, patch_side, unpatchify
from mmjax.model import Model


def span_values(model: Model, span: Span) -> jax.Array:
    """Return what a given span holds, in the form in which `compose` gives what it makes."""
    stem: Any = model.stems[span.name]
    if "ids" in span.arrays:
        return viewed(model, span, span.arrays["ids"])
    return viewed(model, span, stem.values(span.arrays, jnp.float32))


def viewed(model: Model, span: Span, x: jax.Array) -> jax.Array:
    """Return the pictures of a span's ids or values, uint8 `[B, H, W, 3]`; `x` where it is no picture."""
    stem: Any = model.stems[span.name]
    if hasattr(stem, "pictures"):
        return jnp.asarray(stem.pictures(x))
    pixels = span.arrays.get("pixels")
    if pixels is None or pixels.ndim != 4:
        return x
    height, width = pixels.shape[1:3]
    return as_pixels((unpatchify(x, height, width, patch_side(x)) + 1) / 2)

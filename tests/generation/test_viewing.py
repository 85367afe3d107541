"""Spans in the form for viewing: pictures in place of patches and colours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.generation.spans import Span
from mmjax.generation.viewing import span_values, viewed
from mmjax.modalities.image import patchify

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2, 4, 6, 3), np.uint8)


def model(**stems: Any) -> Any:
    return SimpleNamespace(stems=stems)


def values(arrays: Any, dtype: Any) -> Any:
    """Return patches of two by two, in [-1, 1]."""
    return jnp.asarray(patchify(np.asarray(arrays["pixels"], np.float32) / 127.5 - 1, 2), dtype)


def test_a_given_picture_comes_back_pixel_by_pixel() -> None:
    span = Span("image", {"pixels": jnp.asarray(PIXELS)})
    shown = span_values(model(image=SimpleNamespace(values=values)), span)
    assert shown.dtype == jnp.uint8
    np.testing.assert_array_equal(shown, PIXELS)


def test_values_outside_of_the_range_are_cut() -> None:
    span = Span("image", {"pixels": jnp.asarray(PIXELS)}, generated=True)
    patches = jnp.full((2, 6, 12), 1.5).at[0].set(-3.0)
    shown = viewed(model(image=SimpleNamespace()), span, patches)
    assert shown.shape == (2, 4, 6, 3)
    assert np.unique(shown[0]).tolist() == [0] and np.unique(shown[1]).tolist() == [255]


def test_ids_of_a_text_stay_ids() -> None:
    ids = jnp.asarray([[5, 3, 0]])
    shown = span_values(model(text=SimpleNamespace()), Span("text", {"ids": ids}))
    assert shown is ids


def test_a_stem_with_pictures_draws_its_ids() -> None:
    stem = SimpleNamespace(pictures=lambda ids: np.asarray(ids) * 2)
    shown = span_values(model(colours=stem), Span("colours", {"ids": jnp.asarray([[1, 4]])}))
    np.testing.assert_array_equal(shown, [[2, 8]])


def test_what_is_no_picture_stays_its_values() -> None:
    """A sound has no pixels; a clip has five axes."""
    sound = jnp.asarray(RNG.normal(size=(2, 3, 4)))
    stem = SimpleNamespace(values=lambda arrays, dtype: arrays["samples"])
    assert span_values(model(sound=stem), Span("sound", {"samples": sound})) is sound
    clip = Span("video", {"pixels": jnp.zeros((2, 3, 4, 4, 3), jnp.uint8)})
    assert viewed(model(video=SimpleNamespace()), clip, sound) is sound

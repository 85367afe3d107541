"""Pictures as colours: digits by hand, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as Pil

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import ImageInput


def given(size: int = 2, **more: int) -> Input:
    return Input(
        "colours", Colours(**{"levels": 4, "max_positions": 4, **more}), ImageInput(size=size)
    )


PICTURE = np.array([[[0, 0, 0], [255, 0, 0]], [[0, 64, 0], [100, 130, 200]]], np.uint8)


def test_ids_are_digits_of_red_green_and_blue() -> None:
    arrays = given().preprocess({"image": Pil.fromarray(PICTURE)}, None)
    np.testing.assert_array_equal(
        arrays["ids"], [0, 3 * 16, 1 * 4, (100 // 64) * 16 + (130 // 64) * 4 + 200 // 64]
    )
    assert arrays["valid"].all() and Colours(levels=4).vocabulary == 64


def test_a_picture_comes_back_within_half_a_level() -> None:
    inputs = given(4, levels=8)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    ids = inputs.preprocess({"image": Pil.fromarray(pixels)}, None)["ids"]
    back = np.asarray(inputs.modality.stem(8).pictures(jnp.asarray(ids)[None]))[0]
    assert np.abs(back.astype(int) - pixels).max() <= 16


def test_the_stem_looks_up_and_adds_places() -> None:
    declaration = Declaration(Colours(levels=2, max_positions=2).stem(3))
    p = jax.jit(declaration.initialise)(0)
    ids = jnp.array([[0, 7, 7, 1]])
    x = np.asarray(declaration.merge(p)({"ids": ids}).x_BSD)[0]
    table = np.asarray(p["embedding"])
    rest = x - table[np.asarray(ids)[0]]
    assert not np.allclose(x[1], x[2])  # the same colour elsewhere
    other = np.asarray(declaration.merge(p)({"ids": ids * 0}).x_BSD)[0] - table[0]
    np.testing.assert_allclose(rest, other, atol=1e-6)


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="size is 5; expected 1 to the 4"):
        given(5).arrays()
    with pytest.raises(UserError, match="levels is 1"):
        Colours(levels=1)

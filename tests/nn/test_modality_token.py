"""Modality tokens: what distinguishes two modalities whose stems are equal."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmjax.core.parameters import Declaration
from mmjax.modalities.image import Image
from mmjax.model import ModelConfig, declare_model
from mmjax.nn.trunk import GroupConfig

WIDTH, TOKENS = 4, 4
BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 5}
CONFIG = ModelConfig(WIDTH, (GroupConfig(1, (BLOCK,)),))
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8) for _ in range(2)]


def declared(modality_token: bool) -> Declaration:
    image = Image(patch=2, max_positions=2, modality_token=modality_token)
    return declare_model(CONFIG, {"left": image, "right": image}, [])


def parameters(declaration: Declaration) -> dict[str, np.ndarray]:
    """Return parameters of which both stems have the same, apart from modality tokens."""
    values = {n: RNG.normal(size=s.shape).astype(np.float32) for n, s in declaration.specs.items()}
    same = {n: values[n.replace("right", "left")] for n in values if "modality_token" not in n}
    return {**values, **same}


def tokens(declaration: Declaration, values: dict[str, Any], left: Any, right: Any) -> np.ndarray:
    """Return the trunk's tokens of two pictures, each in turn: float [2, B, S, D]."""
    model = declaration.merge(values)
    streams = [model.tokens(n, {"pixels": x}) for n, x in (("left", left), ("right", right))]
    x_BSD = np.asarray(model.encode(streams, None)[0].x_BSD)
    return np.stack([x_BSD[:, :TOKENS], x_BSD[:, TOKENS:]])


def test_without_it_equal_stems_make_modalities_indistinguishable() -> None:
    one, two = PICTURES
    for modality_token in (False, True):
        declaration = declared(modality_token)
        values = parameters(declaration)
        there, back = tokens(declaration, values, one, two), tokens(declaration, values, two, one)
        assert np.allclose(there, back[::-1], atol=1e-5) != modality_token
        assert np.abs(there - back).max() > 1e-2


def test_it_is_added_to_every_token_of_its_modality() -> None:
    declaration = declared(True)
    values = parameters(declaration)
    assert values["stems/left/modality_token"].shape == (WIDTH,)
    specs = declared(False).specs.keys()
    assert declaration.specs.keys() - specs == {
        f"stems/{n}/modality_token" for n in ("left", "right")
    }
    zero = {**values, "stems/left/modality_token": np.zeros(WIDTH, np.float32)}
    with_token, without = (
        np.asarray(declaration.merge(p).tokens("left", {"pixels": PICTURES[0]}).x_BSD)
        for p in (values, zero)
    )
    expected = np.broadcast_to(values["stems/left/modality_token"], with_token.shape)
    np.testing.assert_allclose(with_token - without, expected, rtol=1e-4, atol=1e-5)

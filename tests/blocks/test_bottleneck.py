"""Bottlenecks against a loop over modalities with blocks of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.blocks.bottleneck import Bottleneck
from mmjax.blocks.transformer import Transformer
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.stream import Stream

WIDTH, BLOCK = 6, {"num_heads": 2, "mlp_dim": 5}
LAYOUT = (("image", 3), ("sound", 2), ("fusion", 2))
VALID = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1]], bool)


pytestmark = pytest.mark.usefixtures("x64")


def built(fuse: bool) -> tuple[Declaration, dict[str, Any]]:
    declaration = Declaration(
        Bottleneck(**BLOCK, modalities=("image", "sound"), fuse=fuse).build(WIDTH)
    )
    rng = np.random.default_rng(0)
    return declaration, {
        n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()
    }


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 7, WIDTH)))


def run(fuse: bool, x: jax.Array, valid: np.ndarray = VALID) -> np.ndarray:
    declaration, p = built(fuse)
    stream = Stream(x, jnp.asarray(valid), layout=LAYOUT)
    call = jax.jit(lambda p, s: declaration.merge(p)(s, jax.random.key(0))[0].x_BSD)
    return np.asarray(call(p, stream))


def block(p: dict[str, Any], modality: str, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the modality's own block on some tokens of one row."""
    prefix = f"blocks/{modality}/"
    own = {n.removeprefix(prefix): a for n, a in p.items() if n.startswith(prefix)}
    layer = Declaration(Transformer(**BLOCK).build(WIDTH))
    stream = Stream(jnp.asarray(x[None]), jnp.asarray(valid[None]))
    return np.asarray(layer.merge(own)(stream, jax.random.key(0))[0].x_BSD[0])


def test_fusion_tokens_are_the_mean_of_what_the_modalities_made_of_them() -> None:
    x, (_, p) = np.asarray(tokens()), built(True)
    found = run(True, tokens())
    for row in range(3):
        made = []
        for modality, at in (("image", slice(0, 3)), ("sound", slice(3, 5))):
            sees = np.concatenate([x[row, at], x[row, 5:]])
            exists = np.concatenate([VALID[row, at], VALID[row, 5:]])
            out = block(p, modality, sees, exists)
            here = VALID[row, at]
            np.testing.assert_allclose(found[row, at][here], out[: len(here)][here], rtol=1e-9)
            if here.any():
                made.append(out[len(here) :])
        expected = np.mean(made, axis=0) if made else x[row, 5:]
        np.testing.assert_allclose(found[row, 5:], expected, rtol=1e-9)


def test_a_layer_that_does_not_fuse_keeps_modalities_apart_and_fusion_tokens_as_they_are() -> None:
    found, other = run(False, tokens()), run(False, tokens().at[:, 3:].multiply(-1))
    np.testing.assert_array_equal(found[:, :3], other[:, :3])
    np.testing.assert_array_equal(found[:, 5:], tokens()[:, 5:])
    np.testing.assert_array_equal(other[:, 5:], -tokens()[:, 5:])
    # The control: where it fuses, what follows the sounds changes the image, through the fusion tokens.
    assert not np.allclose(
        run(True, tokens())[0, :3], run(True, tokens().at[:, 5:].multiply(-1))[0, :3]
    )


def test_modalities_meet_only_in_the_fusion_tokens() -> None:
    """One layer: image tokens do not see sound tokens, fusion tokens see both."""
    declaration, p = built(True)

    def outputs(x_SD: jax.Array) -> jax.Array:
        return declaration.merge(p)(Stream(x_SD[None], layout=LAYOUT), jax.random.key(0))[0].x_BSD[
            0
        ]

    reached = np.abs(jax.jit(jax.jacrev(outputs))(tokens()[0])).sum((1, 3)) > 0
    image, sound, all_ = [1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1] * 7
    np.testing.assert_array_equal(reached, [image] * 3 + [sound] * 2 + [all_] * 2)


def test_a_modality_without_a_block() -> None:
    declaration, p = built(True)
    stream = Stream(tokens(), layout=(("image", 3), ("depth", 2), ("fusion", 2)))
    with pytest.raises(UserError, match="modality 'depth'; the layer has blocks of: image, sound"):
        declaration.merge(p)(stream, jax.random.key(0))
    with pytest.raises(UserError, match="modalities is empty"):
        Bottleneck(**BLOCK)

"""The MLP connector against NumPy."""

from __future__ import annotations

import math

import connecting
import numpy as np
import pytest

from mmjax.connectors.mlp import Mlp

pytestmark = pytest.mark.usefixtures("x64")

ACTIVATIONS = {
    "gelu": connecting.gelu,
    "gelu_exact": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize(
    ("activation", "depth", "hidden", "norm"),
    [("gelu", 2, 0, "none"), ("gelu_exact", 2, 7, "layer"), ("relu", 3, 4, "rms"), ("silu", 1, 4, "none")],
)  # fmt: skip
def test_against_numpy(activation: str, depth: int, hidden: int, norm: str) -> None:
    config = Mlp(activation=activation, depth=depth, hidden=hidden, norm=norm, eps=0.01)
    call, p = connecting.built(config, 3, 5)
    given = connecting.stream(("image", (4,)), width=3)
    x = np.asarray(given.x_BSD)
    if norm == "layer":
        x = connecting.layer_norm(p, "norm", x, 0.01)
    if norm == "rms":
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 0.01) * p["norm/scale"]
    for layer in range(depth):
        x = ACTIVATIONS[activation](x) if layer else x
        x = connecting.affine(p, f"maps/{layer}", x)
    assert p["maps/0/kernel"].shape[1] == (5 if depth == 1 else hidden or 5)
    np.testing.assert_allclose(call(p, given).x_BSD, x, rtol=1e-10, atol=1e-12)


def test_without_biases_nothing_comes_of_nothing() -> None:
    call, p = connecting.built(Mlp(bias=False, norm="layer"), 3, 5)
    given = connecting.stream(("image", (4,)), width=3)
    assert not any("bias" in name for name in p)
    nothing = given.replace(x_BSD=np.zeros_like(given.x_BSD))
    np.testing.assert_array_equal(call(p, nothing).x_BSD, 0)

"""The gated layer changes nothing at first, learns from its first step, and is Flamingo's after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.blocks.gated_cross_attention import GatedCrossAttention
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.masks import Causal
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk

WIDTH, LENGTH = 4, 5
THERE = np.array([[1, 1, 1], [0, 0, 0]], bool)
KEYS: dict[str, Any] = {"num_heads": 1, "mlp_dim": 3, "attention_bias": True, "norm": "rms"}

pytestmark = pytest.mark.usefixtures("x64")


def stream() -> Stream:
    rng = np.random.default_rng(1)
    x, context = rng.normal(size=(2, LENGTH, WIDTH)), rng.normal(size=(2, 3, WIDTH))
    seen = Stream(jnp.asarray(context), jnp.asarray(THERE))
    return Stream(jnp.asarray(x), mask=Causal(), context=seen)


def test_it_is_the_identity_at_first_and_its_gates_have_a_gradient() -> None:
    declaration = Declaration(GatedCrossAttention(**KEYS).build(WIDTH))
    p = declaration.initialise(0, jnp.float64)
    weights = np.random.default_rng(2).normal(size=(2, LENGTH, WIDTH))

    def loss(p: Any) -> tuple[Any, Any]:
        x_BSD = declaration.merge(p)(stream(), None)[0].x_BSD
        return (x_BSD * weights).sum(), x_BSD

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(p)
    np.testing.assert_array_equal(out, stream().x_BSD)
    reached = {name for name, g in gradient.items() if np.abs(g).max() > 0}
    assert reached == {"cross_gate", "mlp_gate"}
    assert not declaration.specs["cross_gate"].decay


def test_against_numpy() -> None:
    """The second row has no context: the gate of the cross-attention adds nothing there, not even a bias."""
    declaration = Declaration(GatedCrossAttention(**KEYS).build(WIDTH))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    out = jax.jit(lambda p, s: declaration.merge(p)(s, None)[0].x_BSD)(p, stream())

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * p[name]

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[f"cross/{name}"][:, 0] + p[f"cross/{name}_bias"]

    for b in range(2):
        x, seen = np.asarray(stream().x_BSD[b]), np.asarray(stream().context.x_BSD[b])
        if b == 0:
            q, k = project(rms(x, "cross_norm/scale"), "query"), project(seen, "key")
            weight = np.exp(q @ k.T / np.sqrt(WIDTH))
            read = weight / weight.sum(axis=1, keepdims=True) @ project(seen, "value")
            x = x + np.tanh(p["cross_gate"]) * (read @ p["cross/out"][0] + p["cross/out_bias"])
        up = rms(x, "mlp_norm/scale") @ p["mlp/up/kernel"]
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + np.tanh(p["mlp_gate"]) * (gelu @ p["mlp/down/kernel"])
        np.testing.assert_allclose(out[b], x, rtol=1e-10)


def test_token_by_token_as_at_once_between_the_layers_of_a_decoder() -> None:
    blocks = (
        {"name": "transformer", "num_heads": 2, "mlp_dim": 3},
        {"name": "gated_cross_attention", **KEYS, "context_norm": True},
    )
    declaration = Declaration(nnx.Dict({"trunk": Trunk([GroupConfig(2, blocks)], WIDTH)}))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    whole = jax.jit(lambda p, s: declaration.merge(p).trunk.layers(s, None)[0].x_BSD)(p, stream())
    decode = jax.jit(lambda p, s, cache, at: declaration.merge(p).trunk.decode(s, cache, at))
    cache = jax.jit(lambda p, s: declaration.merge(p).trunk.init_cache(s, LENGTH))(p, stream())
    for at in range(LENGTH):
        part = Stream(stream().x_BSD[:, at : at + 1], mask=Causal())
        step, cache = decode(p, part, cache, at)
        np.testing.assert_allclose(step.x_BSD[:, 0], whole[:, at], rtol=1e-10, atol=1e-13)


def test_without_a_context_it_is_an_error_that_names_the_layer() -> None:
    block = GatedCrossAttention(**KEYS).build(WIDTH)
    with pytest.raises(UserError, match="layer gated_cross_attention reads a second stream"):
        block(replace(stream(), context=None), None)

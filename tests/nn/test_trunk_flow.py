"""Check what reaches what through trunks of several layers, by every kernel: the gradient of each token by each."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.parameters import Declaration
from mmjax.nn import attention_kernels as attending
from mmjax.nn import kernels
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.objectives.fusion import MASKS

WIDTH = 8
LAYOUT = (("image", 3), ("sound", 2), ("fusion", 2))
IMAGE, SOUND, FUSION = slice(0, 3), slice(3, 5), slice(5, 7)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KERNELS = ("plain", "chunked", "splash")
BLOCK = {"num_heads": 2, "mlp_dim": 8}
APART, FUSED = (
    {"name": "bottleneck", "modalities": ["image", "sound"], "fuse": fuse, **BLOCK}
    for fuse in (False, True)
)
PLAIN = {"name": "transformer", **BLOCK}
# Mask, layers as (repeat, block), and of each layer the rule below.
SYSTEMS: dict[str, tuple[str, list[tuple[int, dict[str, Any]]], list[str]]] = {
    "zorro": ("zorro", [(2, PLAIN)], ["zorro", "zorro"]),
    "full": ("full", [(2, PLAIN)], ["full", "full"]),
    "mbt, before it fuses": ("full", [(1, APART)], ["apart"]),
    "mbt, one layer fuses": ("full", [(1, APART), (1, FUSED)], ["apart", "fused"]),
    "mbt, two layers fuse": ("full", [(1, APART), (2, FUSED)], ["apart", "fused", "fused"]),
}


@lru_cache
def compiled(system: str, kernel: str) -> Any:
    """Return, of tokens [S, D] and which exist [S]: the size of the gradient of each token by each, [S, S]."""
    mask, layers, _ = SYSTEMS[system]
    groups = [GroupConfig(n, ({**block, "attention_impl": kernel},)) for n, block in layers]
    declaration = Declaration(nnx.Dict(trunk=Trunk(groups, WIDTH)))
    rng = np.random.default_rng(0)
    p = {n: jnp.asarray(rng.normal(size=s.shape), "float32") for n, s in declaration.specs.items()}
    weights_D = jnp.asarray(rng.normal(size=WIDTH), "float32")

    def outputs(x_SD: jax.Array, valid_S: jax.Array) -> jax.Array:
        stream = Stream(x_SD[None], valid_S[None], layout=LAYOUT, mask=MASKS[mask])
        return declaration.merge(p).trunk(stream, jax.random.key(0))[0].x_BSD[0] @ weights_D

    def sizes(x_SD: jax.Array, valid_S: jax.Array) -> jax.Array:
        return jnp.abs(jax.jacrev(outputs)(x_SD, valid_S)).sum(axis=2)

    shapes = jnp.zeros((7, WIDTH)), jnp.zeros(7, bool)
    # Only the one that is asked for is there: another that stands in for it is an error.
    asked = {**attending.KERNELS, "splash": partial(kernels.splash, interpret=True)}[kernel]
    with (
        mock.patch.dict(attending.KERNELS, {kernel: asked}, clear=True),
        mock.patch.dict(kernels.REFUSALS, {"splash": lambda *_: ""}),
        mock.patch.object(attending, "CHUNK", 4),
    ):
        return jax.jit(sizes).lower(*shapes).compile(QUICK)


def reads(rule: str, valid: np.ndarray) -> np.ndarray:
    """Return which tokens one layer brings to each token, [S, S], by its paper's words; every token keeps itself."""
    found = np.zeros((7, 7), bool)
    for own in (IMAGE, SOUND):
        found[own, own] = True
        if rule in ("fused", "full"):
            found[own, FUSION] = True
        # A modality of which a row has nothing adds nothing to the fusion tokens.
        if rule != "apart" and valid[own].any():
            found[FUSION, own] = found[FUSION, FUSION] = True
    if rule == "full":
        found[:] = True
    if rule == "zorro":
        found[FUSION, FUSION] = True
    return (found & valid) | np.eye(7, dtype=bool)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_information_flows_where_it_may_and_nowhere_else(system: str, kernel: str) -> None:
    call = compiled(system, kernel)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.booleans(), min_size=5, max_size=5), st.integers(0, 2**16))
    def holds(exists: list[bool], seed: int) -> None:
        valid = np.array([*exists, True, True])
        x = np.random.default_rng(seed).normal(size=(7, WIDTH)).astype(np.float32)
        reached = np.asarray(call(jnp.asarray(x), jnp.asarray(valid))) > 0
        expected = np.eye(7, dtype=bool)
        for rule in SYSTEMS[system][2]:
            expected = reads(rule, valid) @ expected
        # What a token that is not there holds is nobody's: rows of those that are.
        np.testing.assert_array_equal(reached[valid], expected[valid])

    holds()

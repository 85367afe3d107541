"""Kernels of accelerators: their numerics, and what each refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import BATCH, HEADS, MASKS, attributes, loops, pairs_of, projections

from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.nn import kernels
from mmjax.nn.attention_kernels import attend
from mmjax.nn.masks import Causal, Pairs, Same


@pytest.mark.parametrize("mask", ["full", "causal", "packed", "pictures", "zorro"])
def test_splash_against_loops_and_its_gradient(mask: str) -> None:
    """In interpret mode: the numerics of the kernel, with static masks, segments and padding."""
    # Static but for `packed`, whose items are segment ids; 150 is padded to 256.
    pairs = pairs_of(MASKS[mask], 150, valid=True)
    if mask == "packed":
        of = {**attributes(150), "item": jnp.asarray(attributes(150)["item"])}
        pairs = Pairs(pairs.mask, of, of, pairs.valid_BT)
    inputs = projections(150, 16, jnp.float32)
    exists = np.asarray(pairs.valid_BT)[..., None, None]
    weights = np.random.default_rng(9).normal(size=inputs[0].shape) * exists

    def run(function: Any) -> Any:
        def loss(x: Any) -> tuple[jax.Array, jax.Array]:
            out = function(*x, pairs)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(inputs)

    gradients, out = run(partial(kernels.splash, interpret=True))
    expected, _ = run(partial(attend, kernel="plain"))
    rows = np.broadcast_to(exists, out.shape)
    np.testing.assert_allclose(
        np.where(rows, out, 0), np.where(rows, loops(*inputs, pairs), 0), atol=2e-5
    )
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5)


def queries(dtype: Any = jnp.bfloat16, size: int = 64) -> Any:
    return jax.ShapeDtypeStruct((BATCH, 256, HEADS, size), dtype)


@pytest.mark.parametrize("mask", MASKS)
def test_splash_takes_every_static_mask(mask: str) -> None:
    assert kernels.refuse_splash("tpu", queries(), pairs_of(MASKS[mask], 256)) == ""


def test_splash_takes_one_attribute_that_is_known_only_when_it_runs() -> None:
    """As segment ids, of which it has one a token; no segment id means that one side is free (`beside`)."""
    item, span = Same("item"), Same("span")
    of: Any = {"item": jnp.zeros((BATCH, 256)), "span": jnp.zeros((BATCH, 256))}

    def refused(mask: Any) -> str:
        return kernels.refuse_splash("tpu", queries(), Pairs(mask, of, of))

    assert refused(item) == ""
    assert refused(item & span) == "it takes one attribute that is known only when it runs"
    assert "it cannot express" in refused(Same("span", beside=0))


@pytest.mark.parametrize(
    ("platform", "dtype", "reason"),
    [
        ("cuda", jnp.bfloat16, "it runs on TPUs, and this is compiled for cuda"),
        ("tpu", jnp.float16, "it does not take float16"),
    ],
)
def test_splash_refuses(platform: str, dtype: Any, reason: str) -> None:
    assert kernels.refuse_splash(platform, queries(dtype), Pairs()) == reason


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "reason"),
    [
        ("gpu", jnp.bfloat16, 64, ""),
        ("cuda", jnp.float16, 128, ""),
        ("tpu", jnp.bfloat16, 64, "it runs on NVIDIA GPUs, and this is compiled for tpu"),
        ("cuda", jnp.float32, 64, "it does not take float32"),
        ("cuda", jnp.bfloat16, 60, "it does not take heads of 60"),
        ("cuda", jnp.bfloat16, 136, "it does not take heads of 136"),
    ],
)
def test_cudnn_takes_half_precision_and_heads_of_up_to_128(
    cudnn: None, platform: str, dtype: Any, size: int, reason: str
) -> None:
    assert kernels.refuse_cudnn(platform, queries(dtype, size), Pairs()) == reason


def test_cudnn_takes_the_causal_mask_of_positions_in_order_and_no_other_mask(cudnn: None) -> None:
    def refused(pairs: Pairs) -> str:
        return kernels.refuse_cudnn("cuda", queries(), pairs)

    assert refused(pairs_of(Causal(), 256)) == ""
    behind: Any = {"position": np.arange(256)[None, ::-1]}
    assert "it cannot express" in refused(Pairs(Causal(), behind, behind))
    assert "it cannot express" in refused(pairs_of(MASKS["zorro"], 256))
    dynamic = refused(pairs_of(Causal(), 256, dynamic=True))
    assert dynamic == "it cannot express what is known only when it runs"


def test_cudnn_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_cudnn", lambda: False)
    assert "has no cuDNN" in kernels.refuse_cudnn("cuda", queries(), Pairs())


@pytest.mark.parametrize(("name", "platform"), [("splash", "tpu"), ("cudnn", "cuda")])
def test_a_sharded_sequence_is_refused(cudnn: None, name: str, platform: str) -> None:
    mesh = make_mesh(MeshConfig(data=1, sequence=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        reason = kernels.REFUSALS[name](platform, queries(), Pairs())
    assert reason == "the mesh shards the sequence"

"""Every kernel against a plain statement of attention, under every kind of mask."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import BATCH, HEADS, MASKS, attributes, loops, pairs_of, projections

from mmjax.analysis.flops import model_flops
from mmjax.core.errors import UserError
from mmjax.nn import attention_kernels as module
from mmjax.nn import kernels
from mmjax.nn.attention_kernels import attend, choose
from mmjax.nn.masks import FULL, Causal, KeyIs, Pairs, Same, has_key


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_xla_against_loops(
    x64: None, small_chunks: None, kernel: str, mask: str, valid: bool
) -> None:
    pairs = pairs_of(MASKS[mask], 21, valid)  # chunks of 8 do not divide it
    q, k, v = projections(21, 4, jnp.float64)
    found = jax.jit(lambda *x: attend(*x, pairs, kernel))(q, k, v)
    np.testing.assert_allclose(found, loops(q, k, v, pairs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_of_the_chunked_form_is_that_of_the_plain_one(
    x64: None, small_chunks: None, mask: str
) -> None:
    pairs = pairs_of(MASKS[mask], 21, valid=True, dynamic=True)
    inputs = projections(21, 4, jnp.float64)
    weights = np.random.default_rng(9).normal(size=inputs[0].shape)

    def gradient(kernel: str) -> Any:
        return jax.jit(jax.grad(lambda x: (attend(*x, pairs, kernel) * weights).sum()))(inputs)

    for found, expected in zip(gradient("chunked"), gradient("plain"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kernel", ["plain", "chunked", "splash"])
@pytest.mark.parametrize("mask", ["causal", "packed", "pictures", "prefix", "zorro"])
def test_nothing_flows_where_the_mask_forbids_it(
    small_chunks: None, mask: str, kernel: str
) -> None:
    """The gradient of every output by every input token is zero just where the mask forbids it."""
    length = 18
    pairs = pairs_of(MASKS[mask], length)
    run = (
        partial(kernels.splash, interpret=True)
        if kernel == "splash"
        else partial(attend, kernel=kernel)
    )
    q, k, v = projections(length, 4, jnp.float32)

    def outputs(k: jax.Array, v: jax.Array) -> jax.Array:
        return run(q, k, v, pairs)[0].sum((1, 2))

    by_k, by_v = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(k, v)
    # One row: [S, T].
    reached = (np.abs(by_v[:, 0]).sum((2, 3)) > 0) & (np.abs(by_v[:, 1]).sum((1, 2, 3)) == 0)[
        :, None
    ]
    np.testing.assert_array_equal(reached, pairs.allowed()[0])
    assert (np.abs(by_k[:, 0]).sum((2, 3)) > 0)[~pairs.allowed()[0]].sum() == 0


def keyless(case: str, length: int) -> Pairs:
    """Return pairs of which some queries have no key: of the second item, or of the whole second row."""
    mask = Same("item") & KeyIs("prefix", 1)  # the prefix is in the first item
    if case == "absent row":
        exists = jnp.asarray(np.repeat([[True], [False]], length, 1))
        return Pairs(Causal(), *[pairs_of(Causal(), length).queries] * 2, exists)
    pairs = pairs_of(mask, length, dynamic=case == "dynamic mask")
    if case != "segment ids":
        return pairs
    of = {**attributes(length), "item": jnp.asarray(attributes(length)["item"])}
    return Pairs(mask, of, of)


CASES = ["static mask", "dynamic mask", "segment ids", "absent row"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["plain", "chunked", "splash"])
def test_a_query_without_any_key_gets_zeros_and_passes_no_gradient(
    small_chunks: None, kernel: str, case: str
) -> None:
    length = 18
    pairs = keyless(case, length)
    if kernel == "splash" and case == "dynamic mask":
        q: Any = jax.ShapeDtypeStruct((BATCH, length, HEADS, 4), jnp.float32)
        assert "cannot express" in kernels.refuse_splash("tpu", q, pairs)
        return
    run = (
        partial(kernels.splash, interpret=True)
        if kernel == "splash"
        else partial(attend, kernel=kernel)
    )
    inputs = projections(length, 4, jnp.float32)
    expected = loops(*inputs, pairs)
    rows, at = (1, slice(None)) if case == "absent row" else (slice(None), slice(9, None))
    alone = np.zeros((BATCH, length), bool)
    alone[rows, at] = True
    assert (expected[alone] == 0).all() and (np.abs(expected[~alone]).max((1, 2)) > 0).all()

    def loss(x: Any, weight_BS: Any) -> tuple[jax.Array, jax.Array]:
        out = run(*x, pairs)
        return (out * jnp.cos(jnp.arange(4)) * weight_BS[..., None, None]).sum(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    of_alone, out = gradient(inputs, jnp.asarray(alone, jnp.float32))
    np.testing.assert_array_equal(out[alone], 0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert all((g == 0).all() for g in of_alone)
    of_all, _ = gradient(inputs, jnp.ones((BATCH, length)))
    of_others, _ = gradient(inputs, jnp.asarray(~alone, jnp.float32))
    for total, others in zip(of_all, of_others, strict=True):
        np.testing.assert_array_equal(total, others)
        assert np.isfinite(total).all() and np.abs(total).max() > 0


def test_cudnn_takes_no_mask_that_leaves_a_query_without_a_key() -> None:
    q: Any = jax.ShapeDtypeStruct((BATCH, 18, HEADS, 64), jnp.bfloat16)
    assert all(kernels.refuse_cudnn("cuda", q, keyless(case, 18)) for case in CASES)
    taken = [m for m in MASKS.values() if not kernels.refuse_cudnn("cuda", q, pairs_of(m, 18))]
    assert taken == [FULL, Causal()]
    assert all(has_key(pairs_of(mask, 18).allowed()) is None for mask in taken)


def test_memory_of_the_chunked_form_grows_with_the_length_and_of_the_plain_one_with_its_square() -> (
    None
):
    def bytes_at(kernel: str, length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        gradient = jax.grad(lambda q, k, v: attend(q, k, v, None, kernel).sum(), argnums=(0, 1, 2))
        return int(jax.jit(gradient).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes)

    assert bytes_at("chunked", 4096) < 2.5 * bytes_at("chunked", 2048)
    assert bytes_at("plain", 4096) > 4 * 4096**2  # the control: logits of all pairs, in float32
    assert bytes_at("chunked", 4096) < 4 * 4096**2 / 2


# --- which kernel ------------------------------------------------------------------------------


def chosen(
    kernel: str, platform: str, pairs: Pairs, length: int = 2048, dtype: Any = jnp.bfloat16
) -> str:
    q: Any = jax.ShapeDtypeStruct((BATCH, length, HEADS, 64), dtype)
    return choose(kernel, platform, q, q, pairs)


@pytest.fixture(autouse=True)
def _cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)


def test_without_cudnn_its_kernel_gives_way(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_cudnn", lambda: False)
    assert chosen("auto", "cuda", Pairs()) == "chunked"
    assert "has no cuDNN" in said.records[0].getMessage()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "_logged", set())
    caplog.set_level(logging.WARNING)
    return caplog


def test_each_platform_has_its_kernel_for_long_streams_and_the_plain_form_for_short_ones(
    said: Any,
) -> None:
    pairs = Pairs()
    found = {p: chosen("auto", p, pairs) for p in ("tpu", "cuda", "gpu", "cpu")}
    assert found == {"tpu": "splash", "cuda": "cudnn", "gpu": "cudnn", "cpu": "chunked"}
    assert {chosen("auto", p, pairs, 256) for p in ("tpu", "cuda", "cpu")} == {"plain"}
    assert not said.records


def test_what_counts_operations_sees_those_of_xla_whatever_the_platform(said: Any) -> None:
    q, k, v = projections(1100, 128, jnp.float32)
    assert choose("auto", "tpu", q, k, Pairs()) == "splash"
    with module.xla_alone():
        assert choose("auto", "tpu", q, k, Pairs()) == choose("splash", "tpu", q, k, Pairs())
        assert choose("splash", "tpu", q, k, Pairs()) == "chunked" and not said.text
    pairs = 4 * BATCH * HEADS * 1100**2 * 128
    found = model_flops(lambda q, k, v: attend(q, k, v, kernel="splash"), q, k, v)
    assert found == pairs and not said.text


def test_a_mask_that_a_kernel_cannot_express_falls_back_and_is_said_once(said: Any) -> None:
    dynamic = pairs_of(MASKS["pictures"], 2048, dynamic=True)
    assert chosen("auto", "tpu", dynamic) == chosen("auto", "tpu", dynamic) == "chunked"
    assert chosen("auto", "cuda", dynamic) == "chunked"
    assert len(said.records) == 2
    assert "'splash' gives way to 'chunked': it cannot express" in said.records[0].getMessage()
    assert chosen("auto", "tpu", pairs_of(MASKS["pictures"], 2048)) == "splash"
    assert chosen("auto", "cuda", pairs_of(MASKS["causal"], 2048)) == "cudnn"
    assert len(said.records) == 2


def test_a_kernel_of_another_platform_or_dtype_falls_back(said: Any) -> None:
    assert chosen("splash", "cpu", Pairs()) == "chunked"
    assert chosen("splash", "tpu", Pairs(), dtype=jnp.float64) == "chunked"
    assert chosen("cudnn", "cuda", Pairs(), dtype=jnp.float32, length=64) == "plain"
    assert len(said.records) == 3


def test_a_causal_mask_over_other_positions_is_not_cudnns(said: Any) -> None:
    of: Any = {"position": np.arange(2048)[None, ::-1]}
    assert chosen("cudnn", "cuda", Pairs(Causal(), of, of)) == "chunked"
    assert "cannot express" in said.records[0].getMessage()


def test_what_runs_where_it_was_asked_for_a_tpus_kernel_is_never_wrong(x64: None) -> None:
    pairs = pairs_of(MASKS["pictures"], 21, valid=True)
    q, k, v = projections(21, 4, jnp.float64)
    found = attend(q, k, v, pairs, "splash")
    np.testing.assert_allclose(found, loops(q, k, v, pairs), rtol=1e-11)


def test_a_mask_over_an_attribute_that_is_not_there() -> None:
    q, k, v = projections(4, 4, jnp.float32)
    with pytest.raises(UserError, match="reads attribute 'item'"):
        attend(q, k, v, Pairs(Same("item"), {}, {}))


def test_of_the_weights_only_those_that_meet_the_values_are_kept() -> None:
    """In bfloat16, not in float32 beside it."""
    length, size = 8, 4
    arrays = [jnp.ones((BATCH, length, HEADS, size), jnp.bfloat16) for _ in range(3)]
    pairs = pairs_of(FULL, length)
    back = jax.vjp(lambda q, k, v: attend(q, k, v, pairs, "plain"), *arrays)[1]
    kept = [x for x in jax.tree.leaves(back) if getattr(x, "shape", ())[2:] == (length, length)]
    assert [x.dtype for x in kept] == [jnp.bfloat16]

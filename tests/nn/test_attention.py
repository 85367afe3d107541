"""Attention against loops over examples, heads and queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.attention import Attention
from mmjax.nn.masks import Pairs

WIDTH, HEADS = 6, 2
VALID = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]], bool)


def built(qk_norm: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the layer as a function of tokens and mask, and its (random) parameters."""
    declaration = Declaration(Attention(WIDTH, HEADS, qk_norm))
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, x, valid: declaration.merge(p)(x, Pairs(valid_BT=valid)))
    return lambda x, valid=None: call(p, x, valid), p


def tokens(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, 5, WIDTH))


def normalised(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale


def attend(p: dict[str, np.ndarray], x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Attend by one query at a time, over the keys that exist."""
    out = np.zeros_like(x)
    for b, s, h in np.ndindex(*x.shape[:2], HEADS):
        q = x[b, s] @ p["query"][:, h]
        keys = [x[b, t] @ p["key"][:, h] for t in np.flatnonzero(valid[b])]
        if "query_norm/scale" in p:
            q = normalised(q, p["query_norm/scale"])
            keys = [normalised(k, p["key_norm/scale"]) for k in keys]
        weight = np.exp([q @ k / np.sqrt(WIDTH / HEADS) for k in keys])
        weight /= weight.sum()
        read = sum(
            w * (x[b, t] @ p["value"][:, h])
            for w, t in zip(weight, np.flatnonzero(valid[b]), strict=True)
        )
        out[b, s] += read @ p["out"][h]
    return out


@pytest.mark.parametrize("qk_norm", [False, True])
def test_against_loops(x64: None, qk_norm: bool) -> None:
    layer, p = built(qk_norm)
    expected = attend(p, tokens(), np.ones_like(VALID))
    # To float64's precision: nothing inside may be narrower than the input.
    np.testing.assert_allclose(layer(tokens()), expected, rtol=1e-11)
    np.testing.assert_allclose(layer(tokens(), np.ones_like(VALID)), expected, rtol=1e-11)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_only_valid_tokens_are_read(x64: None, qk_norm: bool) -> None:
    layer, p = built(qk_norm)
    expected = attend(p, tokens(), VALID)
    np.testing.assert_allclose(layer(tokens(), VALID), expected, rtol=1e-11)


def test_padding_does_not_change_valid_tokens_by_a_bit() -> None:
    layer, _ = built()
    other = np.where(VALID[..., None], tokens(), 1e3)
    before, after = (np.asarray(layer(x, VALID)) for x in (tokens(), other))
    np.testing.assert_array_equal(before[VALID], after[VALID])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_row_without_valid_tokens_is_finite_and_so_is_its_gradient(dtype: Any) -> None:
    layer, _ = built(qk_norm=True)
    valid = np.array([[False] * 5, [True] * 5])
    x = jnp.asarray(tokens(2), dtype)
    out, gradient = jax.value_and_grad(lambda x: jnp.square(layer(x, valid)).sum())(x)
    assert np.isfinite(out) and np.isfinite(gradient).all()
    # The rows stay apart: the valid one is what it is among others.
    same = layer(x, np.ones_like(valid))
    np.testing.assert_array_equal(layer(x, valid)[1], same[1])


def test_bfloat16_keeps_its_dtype_and_its_softmax_is_wider() -> None:
    declaration = Declaration(Attention(8, 1))
    eye = np.eye(8, dtype=np.float32)
    p = {"query": eye[:, None], "key": eye[:, None], "value": eye[:, None], "out": eye[None]}
    x = np.zeros((1, 2, 8), np.float32)
    # Logits 16 * 16 and 16 * 16.125 over sqrt(8): 0.7 apart, where bfloat16 counts in halves.
    x[0, :, 0], x[0, 1, 1] = (16.0, 16.125), 1.0
    out = jax.jit(lambda p, x: declaration.merge(p, x.dtype)(x, Pairs()))(p, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    weight = 1 / (1 + np.exp(-16 * 0.125 / np.sqrt(8)))
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, 0, 1], weight, rtol=2**-8)


def test_qk_norm_adds_one_scale_for_queries_and_one_for_keys() -> None:
    plain, normed = (Declaration(Attention(WIDTH, HEADS, q)).specs for q in (False, True))
    assert set(plain) == {"query", "key", "value", "out"}
    assert set(normed) - set(plain) == {"query_norm/scale", "key_norm/scale"}
    assert normed["query_norm/scale"].shape == (WIDTH // HEADS,)


def test_kernels_begin_with_the_fan_in_of_the_matrix_they_are() -> None:
    width, heads = 64, 4
    start = jax.jit(Declaration(Attention(width, heads)).initialise)(0)
    for name in ("query", "key", "value", "out"):
        # 4096 draws each; reading the wrong axes as inputs gives 2 to 4 times as much.
        np.testing.assert_allclose(np.std(start[name]), width**-0.5, rtol=0.05, err_msg=name)


def test_a_width_that_the_heads_do_not_divide() -> None:
    with pytest.raises(UserError, match="width 6 does not divide over 4 heads"):
        Attention(6, 4)
    with pytest.raises(UserError, match="0 heads"):
        Attention(6, 0)


def test_an_unknown_kernel() -> None:
    with pytest.raises(UserError, match="Unknown attention kernel 'chunkd'.*'chunked'"):
        Attention(6, 2, kernel="chunkd")

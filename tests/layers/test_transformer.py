"""The pre-norm block against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.layers.stream import Stream
from mmjax.layers.transformer import Transformer
from mmjax.parameters import Declaration

WIDTH, HEADS, HIDDEN = 6, 2, 5
VALID = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def built(**settings: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The block as a function of a stream, and its (random) parameters."""
    declaration = Declaration(Transformer(WIDTH, HEADS, HIDDEN, **settings))
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, stream: declaration.merge(p)(stream, jax.random.key(0)))
    return lambda x, **rest: call(p, Stream(jnp.asarray(x), **rest)), p


def norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * scale + bias


def attention(p: dict[str, np.ndarray], x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    names = ("query", "key", "value")
    q, k, v = (np.einsum("bsd,dhk->bhsk", x, p[f"attention/{n}"]) for n in names)
    if "attention/query_norm/scale" in p:
        q, k = (norm(a, p[f"attention/{n}_norm/scale"]) for a, n in ((q, "query"), (k, "key")))
    score = np.einsum("bhsk,bhtk->bhst", q, k) / np.sqrt(WIDTH / HEADS)
    weight = np.exp(score) * valid[:, None, None, :]
    weight /= weight.sum(axis=-1, keepdims=True)
    return np.einsum("bhst,bhtk,hkd->bsd", weight, v, p["attention/out"])


def block(p: dict[str, np.ndarray], x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """x += attention(norm(x)); x += W2 gelu(W1 norm(x))."""

    def bias(name: str) -> Any:
        return p.get(f"{name}/bias", 0.0)

    normed = norm(x, p["attention_norm/scale"], bias("attention_norm"))
    x = x + attention(p, normed, valid)
    normed = norm(x, p["mlp_norm/scale"], bias("mlp_norm"))
    up = normed @ p["mlp/up/kernel"] + bias("mlp/up")
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return x + gelu @ p["mlp/down/kernel"] + bias("mlp/down")


def tokens() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4, WIDTH))


@pytest.mark.parametrize("settings", [{}, {"bias": True, "qk_norm": True}])
def test_against_numpy(settings: dict[str, bool]) -> None:
    layer, p = built(**settings)
    stream, _ = layer(tokens())
    expected = block(p, tokens(), np.ones_like(VALID))
    np.testing.assert_allclose(stream.x_BSD, expected, rtol=1e-10)


def test_padding_is_not_read_by_a_bit() -> None:
    layer, p = built()
    junk = np.where(VALID[..., None], tokens(), -50.0)
    streams = [layer(x, valid_BS=jnp.asarray(VALID))[0] for x in (tokens(), junk)]
    one, two = (np.asarray(s.x_BSD)[VALID] for s in streams)
    np.testing.assert_allclose(one, block(p, tokens(), VALID)[VALID], rtol=1e-10)
    np.testing.assert_array_equal(one, two)


def test_the_rest_of_the_stream_passes_and_the_aux_is_zero() -> None:
    layer, _ = built()
    place = {"token": jnp.arange(4.0)[None]}
    stream, aux = layer(
        tokens(), valid_BS=jnp.asarray(VALID), coordinates=place, layout=(("text", 4),)
    )
    np.testing.assert_array_equal(stream.valid_BS, VALID)
    np.testing.assert_array_equal(stream.coordinates["token"], place["token"])
    assert stream.layout == (("text", 4),)
    assert aux.loss == 0 and aux.loss.dtype == jnp.float32
    assert aux.statistics == {} and aux.buffers == {}


def test_biases_only_where_asked() -> None:
    without, with_bias = (
        Declaration(Transformer(WIDTH, HEADS, HIDDEN, b)).specs for b in (False, True)
    )
    assert not [n for n in without if n.endswith("bias")]
    assert set(with_bias) - set(without) == {
        f"{n}/bias" for n in ("attention_norm", "mlp_norm", "mlp/up", "mlp/down")
    }

"""The pre-norm block against NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest

from mmjax.blocks.transformer import Transformer
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.stream import Stream

WIDTH, HEADS, HIDDEN = 6, 2, 5
VALID = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)


pytestmark = pytest.mark.usefixtures("x64")


def built(**settings: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the block as a function of a stream, and its (random) parameters."""
    declaration = Declaration(
        layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **settings)
    )
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, stream: declaration.merge(p)(stream, jax.random.key(0)))
    return lambda x, **rest: call(p, Stream(jnp.asarray(x), **rest)), p


def norm(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float = 0.0, eps: float = 1e-6
) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * scale + bias


def projected(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Return `x W + b` of each head, `[B, H, S, K]`."""
    y = np.einsum("bsd,dhk->bshk", x, p[f"attention/{name}"])
    bias = p.get(f"attention/{name}_bias", np.zeros(WIDTH))
    return (y + bias.reshape(HEADS, -1)).swapaxes(1, 2)


def attention(
    p: dict[str, np.ndarray], x: np.ndarray, valid: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    q, k, v = (projected(p, name, x) for name in ("query", "key", "value"))
    if "attention/query_norm/scale" in p:
        q, k = (
            norm(a, p[f"{n}/scale"], p.get(f"{n}/bias", 0.0), eps)
            for a, n in ((q, "attention/query_norm"), (k, "attention/key_norm"))
        )
    score = np.einsum("bhsk,bhtk->bhst", q, k) / np.sqrt(WIDTH / HEADS)
    weight = np.exp(score) * valid[:, None, None, :]
    weight /= weight.sum(axis=-1, keepdims=True)
    read = np.einsum("bhst,bhtk,hkd->bsd", weight, v, p["attention/out"])
    return read + p.get("attention/out_bias", 0.0)


def block(
    p: dict[str, np.ndarray], x: np.ndarray, valid: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    """Apply x += attention(norm(x)); x += W2 gelu(W1 norm(x))."""

    def bias(name: str) -> Any:
        return p.get(f"{name}/bias", 0.0)

    normed = norm(x, p["attention_norm/scale"], bias("attention_norm"), eps)
    x = x + attention(p, normed, valid, eps)
    normed = norm(x, p["mlp_norm/scale"], bias("mlp_norm"), eps)
    up = normed @ p["mlp/up/kernel"] + bias("mlp/up")
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return x + gelu @ p["mlp/down/kernel"] + bias("mlp/down")


def tokens() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4, WIDTH))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True, "qk_norm": True},
        {"bias": True, "attention_bias": True, "qk_norm": "layer", "eps": 0.01},
    ],
)
def test_against_numpy(settings: dict[str, Any]) -> None:
    layer, p = built(**settings)
    stream, _ = layer(tokens())
    expected = block(p, tokens(), np.ones_like(VALID), settings.get("eps", 1e-6))
    np.testing.assert_allclose(stream.x_BSD, expected, rtol=1e-10)


def test_a_vits_block_has_all_its_parameters() -> None:
    """A layer of ViT-B/16 has 7,087,872 (Dosovitskiy et al. 2021; 12 of them and the last norm are 85,056,000)."""
    specs = Declaration(Transformer(12, 3072, bias=True, attention_bias=True).build(768)).specs
    assert sum(math.prod(s.shape) for s in specs.values()) == 7_087_872
    vectors = [n for n, s in specs.items() if n.startswith("attention/") and len(s.shape) == 1]
    assert sorted(vectors) == [f"attention/{n}_bias" for n in ("key", "out", "query", "value")]
    assert not any(specs[name].decay for name in vectors)


@pytest.mark.parametrize(
    "kind, parts", [(True, {"scale"}), ("rms", {"scale"}), ("layer", {"scale", "bias"})]
)
def test_queries_and_keys_have_the_norm_that_is_named(kind: bool | str, parts: set[str]) -> None:
    """Chameleon's is a layer norm with bias, in a block whose other norms are root mean squares."""
    specs = Declaration(Transformer(HEADS, HIDDEN, qk_norm=kind, norm="rms").build(WIDTH)).specs
    held = {n for n in specs if "query_norm" in n or "key_norm" in n}
    assert held == {f"attention/{n}_norm/{part}" for n in ("query", "key") for part in parts}


def test_a_norm_of_queries_and_keys_that_is_not_there() -> None:
    with pytest.raises(UserError, match="qk_norm is 'layr'. Did you mean 'layer'"):
        Transformer(HEADS, HIDDEN, qk_norm="layr")
    with pytest.raises(UserError, match="eps is 0.*above 0"):
        Transformer(HEADS, HIDDEN, eps=0)


def test_a_bias_has_a_copy_where_its_projection_has_one() -> None:
    names = ["text", "image"]
    words: dict[str, Any] = {"per_modality": {"parts": ["query", "out"], "modalities": names}}
    layer, p = built(attention_bias=True, **words)
    biases = {n for n in p if "_bias" in n}
    copies = {f"attention/{part}_bias/{m}" for part in ("query", "out") for m in names}
    assert biases == copies | {"attention/key_bias", "attention/value_bias"}
    x = layer(tokens(), layout=(("text", 1), ("image", 3)))[0].x_BSD
    expected = np.zeros_like(tokens())
    for name, own in (("text", slice(0, 1)), ("image", slice(1, 4))):
        of_one = {n.removesuffix(f"/{name}"): v for n, v in p.items()}
        expected[:, own] = block(of_one, tokens(), np.ones_like(VALID))[:, own]
    np.testing.assert_allclose(x, expected, rtol=1e-10)


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
    assert aux.statistics == {} and aux.proposals == {}


def test_biases_only_where_asked() -> None:
    without, with_bias = (
        Declaration(Transformer(HEADS, HIDDEN, b).build(WIDTH)).specs for b in (False, True)
    )
    assert not [n for n in without if n.endswith("bias")]
    assert set(with_bias) - set(without) == {
        f"{n}/bias" for n in ("attention_norm", "mlp_norm", "mlp/up", "mlp/down")
    }

"""Llama's and Chameleon's block against NumPy: root mean squares, gated MLPs, rotations, norms behind their parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from mmjax.blocks.transformer import PARTS
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.by_modality import PerModality
from mmjax.nn.dense import norm_of
from mmjax.nn.masks import Causal
from mmjax.nn.positions import rotate
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk

WIDTH, HEADS, HIDDEN, ROWS, LENGTH = 8, 2, 5, 2, 5
LLAMA = {"norm": "rms", "mlp": "swiglu", "rotary": 100.0}


pytestmark = pytest.mark.usefixtures("x64")


def random(declaration: Declaration) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x_bshk: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Compute by multiplication of complex numbers."""
    half = x_bshk.shape[-1] // 2
    rates = 100.0 ** (-2 * np.arange(half) / x_bshk.shape[-1])
    whole = (x_bshk[..., :half] + 1j * x_bshk[..., half:]) * np.exp(
        1j * places[..., None, None] * rates
    )
    return np.concatenate([whole.real, whole.imag], axis=-1)


def attention(p: dict[str, np.ndarray], x: np.ndarray, places: np.ndarray) -> np.ndarray:
    q, k, v = (
        np.einsum("bsd,dhk->bshk", x, p[f"attention/{n}"]) for n in ("query", "key", "value")
    )
    if "attention/query_norm/scale" in p:
        q, k = norm(q, p["attention/query_norm/scale"]), norm(k, p["attention/key_norm/scale"])
    q, k = turned(q, places), turned(k, places)
    score = np.exp(np.einsum("bshk,bthk->bhst", q, k) / np.sqrt(WIDTH / HEADS))
    score *= (places[:, :, None] >= places[:, None, :])[:, None]
    score /= score.sum(-1, keepdims=True)
    return np.einsum("bhst,bthk,hkd->bsd", score, v, p["attention/out"])


def mlp(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate = x @ p["mlp/gate/kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["mlp/up/kernel"])) @ p["mlp/down/kernel"]


def run(p: dict[str, Any], x: Any, places: Any = None, **words: Any) -> np.ndarray:
    declaration = Declaration(
        layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **words)
    )
    attributes = {} if places is None else {"position": jnp.asarray(places)}
    layout = (("text", 2), ("image", 3))
    stream = Stream(jnp.asarray(x), attributes=attributes, mask=Causal(), layout=layout)
    return np.asarray(declaration.merge(p)(stream, jax.random.key(0))[0].x_BSD)


X = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH))
PLACES = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_against_numpy(order: str, qk_norm: bool) -> None:
    words = {**LLAMA, "norm_position": order, "qk_norm": qk_norm}
    p = random(
        Declaration(layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **words))
    )
    x, first, second = X, p["attention_norm/scale"], p["mlp_norm/scale"]
    if order == "pre":
        x = x + attention(p, norm(x, first), PLACES)
        x = x + mlp(p, norm(x, second))
    else:
        x = x + norm(attention(p, x, PLACES), first)
        x = x + norm(mlp(p, x), second)
    np.testing.assert_allclose(run(p, X, **words), x, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(LENGTH)))
def test_tokens_in_another_order_of_storage_are_the_same_tokens(order: list[int]) -> None:
    """A token's place is its `position`: for the mask, and for the rotation."""
    p = random(
        Declaration(layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **LLAMA))
    )
    straight = run(p, X, PLACES, **LLAMA)
    at = np.asarray(order)
    np.testing.assert_allclose(run(p, X[:, at], PLACES[:, at], **LLAMA), straight[:, at], rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 50))
def test_products_of_rotated_vectors_depend_on_how_far_apart_they_are(
    start: int, one: int, other: int
) -> None:
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, WIDTH))

    def product(shift: int) -> float:
        a, b = (
            rotate(jnp.asarray(x), jnp.array([[shift + at]]), 1e4)
            for x, at in ((q, one), (k, other))
        )
        return float((a * b).sum())

    np.testing.assert_allclose(product(start), product(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "untie", [(), ("query", "key", "value", "out", "mlp", "mlp_norm", "attention_norm", "qk_norm")]
)
@pytest.mark.parametrize("order", ["pre", "post"])
def test_token_by_token_is_the_whole_at_once(order: str, untie: tuple[str, ...]) -> None:
    names = ["text", "image"]
    block: dict[str, Any] = {
        "name": "transformer",
        "num_heads": HEADS,
        "mlp_dim": HIDDEN,
        **LLAMA,
        "norm_position": order,
    }
    block |= {
        "qk_norm": True,
        "per_modality": {"parts": list(untie), "modalities": names if untie else []},
    }
    trunk = Trunk(
        [GroupConfig(2, (block,))],
        WIDTH,
        norm="rms",
        per_modality=PerModality(("norm",) if untie else (), tuple(names) if untie else ()),
    )
    declaration = Declaration(nnx.Dict({"trunk": trunk}))
    model = declaration.merge({n: jnp.asarray(v) for n, v in random(declaration).items()})["trunk"]
    layout = (("text", 2), ("image", 3))
    whole, _ = model.layers(Stream(jnp.asarray(X), layout=layout, mask=Causal()), jax.random.key(0))
    held, made = model.init_cache(Stream(jnp.asarray(X[:, :1]), layout=(("text", 1),)), LENGTH), []
    for at in range(LENGTH):
        token = Stream(jnp.asarray(X[:, at : at + 1]), layout=((names[at > 1], 1),), mask=Causal())
        out, held = model.decode(token, held, at)
        made.append(out.x_BSD)
    np.testing.assert_allclose(np.concatenate(made, axis=1), whole.x_BSD, rtol=1e-9)


def test_every_norm_can_be_untied() -> None:
    words: Any = {
        **LLAMA,
        "qk_norm": True,
        "per_modality": {"parts": PARTS, "modalities": ["text", "image"]},
    }
    declaration = Declaration(
        layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **words)
    )
    assert all("/text" in n or "/image" in n for n in declaration.specs)
    p = random(declaration)
    dense = {n.replace("/text", ""): v for n, v in p.items() if "/text" in n}
    same = {n: dense[n.replace("/text", "").replace("/image", "")] for n in p}
    plain = {k: v for k, v in words.items() if k != "per_modality"}
    np.testing.assert_allclose(run(same, X, **words), run(dense, X, **plain), rtol=1e-10)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_gradients_are_finite_differences(order: str) -> None:
    words = {**LLAMA, "norm_position": order, "qk_norm": True}
    declaration = Declaration(
        layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **words)
    )

    def value(p: Any, x: jax.Array) -> jax.Array:
        stream = Stream(x, mask=Causal())
        return jnp.square(declaration.merge(p)(stream, jax.random.key(0))[0].x_BSD).sum()

    p = {n: jnp.asarray(v) for n, v in random(declaration).items()}
    check_grads(value, (p, jnp.asarray(X)), order=1, modes=["rev"], rtol=1e-4)


def test_the_last_norm_of_a_trunk() -> None:
    block = {"name": "transformer", "num_heads": HEADS, "mlp_dim": HIDDEN, **LLAMA}
    declaration = Declaration(nnx.Dict(trunk=Trunk([GroupConfig(1, (block,))], WIDTH, norm="rms")))
    p = random(declaration)
    trunk = declaration.merge({n: jnp.asarray(v) for n, v in p.items()})["trunk"]
    stream = Stream(jnp.asarray(X), mask=Causal())
    before, after = (call(stream, jax.random.key(0))[0].x_BSD for call in (trunk.layers, trunk))
    np.testing.assert_allclose(after, norm(np.asarray(before), p["trunk/norm/scale"]), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norms_and_rotations_are_done_in_float32(dtype: str) -> None:
    x = jnp.asarray(100 * X[:, :, None, :], dtype)
    places = jnp.full((ROWS, LENGTH), 12_345)
    turns, scale = rotate(x, places, 100.0), norm_of("rms", WIDTH)
    assert turns.dtype == x.dtype
    wide = rotate(x.astype("float32"), places, 100.0)
    np.testing.assert_array_equal(turns, wide.astype(dtype))
    p = jax.jit(Declaration(scale).initialise)(0)
    normed = Declaration(scale).merge(p)(x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(
        np.asarray(normed, np.float64),
        norm(wide, np.ones(WIDTH)),
        rtol=8e-3 if dtype == "bfloat16" else 1e-6,
    )


@pytest.mark.parametrize(
    "words, said",
    [
        ({"norm": "rsm"}, "norm is 'rsm'. Did you mean 'rms'"),
        ({"mlp": "swigl"}, "mlp is 'swigl'. Did you mean 'swiglu'"),
        ({"norm_position": "pst"}, "norm_position is 'pst'. Did you mean 'post'"),
        ({"rotary": -1.0}, "rotary is -1.0"),
    ],
)
def test_names_that_are_not_there(words: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layers.block("transformer", WIDTH, num_heads=HEADS, mlp_dim=HIDDEN, **words)
    with pytest.raises(UserError, match="heads have 3 numbers"):
        layers.block("transformer", 6, num_heads=2, mlp_dim=HIDDEN, rotary=10.0)

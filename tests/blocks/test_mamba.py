"""The selective state-space block against the plain recurrence in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.analysis.flops import model_flops
from mmjax.blocks.mamba import PARTS, check_mask
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.masks import FULL, Causal, KeyIs, Same
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk

WIDTH, STATE, EXPAND, TAPS, RANK = 4, 3, 2, 3, 2
INNER = EXPAND * WIDTH
SIZES: dict[str, Any] = {"state": STATE, "expand": EXPAND, "taps": TAPS, "rank": RANK}
PUBLISHED = ["in", "x", "dt", "out"]
NAMES = ["text", "image"]
LAYOUT = (("text", 2), ("image", 3), ("text", 2))
TOKENS = [name for name, length in LAYOUT for _ in range(length)]
Arrays = Mapping[str, Any]


pytestmark = pytest.mark.usefixtures("x64")


def declared(**settings: Any) -> Declaration:
    return Declaration(layers.block("mamba", WIDTH, **SIZES, **settings))


def random(declaration: Declaration) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}


def tokens(length: int = len(TOKENS)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, length, WIDTH))


def run(declaration: Declaration, p: Arrays, x: Any = None, **stream: Any) -> np.ndarray:
    def call(p: Any, x: jax.Array) -> jax.Array:
        return declaration.merge(p)(Stream(x, **stream), jax.random.key(0))[0].x_BSD

    return np.asarray(jax.jit(call)(p, tokens() if x is None else x))


# --- the same in NumPy, token by token ----------------------------------------------------------


def own(p: Arrays, part: str, rest: str, kind: str) -> np.ndarray:
    return p[f"{part}/{kind}{rest}"] if f"{part}/{kind}{rest}" in p else p[part + rest]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Return the norm of mamba-1.4b (`rms_norm` in its config; Zhang and Sennrich 2019)."""
    return x / np.sqrt(np.square(x).mean() + eps) * scale


def layer(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * scale


def mixer(
    p: Arrays, x: np.ndarray, kinds: list[str], norm: Any = rms, eps: float = 1e-6
) -> np.ndarray:
    """Run one sequence `[S, D]` without packing or padding."""
    inputs = [
        norm(each, own(p, "norm", "/scale", k), eps) for each, k in zip(x, kinds, strict=True)
    ]
    u = [each @ own(p, "inner", "/kernel", k) for each, k in zip(inputs, kinds, strict=True)]
    u = [np.zeros(INNER)] * (TAPS - 1) + u
    state, out = np.zeros((INNER, STATE)), []
    for s, kind in enumerate(kinds):
        taps = own(p, "conv", "/kernel", kind)
        conv = sum(taps[i] * u[s + i] for i in range(TAPS)) + own(p, "conv", "/bias", kind)
        seen = silu(conv)
        low, b, c = np.split(seen @ own(p, "x", "/kernel", kind), [RANK, RANK + STATE])
        step = np.log1p(np.exp(low @ own(p, "dt", "/kernel", kind) + own(p, "dt", "/bias", kind)))
        decay = np.exp(-step[:, None] * np.exp(p["a_log"]))
        state = decay * state + (step * seen)[:, None] * b
        y = state @ c + p["skip"] * seen
        gate = silu(inputs[s] @ own(p, "gate", "/kernel", kind))
        out.append(x[s] + (y * gate) @ own(p, "out", "/kernel", kind))
    return np.stack(out)


@pytest.mark.parametrize(
    "words, norm, eps",
    [({}, rms, 1e-6), ({"eps": 1e-5}, rms, 1e-5), ({"norm": "layer", "eps": 0.1}, layer, 0.1)],
    ids=["default", "published", "layer"],
)
def test_against_numpy(words: dict[str, Any], norm: Any, eps: float) -> None:
    declaration = declared(**words)
    p = random(declaration)
    expected = np.stack([mixer(p, x, TOKENS, norm, eps) for x in tokens()])
    np.testing.assert_allclose(run(declaration, p), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("untie", [[part] for part in PARTS] + [PUBLISHED])
def test_each_switch(untie: list[str]) -> None:
    declaration = declared(per_modality={"parts": untie, "modalities": NAMES})
    p = random(declaration)
    expected = np.stack([mixer(p, x, TOKENS) for x in tokens()])
    found = run(declaration, p, layout=LAYOUT)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert {name.split("/")[0] for name in p if "text" in name} == (
        {"in": {"inner", "gate"}}.get(untie[0], set()) | set(untie) - {"in"}
    )


def test_the_state_is_float32_where_the_model_is_bfloat16() -> None:
    declaration = declared(per_modality={"parts": PUBLISHED, "modalities": NAMES})

    def call(p: Any) -> Any:
        block = declaration.merge(p, jnp.bfloat16)
        stream = Stream(jnp.asarray(tokens(), jnp.bfloat16), layout=LAYOUT)
        return block(stream, jax.random.key(0))[0].x_BSD

    p = {n: jnp.asarray(a, jnp.float32) for n, a in random(declaration).items()}
    assert jax.eval_shape(call, p).dtype == jnp.bfloat16
    body = str(jax.make_jaxpr(call)(p))
    assert f"f32[2,8,{STATE}]" in body and f"bf16[2,8,{STATE}]" not in body


# --- padding, packing, causality ----------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.lists(st.integers(0, 1), min_size=7, max_size=7),
)
def test_padding_and_packing_are_as_if_items_ran_alone(valid: list[bool], new: list[int]) -> None:
    declaration = declared()
    p = random(declaration)
    item = np.cumsum(new) + 3
    rows = np.array([valid, [True] * 7])
    x = np.where(rows[..., None], tokens(), 77.0)
    found = PACKED(p, x, rows, item[None])
    for row in range(2):
        for each in np.unique(item):
            at = np.flatnonzero(rows[row] & (item == each))
            expected = mixer(p, x[row, at], ["any"] * len(at)) if len(at) else x[row, at]
            np.testing.assert_allclose(found[row, at], expected, rtol=1e-9, atol=1e-12)


def _packed(p: Any, x: Any, valid: Any, item: Any) -> Any:
    stream = Stream(x, valid, attributes={"item": item}, mask=Causal() & Same("item"))
    return declared().merge(p)(stream, jax.random.key(0))[0].x_BSD


PACKED = jax.jit(_packed)


def test_causal_and_no_more() -> None:
    declaration = declared(per_modality={"parts": PUBLISHED, "modalities": NAMES})
    p = random(declaration)
    item = jnp.asarray([[0, 0, 0, 0, 1, 1, 1]])

    def outputs(x_SD: jax.Array, attributes: Any) -> jax.Array:
        stream = Stream(x_SD[None], layout=LAYOUT, attributes=attributes)
        return declaration.merge(p)(stream, jax.random.key(0))[0].x_BSD[0]

    jacobian = jax.jit(jax.jacrev(outputs))
    reached = np.abs(jacobian(tokens()[0], {})).sum((1, 3)) > 0
    np.testing.assert_array_equal(reached, np.tri(7, dtype=bool))
    reached = np.abs(jacobian(tokens()[0], {"item": item})).sum((1, 3)) > 0
    np.testing.assert_array_equal(reached, np.tri(7, dtype=bool) & (item[0][:, None] == item[0]))


# --- cost, trunks, mistakes ---------------------------------------------------------------------


def test_operations_are_those_of_the_projections() -> None:
    """The scan has no products: it is element-wise, and not counted."""
    by_hand = 2 * 2 * 7 * (
        2 * WIDTH * INNER + INNER * (RANK + 2 * STATE) + RANK * INNER + INNER * WIDTH
    )  # fmt: skip
    for more in ({}, {"per_modality": {"parts": PARTS, "modalities": NAMES}}):
        declaration = declared(**more)
        p = random(declaration)

        def call(p: Any, declaration: Declaration = declaration) -> Any:
            stream = Stream(jnp.asarray(tokens()), layout=LAYOUT)
            return declaration.merge(p)(stream, jax.random.key(0))[0].x_BSD

        assert model_flops(call, p) == by_hand


def test_a_pattern_of_attention_and_mamba() -> None:
    mot = {
        "name": "transformer",
        "num_heads": 2,
        "mlp_dim": 5,
        "per_modality": {"parts": ["mlp"], "modalities": NAMES},
    }
    mamba = {"name": "mamba", **SIZES, "per_modality": {"parts": PUBLISHED, "modalities": NAMES}}
    trunk = Trunk([GroupConfig(2, (mot, mamba))], WIDTH, "full")
    declaration = Declaration(nnx.Dict({"trunk": trunk}))
    p = jax.jit(lambda: declaration.initialise(0, jnp.float64))()
    names = {c for spec in declaration.specs.values() for c in spec.canonical}
    assert {"trunk/layers/002/mlp/image/up/kernel", "trunk/layers/003/out/text/kernel"} <= names

    def value(p: Any) -> Any:
        stream = Stream(jnp.asarray(tokens()), layout=LAYOUT, mask=Causal())
        return jnp.square(
            declaration.merge(p)["trunk"](stream, jax.random.key(0))[0].x_BSD - 1
        ).sum()

    gradient = jax.jit(jax.grad(value))(p)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradient.values())


def test_it_begins_as_published() -> None:
    declaration = Declaration(layers.block("mamba", 32))
    p = jax.jit(lambda: declaration.initialise(0))()
    np.testing.assert_allclose(np.exp(p["a_log"]), np.tile(np.arange(1.0, 17), (64, 1)), rtol=1e-6)
    step = np.log1p(np.exp(np.asarray(p["dt/bias"], np.float64)))
    assert 0.99e-3 < step.min() < 4e-3 and 3e-2 < step.max() < 1.01e-1
    assert p["x/kernel"].shape == (64, 2 + 32) and (p["skip"] == 1).all()


def test_its_projections_begin_as_pytorchs_and_out_by_depth() -> None:
    """Uniform to `1 / sqrt(inputs)`, the convolution's bias to `1 / sqrt(taps)`; `out` over `sqrt(depth)`."""
    p = jax.jit(lambda: Declaration(layers.block("mamba", 32, depth=9)).initialise(0))()
    bounds = {
        "inner/kernel": 32**-0.5, "gate/kernel": 32**-0.5, "x/kernel": 64**-0.5, "dt/kernel": 2**-0.5,
        "conv/kernel": 0.5, "conv/bias": 0.5, "out/kernel": 64**-0.5 / 3,
    }  # fmt: skip
    for name, bound in bounds.items():
        drawn = np.abs(np.asarray(p[name]))
        assert 0.9 * bound < drawn.max() < bound, name
        assert drawn.mean() == pytest.approx(bound / 2, rel=0.15), name


@pytest.mark.parametrize(
    "mask", [FULL, Causal(), Causal() & Same("item"), Causal() | KeyIs("prefix", 1)]
)
def test_masks_that_it_keeps_to(mask: Any) -> None:
    check_mask(mask)


@pytest.mark.parametrize(
    "mask", [Same("modality"), Causal() & Same("modality"), KeyIs("prefix", 1)]
)
def test_masks_that_it_cannot_keep_to(mask: Any) -> None:
    with pytest.raises(UserError, match="mamba carries every token to all later ones"):
        run(declared(), random(declared()), mask=mask)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"state": 0}, r"blocks\[0\].state is 0"),
        ({"rank": 0}, r"blocks\[0\].rank is 0"),
        (
            {"per_modality": {"parts": ["out_proj"], "modalities": NAMES}},
            r"per_modality.parts names 'out_proj'\. Did you mean 'out'\?",
        ),
        ({"stat": 3}, r"blocks\[0\]\.stat'\. Did you mean 'state'\?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(block: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trunk([GroupConfig(1, ({"name": "mamba", **block},))], WIDTH)


@settings(max_examples=25, deadline=None)
@given(
    st.permutations(range(7)),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.booleans(),
)
def test_tokens_are_read_by_their_position(
    order: list[int], valid: list[bool], packs: bool
) -> None:
    """Another order of storage gives the same tokens, with padding and with items among them."""
    declaration = declared()
    p, at, x = random(declaration), np.asarray(order), tokens()
    there = np.broadcast_to(valid, x.shape[:2])
    items = {"item": np.broadcast_to([0, 0, 1, 1, 1, 2, 2], x.shape[:2])} if packs else {}
    places = {**items, "position": np.broadcast_to(3 * np.arange(7), x.shape[:2])}
    attributes = {n: jnp.asarray(v[:, at]) for n, v in places.items()}
    found = run(declaration, p, x[:, at], valid_BS=jnp.asarray(there[:, at]), attributes=attributes)
    wanted = run(
        declaration, p, x, valid_BS=jnp.asarray(there),
        attributes={n: jnp.asarray(v) for n, v in items.items()},
    )  # fmt: skip
    np.testing.assert_allclose(found[there[:, at]], wanted[:, at][there[:, at]], rtol=1e-9)


MIXED = [
    {"name": "mamba", **SIZES, "per_modality": {"parts": PUBLISHED, "modalities": NAMES}},
    {"name": "transformer", "num_heads": 2, "mlp_dim": 4, "rotary": 10.0},
]


@pytest.mark.parametrize("parts", [[1] * 7, [3, 4], [2, 1, 4], [7]])
@pytest.mark.parametrize("pads", [False, True])
def test_part_by_part_is_the_whole_at_once(parts: list[int], pads: bool) -> None:
    """In a pattern with attention, its projections by modality; padding is as if it were not there."""
    declaration = Declaration(nnx.Dict({"trunk": Trunk([GroupConfig(2, tuple(MIXED))], WIDTH)}))
    trunk = declaration.merge(random(declaration))["trunk"]
    x, there = jnp.asarray(tokens()), np.ones((2, 7), bool)
    there[0, [1, 5]] = not pads
    mask = Causal()
    whole, _ = trunk.layers(
        Stream(x, jnp.asarray(there), layout=LAYOUT, mask=mask), jax.random.key(0)
    )
    held, found, start = trunk.init_cache(Stream(x[:, :1], layout=(("text", 1),)), 7), [], 0
    for size in parts:
        at = slice(start, start + size)
        layout = tuple((name, 1) for name in TOKENS[at])
        now = np.where(np.arange(7) < start + size, there, False)
        stream = Stream(
            x[:, at],
            jnp.asarray(there[:, at]),
            layout=layout,
            mask=mask,
            filled_BT=jnp.asarray(now),
        )
        out, held = trunk.decode(stream, held, start)
        found.append(np.asarray(out.x_BSD))
        start += size
    made = np.concatenate(found, axis=1)
    np.testing.assert_allclose(made[there], np.asarray(whole.x_BSD)[there], rtol=1e-8)

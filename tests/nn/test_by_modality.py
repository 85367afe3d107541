"""Parts by modality: a transformer against a loop over tokens that choose their own weights."""

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

from mmjax.analysis.flops import model_flops, train_flops
from mmjax.blocks.transformer import PARTS
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration, from_canonical, to_canonical
from mmjax.nn.by_modality import ByModality, PerModality, TokenModalities, apply_per_modality
from mmjax.nn.dense import Dense
from mmjax.nn.masks import Causal, code
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import GroupConfig, Trunk
from mmjax.optim.reach import reached

WIDTH, HEADS, HIDDEN = 6, 2, 5
LAYOUT = (("text", 2), ("image", 3), ("text", 1), ("sound", 1))
TOKENS = [name for name, length in LAYOUT for _ in range(length)]
NAMES = ["text", "image", "sound"]
# Two modalities share an expert.
SHARED = {"text": "words", "image": "signal", "sound": "signal"}
Arrays = Mapping[str, Any]


pytestmark = pytest.mark.usefixtures("x64")


def declared(untie: Any = (), modalities: Any = ()) -> Declaration:
    words = {"num_heads": HEADS, "mlp_dim": HIDDEN, "bias": True, "qk_norm": True}
    block = layers.block(
        "transformer", WIDTH, **words, per_modality={"parts": untie, "modalities": modalities}
    )
    return Declaration(block)


def random(declaration: Declaration, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}


def tokens(length: int = len(TOKENS)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, length, WIDTH))


def run(declaration: Declaration, p: Arrays, **stream: Any) -> np.ndarray:
    def call(p: Any, x: jax.Array) -> jax.Array:
        return declaration.merge(p)(Stream(x, **stream), jax.random.key(0))[0].x_BSD

    return np.asarray(jax.jit(call)(p, tokens()))


# --- the same in NumPy, token by token ----------------------------------------------------------


def own(p: Arrays, part: str, rest: str, expert: str) -> np.ndarray:
    return p[f"{part}/{expert}{rest}"] if f"{part}/{expert}{rest}" in p else p[part + rest]


def norm(x: np.ndarray, scale: Any, bias: Any = 0.0) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * scale + bias


def mlp(p: Arrays, x: np.ndarray, e: str) -> np.ndarray:
    normed = norm(x, own(p, "mlp_norm", "/scale", e), own(p, "mlp_norm", "/bias", e))
    up = normed @ own(p, "mlp", "/up/kernel", e) + own(p, "mlp", "/up/bias", e)
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return gelu @ own(p, "mlp", "/down/kernel", e) + own(p, "mlp", "/down/bias", e)


def heads(p: Arrays, name: str, x: np.ndarray, e: str) -> np.ndarray:
    normed = norm(x, own(p, "attention_norm", "/scale", e), own(p, "attention_norm", "/bias", e))
    y = np.einsum("d,dhk->hk", normed, own(p, f"attention/{name}", "", e))
    return y if name == "value" else norm(y, own(p, f"attention/{name}_norm", "/scale", e))


def block(p: Arrays, x: np.ndarray, experts: list[str]) -> np.ndarray:
    """Run one sequence `[S, D]`, causal."""
    q, k, v = (
        np.stack([heads(p, name, each, e) for each, e in zip(x, experts, strict=True)])
        for name in ("query", "key", "value")
    )
    out = []
    for s, e in enumerate(experts):
        score = np.einsum("hk,thk->ht", q[s], k[: s + 1]) / np.sqrt(WIDTH / HEADS)
        weight = np.exp(score) / np.exp(score).sum(axis=-1, keepdims=True)
        read = np.einsum("ht,thk->hk", weight, v[: s + 1])
        y = x[s] + np.einsum("hk,hkd->d", read, own(p, "attention/out", "", e))
        out.append(y + mlp(p, y, e))
    return np.stack(out)


def check(untie: Any, modalities: Any, **stream: Any) -> None:
    declaration = declared(untie, modalities)
    p = random(declaration)
    stream.setdefault("layout", LAYOUT)
    found = run(declaration, p, mask=Causal(), **stream)
    experts = [SHARED[t] if modalities is SHARED else t for t in TOKENS]
    expected = np.stack([block(p, x, experts) for x in tokens()])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_each_switch_alone(part: str) -> None:
    dense, untied = set(declared().specs), set(declared([part], NAMES).specs)
    assert len(untied - dense) == len(NAMES) * len(dense - untied) > 0
    check([part], NAMES)


@pytest.mark.parametrize("modalities", [NAMES, SHARED])
def test_all_of_it(modalities: Any) -> None:
    check(PARTS, modalities)
    groups = set(modalities.values() if modalities is SHARED else NAMES)
    assert {name.split("/")[-1] for name in declared(["query"], modalities).specs} >= groups


def test_an_attribute_does_what_the_layout_does() -> None:
    codes = jnp.asarray([[code(t) for t in TOKENS]])
    check(PARTS, NAMES, attributes={"modality": codes})
    check(PARTS, SHARED, attributes={"modality": codes}, layout=())


def test_rows_of_their_own_order() -> None:
    """What no layout can express: each row has its modalities elsewhere."""
    declaration = declared(PARTS, NAMES)
    p = random(declaration)
    rows = [TOKENS, TOKENS[::-1]]
    codes = jnp.asarray([[code(t) for t in row] for row in rows])
    found = run(declaration, p, mask=Causal(), attributes={"modality": codes})
    expected = np.stack([block(p, x, row) for x, row in zip(tokens(), rows, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3)), min_size=1, max_size=7))
def test_any_layout(layout: list[tuple[str, int]]) -> None:
    """Whatever is interleaved, each token meets its own expert and stays where it is."""
    part = ByModality(lambda: Dense(1, 1, (None, None)), SHARED)
    kinds = [SHARED[name] for name, length in layout for _ in range(length)]
    x = np.arange(2 * len(kinds), dtype=float).reshape(2, len(kinds), 1)
    factor = {id(part.words): 2.0, id(part.signal): -3.0}
    y = apply_per_modality(
        part, jnp.asarray(x), TokenModalities(tuple(layout)), lambda copy, x: x * factor[id(copy)]
    )
    each = np.array([2.0 if kind == "words" else -3.0 for kind in kinds])
    np.testing.assert_array_equal(y, x * each[None, :, None])


def test_one_product_per_expert_however_often_it_comes() -> None:
    calls: list[tuple[int, ...]] = []
    part = ByModality(lambda: Dense(1, 1, (None, None)), SHARED)

    def call(copy: Any, x: jax.Array) -> jax.Array:
        calls.append(x.shape)
        return x

    apply_per_modality(
        part,
        jnp.zeros((1, 12, 1)),
        TokenModalities((("text", 2), ("image", 2), ("sound", 2)) * 2),
        call,
    )
    assert sorted(calls) == [(1, 4, 1), (1, 8, 1)]


def copied(dense: Arrays, declaration: Declaration) -> dict[str, np.ndarray]:
    """Set every copy to the dense block's own."""
    result = {}
    for name in declaration.specs:
        plain = "/".join(word for word in name.split("/") if word not in NAMES)
        result[name] = dense[plain]
    return result


def test_equal_copies_are_the_dense_block() -> None:
    dense, untied = declared(), declared(PARTS, NAMES)
    p = random(dense)
    one = run(dense, p, layout=LAYOUT)
    two = run(untied, copied(p, untied), layout=LAYOUT)
    np.testing.assert_allclose(two, one, rtol=1e-12, atol=1e-12)
    other = run(untied, random(untied), layout=LAYOUT)
    assert np.abs(other - one).max() > 1e-3, "copies that differ would show"


def loss(declaration: Declaration, layout: Any) -> Any:
    length = sum(n for _, n in layout)

    def value(p: Any, x: jax.Array) -> jax.Array:
        stream = Stream(x[:, :length], layout=layout)
        return jnp.square(declaration.merge(p)(stream, jax.random.key(0))[0].x_BSD).sum()

    return value


def test_what_is_absent_has_no_gradient_and_is_not_reached() -> None:
    declaration = declared(PARTS, NAMES)
    value, p = loss(declaration, (("text", 2), ("sound", 3))), random(declaration)
    gradient = jax.jit(jax.grad(value))(p, tokens())
    absent = {name for name in p if "image" in name.split("/")}
    assert len(absent) == len(p) / 3
    assert {name for name, g in gradient.items() if not np.any(g)} == absent
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in p.items()}
    x = jax.ShapeDtypeStruct(tokens().shape, jnp.float64)
    assert reached(value, shapes, x) == set(p) - absent


def test_gradients_against_differences() -> None:
    declaration = declared(PARTS, NAMES)
    value, p = jax.jit(loss(declaration, LAYOUT)), random(declaration)
    gradient = jax.jit(jax.grad(value))(p, tokens())
    rng = np.random.default_rng(3)
    way = {name: rng.normal(size=a.shape) for name, a in p.items()}
    ends = [value({n: a + h * way[n] for n, a in p.items()}, tokens()) for h in (1e-6, -1e-6)]
    along = sum(float((gradient[n] * way[n]).sum()) for n in p)
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_as_many_operations_as_dense() -> None:
    for measure in (model_flops, train_flops):
        counts = []
        for declaration in (declared(), declared(PARTS, NAMES)):
            shapes = {
                n: jax.ShapeDtypeStruct(s.shape, jnp.float64) for n, s in declaration.specs.items()
            }
            x = jax.ShapeDtypeStruct(tokens().shape, jnp.float64)
            counts.append(measure(loss(declaration, LAYOUT), shapes, x))
        assert counts[0] == counts[1] > 0


def test_copies_have_the_axes_and_the_decay_of_the_dense_block() -> None:
    dense, untied = declared().specs, declared(PARTS, NAMES).specs
    for name, spec in untied.items():
        plain = dense["/".join(word for word in name.split("/") if word not in NAMES)]
        assert (spec.axes, spec.shape, spec.keep_dtype, spec.decay) == (
            plain.axes, plain.shape, plain.keep_dtype, plain.decay,
        )  # fmt: skip


# --- in a trunk ---------------------------------------------------------------------------------

BLOCK = {"name": "transformer", "num_heads": 2, "mlp_dim": 5}
MOT = {
    **BLOCK,
    "per_modality": {"parts": [p for p in PARTS if p != "qk_norm"], "modalities": NAMES},
}
TWO = {"text": "text", "image": "image", "sound": "image"}
VLMO = {**BLOCK, "per_modality": {"parts": ["mlp", "mlp_norm"], "modalities": TWO}}


def trunk(*groups: GroupConfig, remat: str = "none", norms: Any = ()) -> Declaration:
    return Declaration(
        nnx.Dict(
            {
                "trunk": Trunk(
                    groups,
                    WIDTH,
                    remat,
                    per_modality=PerModality(("norm",) if norms else (), norms),
                )
            }
        )
    )


def test_scan_and_remat_change_nothing() -> None:
    results = []
    apart = [GroupConfig(1, (MOT,)), GroupConfig(1, (MOT,))]
    for groups, remat in [(apart, "none"), ([GroupConfig(2, (MOT,))], "full")]:
        declaration = trunk(*groups, remat=remat, norms=NAMES)
        shapes = to_canonical(
            declaration.specs, {n: np.empty(s.shape) for n, s in declaration.specs.items()}
        )
        rng = np.random.default_rng(0)
        canonical = {n: rng.normal(size=shapes[n].shape) for n in sorted(shapes)}
        p = from_canonical(declaration.specs, canonical)

        def value(p: Any, declaration: Declaration = declaration) -> jax.Array:
            stream = Stream(jnp.asarray(tokens()), layout=LAYOUT)
            return jnp.square(
                declaration.merge(p)["trunk"](stream, jax.random.key(0))[0].x_BSD - 0.3
            ).sum()

        gradient = jax.jit(jax.grad(value))(p)
        results.append(to_canonical(declaration.specs, gradient))
    assert results[0].keys() == results[1].keys()
    assert "trunk/layers/001/mlp/image/up/kernel" in results[0]
    assert "trunk/norm/image/scale" in results[0]
    for name, expected in results[0].items():
        np.testing.assert_allclose(results[1][name], expected, rtol=1e-9, atol=1e-10, err_msg=name)


def test_multiway_blocks_below_shared_ones() -> None:
    """VLMo: by modality in the lower layers, one for all in the upper."""
    names = {
        c
        for s in trunk(GroupConfig(2, (VLMO,)), GroupConfig(1, (BLOCK,))).specs.values()
        for c in s.canonical
    }
    lower, upper = (
        {n for n in names if f"layers/{i}/" in n and "/mlp/" in n} for i in ("001", "002")
    )
    assert {n.split("/")[4] for n in lower} == {"text", "image"}
    assert {n.split("/")[4] for n in upper} == {"up", "down"}
    assert "trunk/layers/001/attention/query" in names


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("untie", "modalities", "message"),
    [
        (["mpl"], NAMES, r"per_modality.parts names 'mpl'\. Did you mean 'mlp'\?"),
        (["mlp"], (), r"per_modality.parts is \['mlp'\] and modalities \[\]: name"),
        ((), NAMES, r"per_modality.parts is \[\] and modalities"),
        (["qk_norm"], NAMES, r"set qk_norm"),
        (["mlp"], ["experts"], r"no copy can have the name 'experts'"),
        (["mlp"], "text", r"per_modality.modalities' is 'text'; expected a list, each str or a block of keys"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(untie: Any, modalities: Any, message: str) -> None:
    block = {**BLOCK, "per_modality": {"parts": untie, "modalities": modalities}}
    with pytest.raises(UserError, match=message):
        trunk(GroupConfig(1, (block,)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((("text", 3), ("imgae", 4)), r"modality 'imgae', .* no copy\. Did you mean 'image'\?"),
        ((), "neither a layout nor an attribute 'modality'"),
    ],
)
def test_streams_that_do_not_fit(layout: Any, message: str) -> None:
    declaration = declared(["mlp"], NAMES)
    with pytest.raises(UserError, match=message):
        run(declaration, random(declaration), layout=layout)


def test_a_layout_of_another_length_is_our_mistake() -> None:
    copies = PerModality(("mlp",), tuple(NAMES))
    part = copies("mlp", lambda: Dense(1, 1, (None, None)))
    with pytest.raises(ValueError, match="of a stream of 4 tokens"):
        apply_per_modality(part, jnp.zeros((1, 4, 1)), TokenModalities((("text", 3),)))

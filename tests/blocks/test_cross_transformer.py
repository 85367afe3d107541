"""The decoder's block: its context, and streams that come part by part. CoCa's loss is the test of its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.blocks.cross_transformer import CrossTransformer
from mmjax.blocks.transformer import Transformer
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.by_modality import PerModality
from mmjax.nn.masks import Causal, Same
from mmjax.nn.stream import Stream, concatenate
from mmjax.nn.trunk import GroupConfig, Trunk

WIDTH, LENGTH = 4, 6
BLOCK = {"num_heads": 2, "mlp_dim": 5}
OPEN_CLIP: dict[str, Any] = {"attention_bias": True, "context_norm": True, "eps": 1e-5}
THERE = np.array([[1, 1, 1], [1, 0, 1]], bool)


pytestmark = pytest.mark.usefixtures("x64")


def built(*groups: GroupConfig, remat: str = "none") -> tuple[Any, dict[str, np.ndarray]]:
    declaration = Declaration(nnx.Dict({"trunk": Trunk(groups, WIDTH, remat)}))
    rng = np.random.default_rng(0)
    return declaration, {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}


def crossing(repeat: int, **settings: Any) -> GroupConfig:
    return GroupConfig(repeat, ({"name": "cross_transformer", **BLOCK, **settings},))


def plain(repeat: int) -> GroupConfig:
    return GroupConfig(repeat, ({"name": "transformer", **BLOCK, "qk_norm": True},))


def stream(valid: Any = THERE, seed: int = 1, **rest: Any) -> Stream:
    rng = np.random.default_rng(seed)
    x, context = rng.normal(size=(2, LENGTH, WIDTH)), rng.normal(size=(2, 3, WIDTH))
    seen = Stream(jnp.asarray(context), None if valid is None else jnp.asarray(valid))
    return Stream(jnp.asarray(x), mask=Causal(), context=seen, **rest)


def test_only_the_context_that_exists_is_read() -> None:
    declaration, p = built(crossing(2))
    call = jax.jit(lambda p, s: declaration.merge(p).trunk(s, jax.random.key(0))[0])
    given = stream()
    junk = jnp.where(THERE[..., None], given.context.x_BSD, 99.0)
    out = call(p, given)
    other = call(p, replace(given, context=replace(given.context, x_BSD=junk)))
    np.testing.assert_array_equal(out.x_BSD, other.x_BSD)
    np.testing.assert_array_equal(out.context.x_BSD, given.context.x_BSD)
    all_of_it = call(p, stream(valid=None))
    np.testing.assert_allclose(out.x_BSD[0], all_of_it.x_BSD[0], rtol=1e-12)
    assert np.abs(out.x_BSD[1] - all_of_it.x_BSD[1]).max() > 0.01


LLAMA: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "rotary": 100.0, "qk_norm": True}
UNTIED: dict[str, Any] = {
    "context_norm": True,
    "per_modality": {
        "parts": ["query", "mlp", "cross_query", "cross_key", "cross_norm", "context_norm"],
        "modalities": ["text", "speech"],
    },
}
DECODERS: dict[str, dict[str, Any]] = {
    "coca": {"bias": True, "qk_norm": True, **OPEN_CLIP},
    "llama": LLAMA,
    "untied, post-norm": {**LLAMA, **UNTIED, "norm_position": "post"},
}


@pytest.mark.parametrize(
    ("parts", "decoder", "dtype"),
    [
        ([1] * LENGTH, "coca", "float64"),
        ([2, 1, 3], "coca", "float32"),
        ([2, 1, 3], "llama", "float64"),
        ([2, 1, 3], "untied, post-norm", "float64"),
    ],
)
def test_part_by_part_as_at_once(parts: list[int], decoder: str, dtype: str) -> None:
    """Blocks of both kinds, in groups and patterns; the context's keys and values are computed once."""
    mixed = GroupConfig(2, (plain(1).blocks[0], crossing(1, **DECODERS[decoder]).blocks[0]))
    declaration, p = built(plain(2), mixed)
    given: Stream = stream(layout=(("text", LENGTH),))
    given = replace(given, context=replace(given.context, layout=(("speech", 3),)))
    p, given = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, (p, given)
    )
    whole = jax.jit(lambda p, s: declaration.merge(p).trunk.layers(s, jax.random.key(0))[0].x_BSD)(
        p, given
    )
    init_cache = jax.jit(lambda p, s: declaration.merge(p).trunk.init_cache(s, LENGTH))
    decode = jax.jit(lambda p, s, held, at: declaration.merge(p).trunk.decode(s, held, at))
    held, at, out = init_cache(p, given), 0, []
    for size in parts:
        x_BSD = given.x_BSD[:, at : at + size]
        part = Stream(x_BSD, mask=Causal(), layout=(("text", size),))
        made, held = decode(p, part, held, at)
        out.append(made.x_BSD)
        at += size
    assert whole.dtype == dtype
    tolerance = {"float32": 1e-5, "float64": 1e-10}[dtype] * np.abs(whole).max()
    np.testing.assert_allclose(np.concatenate(out, axis=1), whole, rtol=0, atol=tolerance)


def test_a_row_whose_context_has_no_token_gets_nothing_from_it() -> None:
    """The block is then a `transformer` block with the same parameters; the cross-attention has no gradient."""
    settings = {**BLOCK, "bias": True, "qk_norm": True, **OPEN_CLIP}
    declaration = Declaration(CrossTransformer(**settings).build(WIDTH))
    settings.pop("context_norm")
    alone = Declaration(Transformer(**settings).build(WIDTH))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    given = stream(valid=np.array([[1, 1, 1], [0, 0, 0]], bool))

    def row(p: Any, context: Any, b: int) -> tuple[Any, Any]:
        seen = replace(given, context=replace(given.context, x_BSD=context))
        out = declaration.merge(p)(seen, None)[0].x_BSD
        return jnp.square(out[b]).sum(), out

    gradient = jax.jit(jax.grad(row, argnums=(0, 1), has_aux=True), static_argnums=2)
    (by_p, by_context), out = gradient(p, given.context.x_BSD, 1)
    plain_p = {n: x for n, x in p.items() if n in alone.specs}
    expected = jax.jit(lambda p, s: alone.merge(p)(s, None)[0].x_BSD)(plain_p, given)
    np.testing.assert_allclose(out[1], expected[1], rtol=1e-12)
    assert np.abs(out[0] - expected[0]).max() > 0.1
    of_cross = {n: g for n, g in by_p.items() if n not in alone.specs}
    assert len(of_cross) == 14 and not any(np.abs(g).max() for g in of_cross.values())
    assert not np.abs(by_context).max() and all(np.isfinite(g).all() for g in by_p.values())
    by_p, by_context = gradient(p, given.context.x_BSD, 0)[0]
    assert all(np.abs(by_p[n]).max() > 0 for n in of_cross if n != "cross/key_bias")
    assert (np.abs(by_context).max(axis=(1, 2)) > 0).tolist() == [True, False]


def test_rematerialisation_and_gradients_of_the_context() -> None:
    gradients = []
    for remat in ("none", "full"):
        declaration, p = built(crossing(2), remat=remat)

        def of(x: Any, given: Stream, p: Any = p, declaration: Any = declaration) -> Any:
            given = replace(given, context=replace(given.context, x_BSD=x))
            return jnp.square(declaration.merge(p).trunk(given, jax.random.key(0))[0].x_BSD).sum()

        gradients.append(jax.jit(jax.grad(of))(stream().context.x_BSD, stream()))
    np.testing.assert_allclose(*gradients, rtol=1e-10)
    assert (np.abs(gradients[0]).sum(axis=2) > 0).tolist() == THERE.tolist()


def test_mistakes() -> None:
    declaration, p = built(crossing(1))
    alone = replace(stream(), context=None)
    with pytest.raises(UserError, match="cross_transformer reads a second stream"):
        declaration.merge(p).trunk(alone, jax.random.key(0))
    with pytest.raises(ValueError, match="context"):
        concatenate([stream(), stream()])
    fusing = GroupConfig(1, ({"name": "bottleneck", "modalities": ["a"], **BLOCK},))
    other, q = built(fusing)
    with pytest.raises(UserError, match="BottleneckBlock cannot take a stream token by token"):
        other.merge(q).trunk.init_cache(alone, LENGTH)
    declaration, p = built(plain(1))
    part = replace(
        alone, mask=Causal() & Same("item"), attributes={"item": jnp.zeros((1, LENGTH), int)}
    )
    model = declaration.merge(p).trunk
    with pytest.raises(UserError, match="reads attribute 'item'"):
        model.decode(part, model.init_cache(alone, LENGTH), 0)


def normed(p: dict[str, np.ndarray], name: str, x: np.ndarray, eps: float) -> np.ndarray:
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * p[f"{name}/scale"] + p[f"{name}/bias"]


def read(
    p: dict[str, np.ndarray], at: str, x: np.ndarray, source: np.ndarray, sees: np.ndarray
) -> np.ndarray:
    """Return attention of one example: queries of `x`, keys and values of `source`, where `sees[s, t]`."""
    out = np.tile(p[f"{at}/out_bias"], (len(x), 1))
    heads = p[f"{at}/query"].shape[1]
    biases = {n: p[f"{at}/{n}_bias"].reshape(heads, -1) for n in ("query", "key", "value")}
    for h in range(heads):
        q, k, v = (
            given @ p[f"{at}/{n}"][:, h] + biases[n][h]
            for given, n in ((x, "query"), (source, "key"), (source, "value"))
        )
        weight = np.exp(q @ k.T / np.sqrt(q.shape[1])) * sees
        out = out + weight / weight.sum(axis=1, keepdims=True) @ v @ p[f"{at}/out"][h]
    return out


def test_biases_and_a_normed_context_against_numpy() -> None:
    """The block of open_clip's CoCa; eps is large, so that another would show."""
    block = CrossTransformer(**BLOCK, bias=True, **{**OPEN_CLIP, "eps": 0.01}).build(WIDTH)
    declaration = Declaration(block)
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    given = stream()
    out = jax.jit(lambda p, s: declaration.merge(p)(s, None)[0].x_BSD)(p, given)
    causal = np.tril(np.ones((LENGTH, LENGTH)))
    for b in range(2):
        x, context = np.asarray(given.x_BSD[b]), np.asarray(given.context.x_BSD[b])
        own = normed(p, "attention_norm", x, 0.01)
        x = x + read(p, "attention", own, own, causal)
        asked, seen = normed(p, "cross_norm", x, 0.01), normed(p, "context_norm", context, 0.01)
        x = x + read(p, "cross", asked, seen, np.tile(THERE[b], (LENGTH, 1)))
        up = normed(p, "mlp_norm", x, 0.01) @ p["mlp/up/kernel"] + p["mlp/up/bias"]
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + gelu @ p["mlp/down/kernel"] + p["mlp/down/bias"]
        np.testing.assert_allclose(out[b], x, rtol=1e-10)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turned(x: np.ndarray, position: int, base: float) -> np.ndarray:
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    one, two = x[:half], x[half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin])


def test_rms_rotary_and_untied_parts_against_numpy() -> None:
    """Token by token: self-attention is rotated and normalised per head, cross-attention is not rotated."""
    names, of_context = ["text"] * 4 + ["speech"] * 2, ["speech", "text", "text"]
    block = CrossTransformer(**{**BLOCK, **LLAMA, **UNTIED, "per_modality": PerModality(
        tuple(UNTIED["per_modality"]["parts"]), tuple(UNTIED["per_modality"]["modalities"])
    )})  # fmt: skip
    declaration = Declaration(block.build(WIDTH))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}
    given = stream(layout=(("text", 4), ("speech", 2)))
    given = replace(given, context=replace(given.context, layout=(("speech", 1), ("text", 2))))
    out = jax.jit(lambda p, s: declaration.merge(p)(s, None)[0].x_BSD)(p, given)

    def heads_of(x: np.ndarray, kernel: str, norm: str | None, at: int | None) -> list[np.ndarray]:
        parts = [x @ p[kernel][:, h] for h in range(2)]
        parts = parts if norm is None else [rms(part, p[norm]) for part in parts]
        return parts if at is None else [turned(part, at, 100.0) for part in parts]

    def attended(where: str, q: Any, k: Any, v: Any) -> np.ndarray:
        total = np.zeros(WIDTH)
        for h in range(2):
            weight = np.exp([q[h] @ key[h] / np.sqrt(2) for key in k])
            value = sum(w * val[h] for w, val in zip(weight / weight.sum(), v, strict=True))
            total = total + value @ p[f"{where}/out"][h]
        return total

    for b in range(2):
        x, seen = np.asarray(given.x_BSD[b]), np.asarray(given.context.x_BSD[b])
        normed = [rms(x[s], p["attention_norm/scale"]) for s in range(LENGTH)]
        q = [heads_of(n, f"attention/query/{m}", "attention/query_norm/scale", s)
             for s, (n, m) in enumerate(zip(normed, names, strict=True))]  # fmt: skip
        k = [
            heads_of(n, "attention/key", "attention/key_norm/scale", s)
            for s, n in enumerate(normed)
        ]
        v = [heads_of(n, "attention/value", None, None) for n in normed]
        x = np.stack(
            [x[s] + attended("attention", q[s], k[: s + 1], v[: s + 1]) for s in range(LENGTH)]
        )
        there = [t for t in range(3) if THERE[b, t]]
        read = {t: rms(seen[t], p[f"context_norm/{of_context[t]}/scale"]) for t in there}
        k = [
            heads_of(read[t], f"cross/key/{of_context[t]}", "cross/key_norm/scale", None)
            for t in there
        ]
        v = [heads_of(read[t], "cross/value", None, None) for t in there]
        for s, m in enumerate(names):
            asked = rms(x[s], p[f"cross_norm/{m}/scale"])
            q = heads_of(asked, f"cross/query/{m}", "cross/query_norm/scale", None)
            y = x[s] + attended("cross", q, k, v)
            inner = rms(y, p["mlp_norm/scale"])
            gate, up = (inner @ p[f"mlp/{m}/{n}/kernel"] for n in ("gate", "up"))
            y = y + (gate / (1 + np.exp(-gate)) * up) @ p[f"mlp/{m}/down/kernel"]
            np.testing.assert_allclose(out[b, s], y, rtol=1e-9)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"per_modality": {"parts": ["cros_key"], "modalities": ["a"]}},
            "Did you mean 'cross_key'",
        ),
        ({"per_modality": {"parts": ["context_norm"], "modalities": ["a"]}}, "set context_norm"),
        ({"per_modality": {"parts": ["cross_qk_norm"], "modalities": ["a"]}}, "set qk_norm"),
        ({"norm_position": "pots"}, "Did you mean 'post'"),
    ],
)
def test_a_part_or_place_that_the_block_lacks_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(crossing(1, **keys))

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
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
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


@pytest.mark.parametrize("parts", [[1] * LENGTH, [2, 1, 3]])
def test_part_by_part_as_at_once(parts: list[int]) -> None:
    """Blocks of both kinds, in groups and patterns, with biases and normalised queries."""
    mixed = GroupConfig(
        2, (plain(1).blocks[0], crossing(1, bias=True, qk_norm=True, **OPEN_CLIP).blocks[0])
    )
    declaration, p = built(plain(2), mixed)
    given = stream()
    whole = jax.jit(lambda p, s: declaration.merge(p).trunk.layers(s, jax.random.key(0))[0].x_BSD)(
        p, given
    )
    init_cache = jax.jit(lambda p, s: declaration.merge(p).trunk.init_cache(s, LENGTH))
    decode = jax.jit(lambda p, s, held, at: declaration.merge(p).trunk.decode(s, held, at))
    held, at, out = init_cache(p, given), 0, []
    for size in parts:
        part = Stream(given.x_BSD[:, at : at + size], mask=Causal())
        made, held = decode(p, part, held, at)
        out.append(made.x_BSD)
        at += size
    np.testing.assert_allclose(np.concatenate(out, axis=1), whole, rtol=1e-9, atol=1e-12)


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

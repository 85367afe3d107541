"""Mixtures of experts against loops over tokens and slots; what they cost, and how they lie on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from experted import (
    CHOICE,
    COUNT,
    HIDDEN,
    LAYOUT,
    LENGTH,
    ROWS,
    TOKENS,
    VALID,
    WIDTH,
    X,
    block,
    mlp,
    random,
)
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mmjax.analysis.flops import model_flops
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, make_mesh, named
from mmjax.nn.experts import grouped_rows
from mmjax.nn.masks import FULL
from mmjax.nn.stream import Aux, Stream
from mmjax.nn.trunk import GroupConfig, Trunk

pytestmark = pytest.mark.usefixtures("x64")


def run(
    config: Mapping[str, Any], p: Any, valid: Any = VALID, x: Any = X
) -> tuple[np.ndarray, Aux]:
    declaration = Declaration(layers.experts(WIDTH, HIDDEN, config))
    stream = Stream(jnp.asarray(x), jnp.asarray(valid), layout=LAYOUT)
    y, aux = jax.jit(lambda p, s: declaration.merge(p)(s, None))(p, stream)
    return np.asarray(y), aux


@pytest.mark.parametrize("config", [CHOICE, TOKENS], ids=["expert choice", "token choice"])
def test_each_token_is_the_sum_of_its_slots(config: dict[str, Any]) -> None:
    experts = layers.experts(WIDTH, HIDDEN, config)
    p = random(Declaration(experts))
    y, aux = run(config, p)
    # Groups of two rows.
    x, valid = X.reshape(2, 12, WIDTH), VALID.reshape(2, 12)
    slots: Any = experts.routing.route(jnp.asarray(x @ p["router"]), jnp.asarray(valid))
    wanted, found = np.zeros_like(x), np.zeros((2, 12), bool)
    for g, e, c in np.ndindex(*slots.index_GEC.shape):
        token, gate = int(slots.index_GEC[g, e, c]), float(slots.gate_GEC[g, e, c])
        wanted[g, token] += gate * mlp(p, e, x[g, token])
        found[g, token] |= gate > 0
    np.testing.assert_allclose(y, wanted.reshape(X.shape), rtol=1e-9, atol=1e-12)
    found = found.reshape(VALID.shape)
    for name, at in (("text", slice(0, 2)), ("image", slice(2, 6))):
        left, count = aux.statistics[f"dropped {name}"]
        assert int(count) == VALID[:, at].sum()
        assert int(left) == (VALID & ~found)[:, at].sum()
    assert sum(int(left) for left, _ in aux.statistics.values()) > 0


def test_experts_that_are_all_alike_are_the_dense_layer() -> None:
    """Each token at all of them, whose gates sum to one."""
    config = {"count": COUNT, "router": {"name": "token_choice", "top_k": COUNT, "capacity": 1.0}}
    p = random(Declaration(layers.experts(WIDTH, HIDDEN, config)))
    p |= {n: np.broadcast_to(v[:1], v.shape) for n, v in p.items() if n != "router"}
    y, aux = run(config, p, np.ones_like(VALID))
    np.testing.assert_allclose(y, mlp(p, 0, X), rtol=1e-9)
    assert not any(float(left) for left, _ in aux.statistics.values())


def test_padding_has_no_say() -> None:
    p = random(Declaration(layers.experts(WIDTH, HIDDEN, CHOICE)))
    kept = run(CHOICE, p)[0]
    other = run(CHOICE, p, x=np.where(VALID[..., None], X, 100.0))[0]
    np.testing.assert_array_equal(other[VALID], kept[VALID])
    assert not kept[~VALID].any()


def test_auxiliary_losses_add_up_and_reach_the_router() -> None:
    plain = {**TOKENS, "losses": {}}
    p = random(Declaration(layers.experts(WIDTH, HIDDEN, plain)))
    assert float(run(plain, p)[1].loss) == 0
    parts = [
        {"losses": {"importance": 0.5}}, {"losses": {"balance": 0.1}}, {"losses": {"z": 0.01}},
        {"local_entropy": {"text": 0.3}}, {"global_entropy": {"image": 2.0}, "entropy_floor": {"image": 1.5}},
    ]  # fmt: skip
    alone = [float(run({**TOKENS, **part}, p)[1].loss) for part in parts]
    assert min(alone) > 0
    together: dict[str, Any] = {"losses": {"importance": 0.5, "balance": 0.1, "z": 0.01}}
    together |= {
        "local_entropy": {"text": 0.3},
        "global_entropy": {"image": 2.0},
        "entropy_floor": {"image": 1.5},
    }
    assert float(run({**TOKENS, **together}, p)[1].loss) == pytest.approx(sum(alone), rel=1e-6)
    declaration = Declaration(layers.experts(WIDTH, HIDDEN, {**TOKENS, **together}))
    stream = Stream(jnp.asarray(X), layout=LAYOUT)
    gradient = jax.grad(lambda p: declaration.merge(p)(stream, None)[1].loss)(
        {n: jnp.asarray(v) for n, v in p.items()}
    )
    assert float(jnp.abs(gradient["router"]).max()) > 0


LOSSES = {"importance": 0.5, "balance": 0.1, "load": 0.2}


@pytest.mark.parametrize("over", ["group", "batch"])
def test_losses_are_of_each_group_or_of_the_whole_batch(over: str) -> None:
    """Of the router's own scores, by loops over groups of two rows, or all rows as one."""
    router: dict[str, Any] = {"name": "token_choice", "top_k": 1, "noise": 1.0}
    config = {
        "count": COUNT,
        "router": router,
        "group_size": 12,
        "losses": LOSSES,
        "losses_over": over,
    }
    p = random(Declaration(layers.experts(WIDTH, HIDDEN, config)))
    valid = VALID.copy()
    valid[2:] = False  # a group without a token
    tokens = X.reshape(-1, 12 if over == "group" else 24, WIDTH)
    each = []
    for x, there in zip(tokens, valid.reshape(tokens.shape[:2]), strict=True):
        logits = x[there] @ p["router"]
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        if len(scores):
            load = 1 - norm.cdf((logits.max(axis=1, keepdims=True) - logits) * COUNT)
            first = np.bincount(scores.argmax(axis=1), minlength=COUNT) / len(scores)
            sums = (scores.sum(axis=0), load.sum(axis=0))
            squares = [float((s.std() / s.mean()) ** 2) for s in sums]
            balance = COUNT * (first * scores.mean(axis=0)).sum()
            each.append(0.5 * squares[0] + 0.2 * squares[1] + 0.1 * balance)
    assert len(each) == 1
    found = float(run(config, p, valid)[1].loss)
    assert found == pytest.approx(each[0], rel=1e-6)
    full = float(run(config, p)[1].loss)
    other = float(
        run({**config, "losses_over": "batch" if over == "group" else "group"}, p)[1].loss
    )
    assert abs(full - other) > 1e-3


# --- in a block --------------------------------------------------------------------------------


def trunk(width: int = 8, **more: Any) -> Declaration:
    return Declaration(nnx.Dict(trunk=Trunk([GroupConfig(2, (block(**more),))], width)))


def test_experts_by_modality_are_those_of_each_alone() -> None:
    """MoMa: the tokens of a modality compete with their own kind only."""
    names = ["text", "image"]
    words: Any = {"experts": CHOICE, "per_modality": {"parts": ["mlp"], "modalities": names}}
    declaration = Declaration(layers.block("transformer", 8, num_heads=2, mlp_dim=HIDDEN, **words))
    p = random(declaration)
    model = declaration.merge(p)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(ROWS, LENGTH, 8)))
    stream = Stream(x, jnp.asarray(VALID), layout=LAYOUT)
    out, aux = model(stream, jax.random.key(0))
    after = x + model.attention(model.attention_norm(x), stream.pairs(), token_modalities=None)
    for name, at in (("text", slice(0, 2)), ("image", slice(2, 6))):
        own = Stream(
            model.mlp_norm(after[:, at]),
            jnp.asarray(VALID[:, at]),
            layout=((name, at.stop - at.start),),
        )
        y, alone = getattr(model.mlp, name)(own, None)
        np.testing.assert_allclose(out.x_BSD[:, at], after[:, at] + y, rtol=1e-9)
        assert aux.statistics[f"dropped {name}"][1] == alone.statistics[f"dropped {name}"][1]


def test_the_cost_is_that_of_the_slots_whatever_the_number_of_experts() -> None:
    """Model FLOPs, counted: tokens times capacity through one MLP, and the router's product."""
    shape = (4, 64, 8)

    def cost(count: int, **rule: Any) -> int:
        config = {"count": count, "router": {"name": "expert_choice", **rule}, "group_size": 128}
        declaration = Declaration(layers.experts(8, 16, config))
        p = {n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in declaration.specs.items()}
        x = jax.ShapeDtypeStruct(shape, "float32")
        router = 2 * 256 * 8 * count
        return (
            model_flops(
                lambda p, x: declaration.merge(p)(Stream(x, layout=(("text", 64),)), None)[0], p, x
            )
            - router
        )

    dense = 2 * 256 * 2 * 8 * 16
    assert cost(2) == cost(8) == cost(32) == dense
    assert cost(8, capacity=2.0) == 2 * dense


@pytest.mark.parametrize("config", [CHOICE, TOKENS], ids=["expert choice", "token choice"])
@pytest.mark.parametrize("mesh", [{"data": 1, "expert": 4}, {"data": 1, "fsdp": 2, "expert": 2}])
def test_on_a_mesh_it_is_what_it_is_on_one_device(
    config: dict[str, Any], mesh: dict[str, int]
) -> None:
    """Value and gradient in float64, parameters of experts cut along their axis."""
    losses = {"balance": 0.1, "importance": 0.1}
    declaration = trunk(experts={**config, "count": 4, "losses": losses})
    p = {n: jnp.asarray(v) for n, v in random(declaration).items()}
    x = jnp.asarray(np.random.default_rng(6).normal(size=(8, LENGTH, 8)))

    def value(p: Any, x: jax.Array) -> jax.Array:
        stream = Stream(x, layout=LAYOUT, mask=FULL)
        out, aux = declaration.merge(p)["trunk"](stream, jax.random.key(0))
        return jnp.square(out.x_BSD).mean() + aux.loss

    wanted = jax.jit(jax.value_and_grad(value))(p, x)
    # Half of the devices: with as few threads as devices, collectives that wait for each other can stand still.
    made = make_mesh(MeshConfig(**mesh), jax.devices()[:4])
    placed = {
        n: jax.device_put(p[n], named(s.axes, s.shape, made)) for n, s in declaration.specs.items()
    }
    with jax.set_mesh(made):
        found = jax.jit(jax.value_and_grad(value))(placed, x)
    cut = placed["trunk/groups/0/blocks/0/mlp/mlps/up/kernel"].sharding
    assert cut.shard_shape((2, 4, 8, HIDDEN))[1] == 4 // mesh["expert"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), wanted, found
    )


def test_it_is_not_written_token_by_token() -> None:
    declaration = trunk(experts=CHOICE)
    model = declaration.merge(random(declaration))["trunk"]
    with pytest.raises(UserError, match="A block with experts cannot take a stream token by token"):
        model.init_cache(Stream(jnp.zeros((1, 1, 8))), 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 40))
def test_groups_are_whole_rows_or_parts_of_a_row(rows: int, length: int, size: int) -> None:
    x = np.arange(rows * length).reshape(rows, length)
    found = np.asarray(grouped_rows(jnp.asarray(x), size))
    assert found.shape[1] <= size
    np.testing.assert_array_equal(found.reshape(-1), x.reshape(-1))
    assert found.shape[1] % length == 0 or length % found.shape[1] == 0


@pytest.mark.parametrize(
    "rows, length, size, groups, shape",
    [
        (32, 4, 64, 1, (2, 64)),
        (32, 4, 64, 8, (8, 16)),  # no group spans two of eight devices
        (32, 4, 16, 4, (8, 16)),  # as small as they are to be at most
        (4, 4, 64, 8, (4, 4)),  # fewer rows: each is a group
        (4, 64, 16, 8, (16, 16)),  # parts of rows
        (12, 4, 64, 5, (6, 8)),
    ],
)
def test_so_many_groups_at_least(
    rows: int, length: int, size: int, groups: int, shape: tuple[int, int]
) -> None:
    x = np.arange(rows * length).reshape(rows, length)
    found = np.asarray(grouped_rows(jnp.asarray(x), size, groups))
    np.testing.assert_array_equal(found, x.reshape(shape))


def test_groups_of_the_config_are_those_that_compete() -> None:
    """With a group for each row, a row's sums are what they are alone; together they are not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, WIDTH)).astype("f")
    moved = {}
    for groups in (1, 4):
        declaration = Declaration(layers.experts(WIDTH, HIDDEN, {"count": 2, "min_groups": groups}))
        p = {n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()}
        call = jax.jit(lambda x, d=declaration, p=p: d.merge(p)(Stream(x), None)[0])
        moved[groups] = float(np.abs(call(x)[:1] - call(x[:1])).max())
    assert moved[4] < 1e-5 < 1e-2 < moved[1], moved


@pytest.mark.parametrize(
    "config, said",
    [
        ({"count": 0}, "count is 0"),
        ({"count": 2, "min_groups": 0}, "groups is 0; it must be at least 1"),
        (
            {"count": 2, "router": {"name": "expert_choise"}},
            "no 'expert_choise' in mmjax/nn/routers. Did you mean",
        ),
        ({"count": 2, "losses": {"blance": 1.0}}, "losses names 'blance'. Did you mean 'balance'"),
        ({"count": 2, "groop": 3}, "groop"),
        ({"count": 2, "losses_over": "groups"}, "losses_over is 'groups'. Did you mean 'group'"),
        (
            {"count": 1, "losses": {"importance": 1.0}},
            "count is 1, and 'importance' balances experts",
        ),
        (
            {"count": 1, "global_entropy": {"text": 1.0}},
            "count is 1, and 'global_entropy' balances experts",
        ),
    ],
)
def test_mistakes(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        layers.experts(WIDTH, HIDDEN, config)

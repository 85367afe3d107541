"""Reach, against what each program plainly does and against numeric gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mmjax.core.errors import UserError
from mmjax.optim.reach import Reach, reach, reached

WIDTH = 4
Loss = Callable[..., Any]


def abstract(*names: str, shape: tuple[int, ...] = (WIDTH, WIDTH), dtype: Any = jnp.float32) -> Any:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name in names}


X = jax.ShapeDtypeStruct((3, WIDTH), jnp.float32)


@jax.custom_vjp
def kept(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return x @ w, whose rule gives `w` no gradient: reach cannot know that."""
    return x @ w


kept.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 0.0 * saved[1]))


def test_a_used_parameter_is_reached_and_an_unused_one_is_not() -> None:
    assert reached(lambda p, x: jnp.sum(x @ p["a"]), abstract("a", "b"), X) == {"a"}


def test_no_parameters() -> None:
    assert reach(lambda p, x: jnp.sum(x), {}, X) == Reach(frozenset(), frozenset())


def test_a_loss_without_any_parameter_reaches_none() -> None:
    assert reached(lambda p, x: jnp.sum(x), abstract("a"), X) == frozenset()


def test_stop_gradient_cuts() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(lax.stop_gradient(x @ p["frozen"]) @ p["open"])

    assert reached(loss, abstract("frozen", "open"), X) == {"open"}


def test_a_parameter_times_a_stopped_one_is_reached_and_the_stopped_one_is_not() -> None:
    def loss(p: Any) -> Any:
        return jnp.sum(p["a"] * lax.stop_gradient(p["b"]))

    assert reached(loss, abstract("a", "b")) == {"a"}


def test_a_parameter_whose_path_is_stopped_later_is_not_reached() -> None:
    def loss(p: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ p["early"]) @ p["middle"]
        return jnp.sum(lax.stop_gradient(hidden)) * jnp.sum(p["late"])

    assert reached(loss, abstract("early", "middle", "late"), X) == {"late"}


def test_integer_paths_do_not_reach() -> None:
    def loss(p: Any, x: Any) -> Any:
        choice = jnp.argmax(x @ p["router"], axis=-1)
        rounded = jnp.sum((x @ p["compared"]) > 0)
        return jnp.sum(p["table"][choice]) + rounded.astype(jnp.float32)

    assert reached(loss, abstract("router", "compared", "table"), X) == {"table"}


def test_auxiliary_outputs_do_not_reach() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(x @ p["a"]), {"watched": jnp.sum(x @ p["b"])}

    assert reached(loss, abstract("a", "b"), X, has_aux=True) == {"a"}


def test_a_print_does_not_reach() -> None:
    def loss(p: Any, x: Any) -> Any:
        jax.debug.print("{}", jnp.sum(p["watched"]))
        return jnp.sum(x @ p["a"])

    assert reached(loss, abstract("a", "watched"), X) == {"a"}


def test_through_scan_a_stacked_parameter_is_reached_and_its_stopped_neighbour_is_not() -> None:
    def loss(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w["w"]) + lax.stop_gradient(x @ w["frozen"]), jnp.sum(x @ w["seen"])

        out, _ = lax.scan(layer, x @ p["stem"], {k: p[k] for k in ("w", "frozen", "seen")})
        return jnp.sum(out)

    params = abstract("stem") | abstract("w", "frozen", "seen", shape=(5, WIDTH, WIDTH))
    assert reached(loss, params, X) == {"stem", "w"}


def test_a_second_carry_of_a_scan_that_meets_the_first_only_when_stopped() -> None:
    def loss(p: Any, x: Any) -> Any:
        def layer(carry: Any, _: None) -> Any:
            a, b = carry
            return (a @ p["a"] + lax.stop_gradient(b), b @ p["b"]), None

        (a, _), _ = lax.scan(layer, (x, x), None, length=3)
        return jnp.sum(a)

    assert reached(loss, abstract("a", "b"), X) == {"a"}


def test_a_carry_that_meets_the_loss_after_three_iterations() -> None:
    def loss(p: Any, x: Any) -> Any:
        def layer(carry: Any, _: None) -> Any:
            a, b, c, d = carry
            return (a + b, c, x @ p["w"], d @ p["unread"]), None

        return jnp.sum(lax.scan(layer, (x, x, x, x), None, length=4)[0][0])

    assert reached(loss, abstract("w", "unread"), X) == {"w"}


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable])
def test_through_remat_and_scan(policy: Any) -> None:
    def loss(p: Any, x: Any) -> Any:
        @lambda f: jax.checkpoint(f, policy=policy)
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w[0]) @ lax.stop_gradient(w[1]), None

        return jnp.sum(lax.scan(layer, x, (p["a"], p["b"]))[0])

    assert reached(loss, abstract("a", "b", shape=(2, WIDTH, WIDTH)), X) == {"a"}


def test_through_jit_outputs_are_told_apart() -> None:
    @jax.jit
    def pair(p: Any, x: Any) -> Any:
        return x @ p["a"], x @ p["b"]

    assert reached(lambda p, x: jnp.sum(pair(p, x)[1]), abstract("a", "b"), X) == {"b"}


def test_through_shard_map_a_collective_nobody_reads_does_not_reach() -> None:
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec(None, "data"), PartitionSpec("data", None)

    def local(x: Any, a: Any, b: Any) -> Any:
        return lax.psum(x @ a, "data"), lax.all_to_all(x @ b, "data", 1, 1, tiled=True)

    def loss(p: Any, x: Any) -> Any:
        specs: Any = {"in_specs": (split, whole, whole), "out_specs": (PartitionSpec(), split)}
        return jnp.sum(jax.shard_map(local, mesh=mesh, **specs)(x, p["a"], p["b"])[0])

    assert reached(loss, abstract("a", "b"), X) == {"a"}


def test_through_a_mutable_reference() -> None:
    def loss(p: Any, x: Any) -> Any:
        total = jax.new_ref(jnp.zeros(()))
        total[...] = jnp.sum(x @ p["a"])
        return total[...] + 0.0

    assert reached(loss, abstract("a", "b"), X) == {"a"}


def test_custom_jvp_is_exact() -> None:
    @jax.custom_jvp
    def blend(a: Any, b: Any) -> Any:
        return a * b

    @blend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return blend(*primals), tangents[0] * primals[1]

    def loss(p: Any, x: Any) -> Any:
        hidden = jax.nn.softmax(jax.nn.relu(x @ p["a"]))
        return jnp.sum(jax.nn.logsumexp(blend(hidden @ p["b"], x @ p["ignored"]), axis=-1))

    found = reach(loss, abstract("a", "b", "ignored"), X)
    assert found == Reach(frozenset({"a", "b"}), frozenset())


def test_custom_vjp_is_conservative_and_says_so() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(kept(x @ p["before"], p["inside"]) @ p["after"]) + jnp.sum(p["before"])

    found = reach(loss, abstract("before", "inside", "after", "unused"), X)
    assert found.names == {"before", "inside", "after"}
    assert found.conservative == {"inside"}  # `before` also has a way around


def test_custom_vjp_within_scan_remat_and_vmap() -> None:
    def loss(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jax.checkpoint(jax.vmap(kept, in_axes=(0, None)))(x, w), None

        return jnp.sum(lax.scan(layer, x @ p["stem"], p["w"])[0])

    found = reach(loss, abstract("stem") | abstract("w", shape=(2, WIDTH, WIDTH)), X)
    assert found == Reach(frozenset({"stem", "w"}), frozenset({"stem", "w"}))


def test_a_stopped_argument_of_a_custom_vjp_is_not_reached() -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(kept(x @ p["a"], lax.stop_gradient(p["b"])))

    assert reach(loss, abstract("a", "b"), X) == Reach(frozenset({"a"}), frozenset({"a"}))


def test_linear_call_is_conservative() -> None:
    from jax.custom_derivatives import linear_call

    def loss(p: Any) -> Any:
        return jnp.sum(linear_call(lambda r, t: r * t, lambda r, t: r * t, 2.0, p["a"]))

    assert reach(loss, abstract("a")) == Reach(frozenset({"a"}), frozenset({"a"}))


def test_every_branch_of_a_conditional_is_reached() -> None:
    def loss(p: Any, x: Any) -> Any:
        branches = (lambda: x @ p["a"], lambda: x @ p["b"], lambda: lax.stop_gradient(x @ p["c"]))
        return jnp.sum(lax.switch(jnp.argmax(x[0]), branches))

    assert reached(loss, abstract("a", "b", "c", "d"), X) == {"a", "b"}


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_leaves_chosen_in_python(modality: str) -> None:
    """Parameters by modality are leaves of their own, chosen statically: only the one is reached"""

    def loss(p: Any, x: Any) -> Any:
        return jnp.sum(x @ p[f"stem/{modality}"] @ p["trunk"])

    params = abstract("stem/image", "stem/audio", "trunk")
    assert reached(loss, params, X) == {f"stem/{modality}", "trunk"}


def test_a_static_layout_of_segments_reaches_the_modalities_in_it() -> None:
    def loss(p: Any, x: Any, layout: tuple[tuple[str, int], ...]) -> Any:
        parts, start = [], 0
        for modality, length in layout:
            parts.append(x[start : start + length] @ p[modality])
            start += length
        return jnp.sum(jnp.concatenate(parts) @ p["shared"])

    layout = (("text", 2), ("image", 1))
    params = abstract("text", "image", "audio", "shared")
    found = reached(lambda p, x: loss(p, x, layout), params, X)
    assert found == {"text", "image", "shared"}


def test_a_product_with_zero_is_conservatively_reached() -> None:
    """Reach reads structure, not values: these gradients are zero for all inputs."""

    def loss(p: Any, x: Any) -> Any:
        cancelled = jnp.sum(p["cancelled"]) - jnp.sum(p["cancelled"])
        masked = jnp.sum(jnp.where(jnp.zeros((WIDTH, WIDTH), bool), p["masked"], 0.0))
        return 0.0 * jnp.sum(x @ p["zeroed"]) + cancelled + masked

    assert reached(loss, abstract("zeroed", "cancelled", "masked", "unused"), X) == {
        "zeroed",
        "cancelled",
        "masked",
    }


def test_a_slice_reaches_the_whole_stack() -> None:
    stack = abstract("stack", shape=(3, WIDTH, WIDTH))
    assert reached(lambda p, x: jnp.sum(x @ p["stack"][1]), stack, X) == {"stack"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_floating_types(dtype: str) -> None:
    def loss(p: Any, x: Any) -> Any:
        return jnp.sum((x.astype(p["a"].dtype) @ p["a"]).astype(jnp.float32))

    with jax.enable_x64(True):
        assert reached(loss, abstract("a", "b", dtype=jnp.dtype(dtype)), X) == {"a"}


def test_integer_parameters_are_never_reached() -> None:
    params = abstract("a") | {"steps": jax.ShapeDtypeStruct((), jnp.int32)}
    assert reached(lambda p, x: jnp.sum(x @ p["a"]) * p["steps"], params, X) == {"a"}


def test_integers_keys_and_trees_among_the_arguments() -> None:
    def loss(p: Any, batch: Any, key: Any) -> Any:
        noise = jax.random.normal(key, (3, WIDTH))
        keep = jax.random.bernoulli(key, 0.5, (3, WIDTH))
        hidden = p["table"][batch["ids"]] + noise @ p["noise"]
        return jnp.sum(jnp.where(keep, hidden, 0.0)) / (1 + jnp.sum(batch["ids"]))

    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {"ids": jax.ShapeDtypeStruct((3,), jnp.int32), "absent": None}
    params = abstract("table", "noise", "unused")
    assert reached(loss, params, batch, key) == {"table", "noise"}
    concrete = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), (params, batch))
    assert reached(loss, *concrete, jax.random.key(0)) == {"table", "noise"}


def test_nothing_is_computed() -> None:
    """A terabyte of parameters."""
    huge = {"w": jax.ShapeDtypeStruct((500_000, 500_000), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, 500_000), jnp.float32)
    assert reached(lambda p, x: jnp.mean(x @ p["w"]), huge, x) == {"w"}


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(3, 4\) and type float32.*scalar"):
        reach(lambda p, x: x @ p["a"], abstract("a"), X)
    with pytest.raises(UserError, match="type int32"):
        reach(lambda p, x: jnp.argmax(x @ p["a"]), abstract("a"), X)
    with pytest.raises(UserError, match="has_aux=True"):
        reach(lambda p, x: (jnp.sum(x @ p["a"]), {}), abstract("a"), X)


def test_a_parameter_that_is_no_array_is_refused() -> None:
    with pytest.raises(UserError, match="'b/name' is str"):
        reach(lambda p, x: jnp.sum(x @ p["a"]), abstract("a") | {"b": {"name": "x"}}, X)


# Ways of using one parameter in a residual block, and whether its gradient is generically nonzero.
def _scanned(x: Any, w: Any) -> Any:
    return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]


WAYS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "dense": (lambda x, w: jnp.tanh(x @ w), True),
    "unused": (lambda x, w: x, False),
    "stopped": (lambda x, w: lax.stop_gradient(x @ w), False),
    "argmax": (lambda x, w: jax.nn.one_hot(jnp.argmax(x @ w, axis=-1), WIDTH), False),
    "scan": (_scanned, True),
    "remat": (jax.checkpoint(lambda x, w: jnp.sin(x @ w)), True),
    "scan of stopped": (lambda x, w: _scanned(x, lax.stop_gradient(w)), False),
    "gate": (lambda x, w: x * jax.nn.sigmoid(jnp.sum(w)), True),
    "gated by stopped": (lambda x, w: x * lax.stop_gradient(jnp.sum(w)), False),
    "jit": (jax.jit(lambda x, w: jax.nn.gelu(x @ w)), True),
    "softmax": (lambda x, w: jax.nn.softmax(x @ w), True),
    "cond": (lambda x, w: lax.cond(x[0, 0] ** 2 >= 0, lambda: x @ w, lambda: x), True),
    "vmap": (lambda x, w: jax.vmap(lambda row: row @ w)(x), True),
}


@given(
    ways=st.lists(st.sampled_from(sorted(WAYS)), min_size=1, max_size=5),
    stop_after=st.none() | st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20, deadline=None)
def test_reach_is_where_the_numeric_gradient_is_not_zero(
    ways: list[str], stop_after: int | None, seed: int
) -> None:
    """A chain of blocks, perhaps cut once; at random values no gradient vanishes by accident."""
    names = [f"p{i}" for i in range(len(ways))]

    def loss(params: Any, x: Any) -> Any:
        for i, (name, way) in enumerate(zip(names, ways, strict=True)):
            x = x + WAYS[way][0](x, params[name])
            if i == stop_after:
                x = lax.stop_gradient(x)
        return jnp.mean(jnp.sin(3.0 * x))

    rng = np.random.default_rng(seed)
    params = {n: jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 2, jnp.float32) for n in names}
    gradient = jax.jit(jax.grad(loss))(params, jnp.asarray(rng.normal(size=X.shape), jnp.float32))
    nonzero = {n for n, g in gradient.items() if np.any(np.asarray(g) != 0)}
    cut = -1 if stop_after is None or stop_after >= len(ways) else stop_after
    expected = {n for i, n in enumerate(names) if i > cut and WAYS[ways[i]][1]}
    assert reached(loss, params, X) == expected == nonzero

"""Parameters: names, initial values, canonical form and digest."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.nn import initializers

from mmjax.core.parameters import (
    Declaration,
    declare,
    digest,
    from_canonical,
    stack_layers,
    to_canonical,
)
from mmjax.nn.dense import Dense, LayerNorm

# Of `arrays()` below. Another value here means that digests printed by other versions are void.
GOLDEN = "7d4fd1143b4b133ba8b98b48c54c7aac60e8e46b166b332abc082017608638f6"


class Leaf(nnx.Module):
    """Two parameters: one that keeps its dtype, one that does not."""

    def __init__(self, width: int = 3):
        self.weight = declare((2, width), ("embed", None), initializers.uniform(1.0))
        self.shift = declare((width,), (None,), initializers.uniform(1.0), keep_dtype=True)

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        return self.weight[...], self.shift[...]


def stacked(first: int = 0, repeat: int = 3, stride: int = 1) -> nnx.Module:
    """Return a module named as a trunk names its own, with one stacked block per place in the pattern."""
    blocks = [Leaf() for _ in range(stride)]
    for offset, block in enumerate(blocks):
        stack_layers(block, first + offset, stride, repeat)
    return nnx.Dict({"groups": nnx.List([nnx.Dict({"blocks": nnx.List(blocks)})])})


def declared(**parts: Any) -> Declaration:
    return Declaration(nnx.Dict(parts))


# --- declaring ---------------------------------------------------------------------------------


def test_specs_say_what_was_declared() -> None:
    spec = declared(leaf=Leaf()).specs["leaf/weight"]
    assert spec.name == "leaf/weight" and spec.canonical == ["leaf/weight"]
    assert spec.shape == (2, 3) and spec.axes == ("embed", None)
    assert spec.decay and not spec.keep_dtype and spec.stack is None
    shift = declared(leaf=Leaf()).specs["leaf/shift"]
    assert shift.keep_dtype and not shift.decay
    assert declare((2, 2), (None, None), initializers.zeros, decay=False).get_metadata()["decay"] is False  # fmt: skip
    assert declare((2,), (None,), initializers.zeros, decay=True).get_metadata()["decay"] is True


def test_nothing_is_allocated_by_declaring() -> None:
    huge = Dense(10**9, 10**9, ("embed", "mlp"))
    assert declared(it=huge).specs["it/kernel"].shape == (10**9, 10**9)


def test_axes_match_the_shape() -> None:
    with pytest.raises(AssertionError):
        declare((2, 3), ("embed",), initializers.zeros)


def test_stacked_specs_have_a_name_per_layer_and_a_leading_axis() -> None:
    spec = declared(trunk=stacked(first=4, repeat=3, stride=2)).specs
    second = spec["trunk/groups/0/blocks/1/weight"]
    assert second.shape == (3, 2, 3) and second.axes == ("layers", "embed", None)
    assert second.canonical == [f"trunk/layers/{i:03d}/weight" for i in (5, 7, 9)]
    assert second.decay, "stacking a vector must not make a matrix of it"
    assert not spec["trunk/groups/0/blocks/1/shift"].decay


def test_two_parameters_of_one_canonical_name() -> None:
    one: Any = stacked(repeat=2)
    two: Any = stacked(first=1, repeat=2)  # the second layer is there already
    for module in (one, two):
        declared(trunk=module)
    both: Any = {"groups": nnx.List([one["groups"][0], two["groups"][0]])}
    with pytest.raises(AssertionError, match="share a canonical name"):
        declared(trunk=nnx.Dict(both))


# --- merging -----------------------------------------------------------------------------------


def test_merge_gives_the_module_its_arrays_and_casts_what_may_be() -> None:
    declaration = declared(leaf=Leaf())
    p = {n: jnp.full(s.shape, i, jnp.float32) for i, (n, s) in enumerate(declaration.specs.items())}
    weight, shift = declaration.merge(p)["leaf"]()
    np.testing.assert_array_equal(weight, p["leaf/weight"])
    np.testing.assert_array_equal(shift, p["leaf/shift"])
    assert weight.dtype == shift.dtype == jnp.float32
    weight, shift = declaration.merge(p, jnp.bfloat16)["leaf"]()
    assert weight.dtype == jnp.bfloat16 and shift.dtype == jnp.float32
    assert p["leaf/weight"].dtype == jnp.float32


def test_merge_is_traced_and_pure() -> None:
    declaration = declared(leaf=Leaf())
    twice = jax.jit(lambda p: 2 * declaration.merge(p)["leaf"]()[0])
    for value in (1.0, 3.0):
        p = {n: jnp.full(s.shape, value) for n, s in declaration.specs.items()}
        np.testing.assert_array_equal(twice(p), np.full((2, 3), 2 * value))


def test_merge_without_a_parameter() -> None:
    with pytest.raises(KeyError, match="leaf/weight"):
        declared(leaf=Leaf()).merge({"leaf/shift": jnp.zeros(3)})


# --- initial values ----------------------------------------------------------------------------


def bits(declaration: Declaration, seed: int = 0) -> dict[str, np.ndarray]:
    values = jax.jit(declaration.initialise, static_argnums=0)(seed)
    return {n: np.asarray(v) for n, v in to_canonical(declaration.specs, values).items()}


def test_initial_values_depend_on_the_seed_and_the_name_only() -> None:
    alone = bits(declared(one=Leaf(), trunk=stacked()))
    more = bits(declared(aaa=Leaf(), one=Leaf(), two=Leaf(5), trunk=stacked(repeat=5)))
    for name, value in alone.items():
        np.testing.assert_array_equal(more[name], value, err_msg=name)
    assert set(more) - set(alone) == {
        *(f"{n}/{p}" for n in ("aaa", "two") for p in ("weight", "shift")),
        *(f"trunk/layers/{i}/{p}" for i in ("003", "004") for p in ("weight", "shift")),
    }
    values = [v.tobytes() for v in more.values()]
    assert len(set(values)) == len(values), "every name draws its own"


def test_another_seed_moves_every_drawn_value() -> None:
    declaration = declared(one=Leaf(), trunk=stacked())
    one, two = bits(declaration), bits(declaration, 1)
    assert all(np.all(one[n] != two[n]) for n in one)


def test_initial_values_come_in_the_parameter_dtype() -> None:
    declaration = declared(one=Leaf(), norm=LayerNorm(3))
    shapes = jax.eval_shape(lambda: declaration.initialise(0, jnp.bfloat16))
    assert {v.dtype for v in shapes.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {n: v.shape for n, v in shapes.items()} == {
        n: s.shape for n, s in declaration.specs.items()
    }


# --- canonical form ----------------------------------------------------------------------------


def test_canonical_form_goes_both_ways() -> None:
    specs = declared(one=Leaf(), trunk=stacked(repeat=2, stride=2)).specs
    rng = np.random.default_rng(0)
    tree = {n: rng.normal(size=s.shape).astype("f") for n, s in specs.items()}
    canonical = to_canonical(specs, tree)
    assert set(canonical) == {c for s in specs.values() for c in s.canonical}
    place = "trunk/groups/0/blocks/1/weight"
    for repeat, layer in enumerate(("001", "003")):
        np.testing.assert_array_equal(
            canonical[f"trunk/layers/{layer}/weight"], tree[place][repeat]
        )
    back = from_canonical(specs, canonical)
    assert back.keys() == tree.keys()
    for name, value in tree.items():
        np.testing.assert_array_equal(back[name], value)
    assert set(from_canonical(specs, canonical, [place])) == {place}


def test_a_state_of_several_leaves_is_taken_apart_leaf_by_leaf() -> None:
    specs = declared(one=Leaf(), trunk=stacked(repeat=2)).specs
    tree = {n: {"mean": np.ones(s.shape), "count": np.arange(s.shape[0])} for n, s in specs.items()}
    canonical = to_canonical(specs, tree)
    assert canonical["trunk/layers/001/weight"]["count"] == 1
    assert canonical["trunk/layers/001/weight"]["mean"].shape == (2, 3)
    back = from_canonical(specs, canonical)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


# --- digest ------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    return {
        "b/scale": np.array(2.5, np.float32),
        "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "c/bias": np.array([0.0, -1.0], jnp.bfloat16),
    }


def test_digest_of_fixed_arrays() -> None:
    sha = hashlib.sha256()
    for name, dtype, shape in (
        ("a/kernel", "float32", "(2, 3)"), ("b/scale", "float32", "()"), ("c/bias", "bfloat16", "(2,)"),
    ):  # fmt: skip
        sha.update(f"{name} {dtype} {shape}\n".encode() + arrays()[name].tobytes())
    assert digest(arrays()) == sha.hexdigest()
    assert digest(arrays()) == GOLDEN
    assert digest({}) == hashlib.sha256().hexdigest()


@given(order=st.permutations(sorted(arrays())))
@settings(max_examples=6, deadline=None)
def test_digest_does_not_depend_on_the_order_or_the_holder(order: list[str]) -> None:
    assert digest({n: arrays()[n] for n in order}) == GOLDEN


def test_digest_does_not_depend_on_the_layout_in_memory() -> None:
    other = arrays()
    other["a/kernel"] = np.asfortranarray(other["a/kernel"])
    assert digest(other) == GOLDEN
    assert digest({n: np.asarray(jnp.asarray(a)) for n, a in arrays().items()}) == GOLDEN


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_digest_changes_with_any_bit(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(arrays())))
    raw = bytearray(arrays()[name].tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    old = arrays()[name]
    changed = np.frombuffer(bytes(raw), old.dtype).reshape(old.shape)
    assert digest({**arrays(), name: changed}) != GOLDEN


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {**a, "d": a["b/scale"]},
        lambda a: {n: v for n, v in a.items() if n != "b/scale"},
        lambda a: {n.replace("a/", "z/"): v for n, v in a.items()},
        lambda a: {**a, "a/kernel": a["a/kernel"].reshape(3, 2)},
        lambda a: {**a, "b/scale": a["b/scale"].reshape(1)},
        lambda a: {**a, "a/kernel": a["a/kernel"].view(np.int32)},
        lambda a: {**a, "a/kernel": a["a/kernel"].astype(np.float64)},
    ],
    ids=["more", "less", "name", "shape", "scalar", "dtype", "precision"],
)
def test_digest_changes_with_name_shape_and_dtype(change: Any) -> None:
    assert digest(change(arrays())) != GOLDEN

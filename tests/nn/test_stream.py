"""Streams: taking, joining and pooling tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmjax.nn.masks import Causal, Same, code
from mmjax.nn.stream import Stream, concatenate, mean_pool, no_aux


def tokens(rows: int = 2, length: int = 3, width: int = 2, offset: float = 0.0) -> jax.Array:
    return jnp.arange(rows * length * width, dtype=jnp.float32).reshape(rows, length, -1) + offset


def test_mask_is_all_true_unless_given() -> None:
    np.testing.assert_array_equal(Stream(tokens()).mask_BS(), np.ones((2, 3), bool))
    valid = jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(Stream(tokens(), valid).mask_BS(), valid)


def test_take_gives_each_row_its_own_tokens_in_order() -> None:
    valid = jnp.array([[True, False, True], [False, True, True]])
    shared = jnp.array([[0.0, 0.25, 0.5]])  # one row of coordinates for all examples
    own = jnp.array([[0.0, 0.1, 0.2], [0.3, 0.4, 0.5]])
    stream = Stream(tokens(), valid, {"x": shared, "y": own}, (("image", 3),))
    index = np.array([[2, 0], [1, 1]])
    taken = stream.take(jnp.asarray(index))
    x = np.asarray(tokens())
    for b, row in enumerate(index):
        for k, s in enumerate(row):
            np.testing.assert_array_equal(taken.x_BSD[b, k], x[b, s])
            assert taken.valid_BS is not None and taken.valid_BS[b, k] == valid[b, s]
            assert taken.coordinates["x"][b, k] == shared[0, s]
            assert taken.coordinates["y"][b, k] == own[b, s]
    assert taken.layout == (("image", 2),)


def test_take_keeps_no_mask_as_none() -> None:
    stream = Stream(tokens(), layout=(("image", 3),))
    assert stream.take(jnp.zeros((2, 1), jnp.int32)).valid_BS is None


def test_concatenate_joins_tokens_masks_and_layouts_in_order() -> None:
    valid = jnp.array([[True, False], [False, True]])
    image = Stream(tokens(2, 3), layout=(("image", 3),))
    text = Stream(tokens(2, 2, offset=100), valid, layout=(("text", 2),))
    both = concatenate([image, text])
    np.testing.assert_array_equal(both.x_BSD[:, :3], image.x_BSD)
    np.testing.assert_array_equal(both.x_BSD[:, 3:], text.x_BSD)
    expected = [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    np.testing.assert_array_equal(both.mask_BS(), np.array(expected, bool))
    assert both.layout == (("image", 3), ("text", 2))


def test_concatenate_needs_no_mask_where_none_has_one() -> None:
    streams = [Stream(tokens(), layout=(("image", 3),)), Stream(tokens(), layout=(("depth", 3),))]
    assert concatenate(streams).valid_BS is None
    assert concatenate(streams[:1]) is streams[0]


@given(
    valid=hnp.arrays(bool, (3, 4)),
    x=hnp.arrays(np.float32, (3, 4, 2), elements=st.floats(-10, 10, width=32)),
)
@settings(max_examples=25, deadline=None)
def test_mean_pool_is_the_mean_of_valid_tokens_or_zero(valid: np.ndarray, x: np.ndarray) -> None:
    pooled = mean_pool(Stream(jnp.asarray(x), jnp.asarray(valid)))
    for row, exists, got in zip(x, valid, pooled, strict=True):
        expected = row[exists].mean(axis=0) if exists.any() else np.zeros(2)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        mean_pool(Stream(jnp.asarray(x))), x.mean(axis=1), rtol=1e-5, atol=1e-5
    )


def test_mean_pool_of_nothing_has_a_finite_gradient() -> None:
    none = jnp.zeros((2, 3), bool)
    gradient = jax.grad(lambda x: mean_pool(Stream(x, none)).sum())(tokens())
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 2)))


def test_layout_is_static_and_arrays_are_traced() -> None:
    stream = Stream(tokens(), layout=(("image", 3),))
    leaves, tree = jax.tree.flatten(stream)
    assert len(leaves) == 1
    assert jax.tree.unflatten(tree, leaves).layout == (("image", 3),)
    assert jax.jit(lambda s: s)(stream).layout == (("image", 3),)


def test_no_aux_is_zero() -> None:
    aux = no_aux()
    assert aux.loss.dtype == jnp.float32 and aux.loss.shape == () and float(aux.loss) == 0
    assert aux.statistics == {} and aux.proposals == {}


def test_a_masks_attributes_are_those_of_the_layout_and_its_own() -> None:
    image = Stream(tokens(2, 3), layout=(("image", 3),))
    text = Stream(tokens(2, 2), jnp.array([[True, False], [True, True]]), layout=(("text", 2),))
    pairs = concatenate([image, text]).pairs()
    assert pairs.queries is pairs.keys and pairs.queries is not None
    found = {name: np.asarray(a).tolist() for name, a in pairs.queries.items()}
    names = [[code("image")] * 3 + [code("text")] * 2]
    assert found == {
        "index": [[0, 1, 2, 3, 4]],
        "position": [[0, 1, 2, 3, 4]],
        "segment": [[0, 0, 0, 1, 1]],
        "modality": names,
    }
    assert all(
        isinstance(a, np.ndarray) for a in pairs.queries.values()
    )  # known before compilation
    np.testing.assert_array_equal(pairs.valid_BT, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def test_attributes_are_taken_and_joined_with_their_tokens() -> None:
    item = jnp.array([[0, 0, 1]])
    one = Stream(tokens(), layout=(("text", 3),), attributes={"item": item}, mask=Same("item"))
    taken = one.take(jnp.array([[2, 0], [1, 1]]))
    np.testing.assert_array_equal(taken.attributes["item"], [[1, 0], [0, 0]])
    both = concatenate([one, taken])
    np.testing.assert_array_equal(both.attributes["item"], [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
    assert both.mask == taken.mask == Same("item")
    assert both.pairs().queries["item"] is both.attributes["item"]  # type: ignore[index]


@pytest.mark.parametrize("change", [{"attributes": {}}, {"mask": Causal()}])
def test_streams_of_other_attributes_or_masks_are_not_joined(change: dict[str, Any]) -> None:
    one = Stream(tokens(), attributes={"item": jnp.zeros((1, 3), int)})
    with pytest.raises(ValueError, match="different attributes or masks"):
        concatenate([one, replace(one, **change)])

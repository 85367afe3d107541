"""Masks against loops over pairs of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.nn.masks import (
    FULL,
    And,
    Causal,
    KeyIs,
    Mask,
    Or,
    QueryIs,
    Same,
    check,
    code,
    factors,
    is_static,
)

NAMES = ("position", "item", "span")
Token = dict[str, int]
Rule = Callable[[Token, Token], bool]

# Each mask beside the sentence of its docstring, as plain Python on two tokens.
LEAVES: list[tuple[Mask, Rule]] = [
    (FULL, lambda q, k: True),
    (Causal(), lambda q, k: k["position"] <= q["position"]),
    (Same("item"), lambda q, k: q["item"] == k["item"]),
    (Same("span", beside=0), lambda q, k: q["span"] == k["span"] and q["span"] != 0),
    (QueryIs("span", 1), lambda q, k: q["span"] == 1),
    (KeyIs("span", 1), lambda q, k: k["span"] == 1),
]


def _both(two: tuple[Any, Any]) -> tuple[Mask, Rule]:
    (m, f), (n, g) = two
    return m & n, lambda q, k: f(q, k) and g(q, k)


def _either(two: tuple[Any, Any]) -> tuple[Mask, Rule]:
    (m, f), (n, g) = two
    return m | n, lambda q, k: f(q, k) or g(q, k)


rules = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.tuples(inner, inner).map(_both) | st.tuples(inner, inner).map(_either),
    max_leaves=5,
)


def attributes(seed: int, rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 3, (rows, length)) for name in NAMES}


def token(of: dict[str, np.ndarray], row: int, place: int) -> Token:
    return {name: int(values[row, place]) for name, values in of.items()}


@settings(deadline=None, max_examples=60)
@given(rules, st.integers(0, 2**16), st.booleans())
def test_a_mask_is_what_it_says_of_every_pair(
    rule: tuple[Mask, Rule], seed: int, static: bool
) -> None:
    mask, says = rule
    queries, keys = attributes(seed, 2, 3), attributes(seed + 1, 2, 4)
    dynamic: Any = [
        {n: x if static else jnp.asarray(x) for n, x in of.items()} for of in (queries, keys)
    ]
    allowed = mask.allows(*dynamic)
    assert isinstance(allowed, np.ndarray) or not static
    found = np.broadcast_to(allowed, (2, 3, 4))
    expected = [
        [[says(token(queries, b, s), token(keys, b, t)) for t in range(4)] for s in range(3)]
        for b in range(2)
    ]
    np.testing.assert_array_equal(found, expected)
    # So is each of its factors, and together they are the mask.
    parts = [np.broadcast_to(f.allows(*dynamic), found.shape) for f in factors(mask)]
    np.testing.assert_array_equal(found, np.logical_and.reduce([np.ones_like(found), *parts]))


def test_full_is_neutral_for_and_and_swallows_or() -> None:
    assert Causal() & FULL == FULL & Causal() == Causal()
    assert Causal() | FULL == FULL | Causal() == FULL
    assert factors(FULL) == []
    assert factors(Causal() & Same("item")) == [Causal(), Same("item")]
    assert isinstance(Causal() & Same("item"), And) and isinstance(Causal() | Same("item"), Or)


def test_names_are_compared_by_their_codes() -> None:
    of = {"modality": np.array([[code("text"), code("image"), code("fusion")]])}
    np.testing.assert_array_equal(QueryIs("modality", "fusion").allows(of, of)[0, :, 0], [0, 0, 1])
    assert code(7) == 7 and code("text") != code("image") and 0 <= code("text") < 2**31


def test_a_mask_is_static_where_all_it_reads_is() -> None:
    known, unknown = np.zeros((1, 2), int), jnp.zeros((1, 2), int)
    of = {"position": known, "item": unknown}
    assert is_static(Causal(), of, of)
    assert not is_static(Causal() & Same("item"), of, of)


def test_an_attribute_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="reads attribute 'item' of the tokens.*'items'"):
        check(Same("item"), {"items": 0})

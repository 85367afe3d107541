"""Tokens that choose their experts, against the published rule in plain loops."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import Weights, check_against_loops, softmax

from mmjax.core.errors import UserError
from mmjax.nn.routers.token_choice import TokenChoice

pytestmark = pytest.mark.usefixtures("x64")


def token_choice(router: TokenChoice, logits: np.ndarray, valid: np.ndarray) -> Weights:
    """Compute as Riquelme et al. (2021), algorithms 1 and 2, one group: k-th choices of all before those after."""
    tokens, experts = logits.shape
    scores = softmax(logits)
    count = min(tokens, math.ceil(router.capacity * router.top_k * tokens / experts))
    order = [t for t in range(tokens) if valid[t]]
    if router.batch_priority:
        order.sort(key=lambda t: (-scores[t].max(), t))
    taken, weights = [0] * experts, np.zeros((tokens, experts))
    for k in range(router.top_k):
        for t in order:
            e = sorted(range(experts), key=lambda e: (-scores[t, e], e))[k]
            if taken[e] < count:
                weights[t, e] = scores[t, e]
                taken[e] += 1
    return weights


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize(
    "router",
    [
        TokenChoice(),
        TokenChoice(top_k=2, capacity=0.5),
        TokenChoice(top_k=2, capacity=0.6, batch_priority=True),
        TokenChoice(top_k=2, capacity=100.0),
    ],
    ids=str,
)
def test_against_loops(router: TokenChoice, data: st.DataObject) -> None:
    check_against_loops(router, token_choice, data)


@pytest.mark.parametrize(
    ("capacity", "top", "slots"), [(1.0, 1, 3), (1.0, 2, 6), (0.3, 1, 1), (9.0, 2, 12)]
)
def test_slots_of_12_tokens_and_4_experts(capacity: float, top: int, slots: int) -> None:
    """The capacity's share of all choices, rounded up, and at most all tokens."""
    assert TokenChoice(capacity=capacity, top_k=top).slots(12, 4) == slots


def test_a_token_meets_its_choices() -> None:
    assert (
        TokenChoice(top_k=2).experts_per_token(8),
        TokenChoice(top_k=9).experts_per_token(8),
    ) == (2, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenChoice(top_k=0), "top_k is 0"),
        (lambda: TokenChoice(noise=-1.0), "noise is -1.0"),
        (lambda: TokenChoice(capacity=0.0), "capacity is 0.0"),
        (
            lambda: TokenChoice(top_k=4).route(jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool)),
            "top_k is 4, of 3 experts",
        ),
    ],
)
def test_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

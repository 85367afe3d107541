"""Experts that choose their tokens, against the published rule in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import Weights, check_against_loops, softmax

from mmjax.core.errors import UserError
from mmjax.nn.routers.expert_choice import ExpertChoice

pytestmark = pytest.mark.usefixtures("x64")


def expert_choice(router: ExpertChoice, logits: np.ndarray, valid: np.ndarray) -> Weights:
    """Compute as Zhou et al. (2022), one group: each expert ranks the tokens and takes the first of them."""
    tokens, experts = logits.shape
    scores = softmax(logits) if router.score == "softmax" else 1 / (1 + np.exp(-logits))
    count = min(tokens, max(1, round(router.capacity * tokens / experts)))
    weights = np.zeros((tokens, experts))
    for e in range(experts):
        ranked = sorted((t for t in range(tokens) if valid[t]), key=lambda t: (-scores[t, e], t))
        for t in ranked[:count]:
            weights[t, e] = scores[t, e]
    return weights


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize(
    "router",
    [ExpertChoice(), ExpertChoice(capacity=2.5), ExpertChoice(score="sigmoid", capacity=0.5)],
    ids=str,
)
def test_against_loops(router: ExpertChoice, data: st.DataObject) -> None:
    check_against_loops(router, expert_choice, data)


@pytest.mark.parametrize(("capacity", "slots"), [(1.0, 3), (2.0, 6), (0.01, 1), (100.0, 12)])
def test_slots_of_12_tokens_and_4_experts(capacity: float, slots: int) -> None:
    """The capacity's share of the tokens, at least one and at most all."""
    assert ExpertChoice(capacity=capacity).slots(12, 4) == slots


def test_a_token_meets_as_many_experts_as_the_capacity_says() -> None:
    assert (
        ExpertChoice(capacity=2.0).experts_per_token(8),
        ExpertChoice(capacity=9.0).experts_per_token(8),
    ) == (2.0, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertChoice(capacity=0.0), "capacity is 0.0"),
        (lambda: ExpertChoice(score="sigmod"), "score is 'sigmod'. Did you mean 'sigmoid'"),
    ],
)
def test_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

"""Check what all routers share: slots, gates, and the gradient through them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing import ROWS, softmax

from mmjax.core.errors import UserError
from mmjax.nn.routers.base import Router, Slots, widened
from mmjax.nn.routers.expert_choice import ExpertChoice
from mmjax.nn.routers.soft import Soft
from mmjax.nn.routers.token_choice import TokenChoice

pytestmark = pytest.mark.usefixtures("x64")

ROUTERS: dict[str, Router] = {
    "expert choice": ExpertChoice(),
    "expert choice, more room": ExpertChoice(capacity=2.5),
    "expert choice, sigmoid": ExpertChoice(score="sigmoid", capacity=0.5),
    "first choice": TokenChoice(),
    "two choices": TokenChoice(top_k=2, capacity=0.5),
    "two choices by priority": TokenChoice(top_k=2, capacity=0.6, batch_priority=True),
    "room for all": TokenChoice(top_k=2, capacity=100.0),
}


def test_scores_are_equal_or_far_apart() -> None:
    """Of the rows from which `check_against_loops` draws: how a tie is rounded would be chance otherwise."""
    scores = softmax(np.array(ROWS))
    for column in (*scores.T, scores.max(axis=1)):
        assert np.diff(np.sort(column)).min() > 1e-3


@pytest.mark.parametrize("name", ROUTERS)
def test_no_expert_takes_more_than_its_slots_and_the_count_is_as_said(name: str) -> None:
    router = ROUTERS[name]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)))
    slots = router.route(logits, jnp.ones((2, 12), bool))
    assert slots.index_GEC.shape == slots.gate_GEC.shape == (2, 4, router.slots(12, 4))
    assert int(slots.index_GEC.max()) < 12 and float(slots.gate_GEC.min()) >= 0


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_pass_through_the_gates(name: str) -> None:
    """Of the gates by the logits, against finite differences where no choice changes."""
    router = ROUTERS[name]
    rng = np.random.default_rng(1)
    logits, probe = rng.normal(size=(1, 7, 3)), rng.normal(size=(7, 3))

    def value(logits: jax.Array) -> jax.Array:
        slots = router.route(logits, jnp.ones((1, 7), bool))
        weight_EC = jnp.asarray(probe).T[jnp.arange(3)[:, None], slots.index_GEC[0]]
        return (slots.gate_GEC[0] * weight_EC).sum()

    gradient = np.asarray(jax.grad(value)(jnp.asarray(logits)))
    for at in [(0, 0, 0), (0, 3, 2), (0, 6, 1)]:
        step = np.zeros_like(logits)
        step[at] = 1e-5
        numeric = (value(jnp.asarray(logits + step)) - value(jnp.asarray(logits - step))) / 2e-5
        np.testing.assert_allclose(gradient[at], numeric, atol=1e-8)


def test_slots_gather_weigh_and_add_up_their_tokens() -> None:
    """One group of 3 tokens, 2 experts of 2 slots; token 0 comes twice, and the last slot is empty."""
    slots = Slots(jnp.asarray([[[0, 2], [0, 0]]]), jnp.asarray([[[0.5, 2.0], [3.0, 0.0]]]))
    x = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    np.testing.assert_array_equal(slots.gather(x)[0, :, 0], [[1, 10], [1, 10]])
    np.testing.assert_array_equal(slots.gather(x)[0, 0, 1], [3, 30])
    y = jnp.asarray([[[[1.0], [2.0]], [[4.0], [99.0]]]])
    np.testing.assert_array_equal(slots.combine(y, 3)[0], [[0.5 * 1 + 3 * 4], [0], [2 * 2]])
    np.testing.assert_array_equal(slots.parts(3)[0], [[1, 1], [0, 0], [1, 0]])


def test_scores_are_computed_in_float32_or_wider() -> None:
    for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        assert widened(jnp.zeros(2, dtype)).dtype == wide
        assert TokenChoice().scores(jnp.zeros((1, 2, 3), dtype)).dtype == wide


def test_only_experts_that_choose_see_all_tokens_and_only_soft_ones_have_no_losses() -> None:
    """Generation and the auxiliary losses read these."""
    assert [r.sees_all for r in (ExpertChoice(), TokenChoice(), Soft())] == [True, False, False]
    assert [r.has_losses for r in (ExpertChoice(), TokenChoice(), Soft())] == [True, True, False]


@pytest.mark.parametrize("router", [ExpertChoice, TokenChoice])
@pytest.mark.parametrize("capacity", [0.0, -1.0, float("nan"), float("inf")])
def test_a_capacity_is_above_zero(router: type[Router], capacity: float) -> None:
    with pytest.raises(UserError, match=f"capacity is {capacity}"):
        router(capacity=capacity)  # type: ignore[call-arg]

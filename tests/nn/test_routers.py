"""Routers against the published rules in plain loops: ties, full capacity, an empty group, one token."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mmjax.core.errors import UserError
from mmjax.nn.router_losses import (
    balance_loss,
    entropy_losses,
    importance_loss,
    load_loss,
    z_loss,
)
from mmjax.nn.routers.base import Router, Slots
from mmjax.nn.routers.expert_choice import ExpertChoice
from mmjax.nn.routers.soft import Soft
from mmjax.nn.routers.token_choice import TokenChoice

Weights = np.ndarray  # [T, E]: of each expert's output in each token's sum


pytestmark = pytest.mark.usefixtures("x64")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def expert_choice(router: ExpertChoice, logits: np.ndarray, valid: np.ndarray) -> Weights:
    """Zhou et al. (2022), one group: each expert ranks the tokens and takes the first of them."""
    tokens, experts = logits.shape
    scores = softmax(logits) if router.score == "softmax" else 1 / (1 + np.exp(-logits))
    count = min(tokens, max(1, round(router.capacity * tokens / experts)))
    weights = np.zeros((tokens, experts))
    for e in range(experts):
        ranked = sorted((t for t in range(tokens) if valid[t]), key=lambda t: (-scores[t, e], t))
        for t in ranked[:count]:
            weights[t, e] = scores[t, e]
    return weights


def token_choice(router: TokenChoice, logits: np.ndarray, valid: np.ndarray) -> Weights:
    """Riquelme et al. (2021), algorithms 1 and 2, one group: k-th choices of all tokens before those after."""
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


def weights_of(slots: Slots, tokens: int) -> Weights:
    """What the slots of the first group say, token by token; each is at an expert once at most."""
    index, gate = np.asarray(slots.index_GEC[0]), np.asarray(slots.gate_GEC[0])
    found = np.zeros((tokens, index.shape[0]))
    for e, row in enumerate(index):
        for c, t in enumerate(row):
            if gate[e, c] > 0:
                assert found[t, e] == 0
                found[t, e] = gate[e, c]
    return found


ROUTERS: dict[str, tuple[Router, Any]] = {
    "expert choice": (ExpertChoice(), expert_choice),
    "expert choice, more room": (ExpertChoice(capacity=2.5), expert_choice),
    "expert choice, sigmoid": (ExpertChoice(score="sigmoid", capacity=0.5), expert_choice),
    "first choice": (TokenChoice(), token_choice),
    "two choices": (TokenChoice(top_k=2, capacity=0.5), token_choice),
    "two choices by priority": (
        TokenChoice(top_k=2, capacity=0.6, batch_priority=True),
        token_choice,
    ),
    "room for all": (TokenChoice(top_k=2, capacity=100.0), token_choice),
}


# Of equal rows, and of equal logits in a row, scores are equal to the bit; of others, far from it.
ROWS = [
    (-1.0, 0.0, 0.5), (0.0, 0.5, 2.0), (2.0, -1.0, 0.5),
    (0.3, 0.3, 0.3), (-1.0, -1.0, 2.0), (0.9, 0.9, -0.7),
]  # fmt: skip


def test_scores_are_equal_or_far_apart() -> None:
    """Of the rows that the next test draws: how a tie is rounded would be chance otherwise."""
    scores = softmax(np.array(ROWS))
    for column in (*scores.T, scores.max(axis=1)):
        assert np.diff(np.sort(column)).min() > 1e-3


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", ROUTERS)
def test_against_loops(name: str, data: st.DataObject) -> None:
    """With ties (few distinct logits), tokens that are not there, and of one token."""
    router, rule = ROUTERS[name]
    tokens, experts = data.draw(st.sampled_from([(1, 3), (7, 3)]))
    rows = st.lists(st.sampled_from(ROWS), min_size=tokens, max_size=tokens)
    logits = np.array(data.draw(rows))
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    # A second group must not matter.
    both = jnp.stack([jnp.asarray(logits), jnp.asarray(-logits)])
    there = jnp.stack([jnp.asarray(valid), jnp.ones(tokens, bool)])
    found = weights_of(jax.jit(router.route)(both, there), tokens)
    np.testing.assert_allclose(found, rule(router, logits, valid), rtol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_expert_takes_more_than_its_slots_and_the_count_is_as_said(name: str) -> None:
    router, _ = ROUTERS[name]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)))
    slots = router.route(logits, jnp.ones((2, 12), bool))
    assert slots.index_GEC.shape == slots.gate_GEC.shape == (2, 4, router.slots(12, 4))
    assert int(slots.index_GEC.max()) < 12 and float(slots.gate_GEC.min()) >= 0


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_pass_through_the_gates(name: str) -> None:
    """Of the gates by the logits, against finite differences where no choice changes."""
    router, _ = ROUTERS[name]
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


# --- losses ------------------------------------------------------------------------------------

RNG = np.random.default_rng(2)
LOGITS = RNG.normal(size=(2, 5, 3))
VALID = np.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], bool)


def squared_variation(x: np.ndarray) -> float:
    return float((x.std() / x.mean()) ** 2)


def test_importance_is_of_each_group() -> None:
    """V-MoE's: a loss for each group of tokens that compete, then their mean."""
    scores = softmax(LOGITS)
    each = [squared_variation(scores[g][VALID[g]].sum(axis=0)) for g in range(2)]
    found = importance_loss(jnp.asarray(scores), jnp.asarray(VALID))
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-10)


def test_balance_and_z() -> None:
    scores = softmax(LOGITS)
    each = []
    for own, valid in zip(scores, VALID, strict=True):
        first = np.bincount(own[valid].argmax(axis=1), minlength=3) / valid.sum()
        each.append(3 * (first * own[valid].mean(axis=0)).sum())
    found = balance_loss(jnp.asarray(scores), jnp.asarray(VALID))
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-10)
    even = jnp.full((1, 6, 3), 1 / 3)
    assert float(balance_loss(even, jnp.ones((1, 6), bool))) == pytest.approx(1)
    sizes = np.square(np.log(np.exp(LOGITS[VALID]).sum(axis=1)))
    np.testing.assert_allclose(
        z_loss(jnp.asarray(LOGITS), jnp.asarray(VALID)), sizes.mean(), rtol=1e-10
    )


NAMED: dict[str, Any] = {
    "importance": lambda logits, valid: importance_loss(jax.nn.softmax(logits), valid),
    "balance": lambda logits, valid: balance_loss(jax.nn.softmax(logits), valid),
    "load": lambda logits, valid: load_loss(logits, logits + 0.1, 0.25, 1, valid),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_group_without_a_token_does_not_count(name: str) -> None:
    alone = NAMED[name](jnp.asarray(LOGITS[:1]), jnp.asarray(VALID[:1]))
    valid = jnp.asarray(np.stack([VALID[0], np.zeros(5, bool)]))
    assert float(NAMED[name](jnp.asarray(LOGITS), valid)) == float(alone) > 0
    nothing = jnp.zeros((2, 5), bool)
    value, gradient = jax.value_and_grad(NAMED[name])(jnp.asarray(LOGITS), nothing)
    assert float(value) == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("name", ["importance", "load"])
@pytest.mark.parametrize("experts", [2, 3, 4])
def test_equal_loads_cost_nothing_and_pull_nowhere(name: str, experts: int) -> None:
    """The root of a variance of 0 has no slope there: as a quotient of squares it is 0."""
    logits, valid = jnp.zeros((2, 6, experts)), jnp.ones((2, 6), bool)
    value, gradient = jax.value_and_grad(NAMED[name])(logits, valid)
    assert float(value) == pytest.approx(0, abs=1e-30)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_entropies_of_a_modality() -> None:
    scores = softmax(3 * LOGITS)
    own = VALID & (np.arange(5) < 3)
    each = -(scores[own] * np.log(scores[own])).sum(axis=1)
    mean = scores[own].mean(axis=0)
    among = -(mean * np.log(mean)).sum()
    for threshold in (0.1, 2.0):
        local, spread = entropy_losses(jnp.asarray(scores), jnp.asarray(own), threshold)
        np.testing.assert_allclose(local, each.mean(), rtol=1e-10)
        np.testing.assert_allclose(spread, max(0, threshold - among), rtol=1e-10)
    # Certain scores, and a modality of which there is nothing.
    certain = jnp.eye(3)[None]
    local, spread = entropy_losses(certain, jnp.ones((1, 3), bool), math.log(3))
    assert float(local) == 0 and float(spread) == pytest.approx(0, abs=1e-12)
    nothing = entropy_losses(jnp.asarray(scores), jnp.zeros((2, 5), bool), 2.0)
    assert [float(x) for x in nothing] == [0, 0]
    gradient = jax.grad(lambda s: sum(entropy_losses(s, jnp.ones((1, 3), bool), 0.5)))(certain)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ExpertChoice(capacity=0.0), "capacity is 0.0"),
        (lambda: ExpertChoice(score="sigmod"), "score is 'sigmod'. Did you mean 'sigmoid'"),
        (lambda: TokenChoice(top_k=0), "top is 0"),
        (lambda: TokenChoice(top_k=4).route(jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool)), "top is 4, of 3 experts"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


# --- soft mixtures -----------------------------------------------------------------------------


def test_soft_slots_are_means_of_tokens_and_tokens_means_of_slots() -> None:
    """Puigcerver et al. (2023), equations 1 and 2, by loops; a group with padding, and one with a single token."""
    rng = np.random.default_rng(2)
    tokens, experts, columns, width = 5, 3, 2, 4
    logits = rng.normal(size=(2, tokens, experts * columns))
    valid = np.array([[True, True, False, True, True], [False, False, True, False, False]])
    x = rng.normal(size=(2, tokens, width))
    router = Soft(slots_per_expert=columns)
    made = router.route(jnp.asarray(logits), jnp.asarray(valid))
    slots = np.zeros((2, experts, columns, width))
    for g, e, c in np.ndindex(2, experts, columns):
        own = logits[g, :, e * columns + c]
        weights = np.where(valid[g], np.exp(own), 0) / np.exp(own[valid[g]]).sum()
        slots[g, e, c] = sum(weights[t] * x[g, t] for t in range(tokens))
    np.testing.assert_allclose(made.gather(jnp.asarray(x)), slots, rtol=1e-12)
    y = rng.normal(size=slots.shape)
    for g, t in np.ndindex(2, tokens):
        share = softmax(logits[g, t]).reshape(experts, columns)
        wanted = np.einsum("ec,ecd->d", share, y[g]) if valid[g, t] else np.zeros(width)
        np.testing.assert_allclose(made.combine(jnp.asarray(y), tokens)[g, t], wanted, rtol=1e-12)
        parts = share.sum(axis=1) if valid[g, t] else np.zeros(experts)
        np.testing.assert_allclose(made.parts(tokens)[g, t], parts, rtol=1e-12)
    assert router.slots(tokens, experts) == columns


def test_a_soft_group_without_tokens_is_zero_also_backwards() -> None:
    x, logits = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 4))

    def total(logits: jax.Array) -> jax.Array:
        made = Soft(slots_per_expert=2).route(logits, jnp.zeros((1, 3), bool))
        return made.combine(made.gather(x), 3).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert float(value) == 0 and not np.asarray(gradient).any()


# --- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2])
def test_the_load_loss_by_loops(top: int) -> None:
    """Riquelme et al. (2021), appendix A."""
    rng = np.random.default_rng(top)
    logits, deviation = rng.normal(size=(2, 6, 4)), 0.25
    noisy = logits + deviation * rng.normal(size=logits.shape)
    valid = rng.random((2, 6)) < 0.8
    load = np.zeros((2, 4))
    for g, t in np.ndindex(2, 6):
        if valid[g, t]:
            eta = sorted(noisy[g, t])[-top]
            load[g] += [1 - norm.cdf((eta - logit) / deviation) for logit in logits[g, t]]
    wanted = np.mean([squared_variation(own) for own in load])

    def loss(logits: Any) -> jax.Array:
        return load_loss(logits, jnp.asarray(noisy), deviation, top, jnp.asarray(valid))

    assert float(loss(jnp.asarray(logits))) == pytest.approx(wanted, rel=1e-12)
    gradient, way = jax.grad(loss)(jnp.asarray(logits)), rng.normal(size=logits.shape)
    ahead, behind = (float(loss(jnp.asarray(logits + s * 1e-6 * way))) for s in (1, -1))
    assert float((gradient * way).sum()) == pytest.approx((ahead - behind) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Soft(slots_per_expert=0), "columns is 0"),
        (lambda: TokenChoice(noise=-1.0), "noise is -1.0"),
    ],
)
def test_more_mistakes(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()

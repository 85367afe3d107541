"""Auxiliary losses of routers against their published equations in plain loops."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing import softmax
from scipy.stats import norm

from mmjax.nn.router_losses import (
    balance_loss,
    entropy_losses,
    importance_loss,
    load_loss,
    z_loss,
)

pytestmark = pytest.mark.usefixtures("x64")


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

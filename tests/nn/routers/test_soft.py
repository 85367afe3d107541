"""Soft mixtures against the published equations in plain loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing import softmax

from mmjax.core.errors import UserError
from mmjax.nn.routers.soft import Soft

pytestmark = pytest.mark.usefixtures("x64")


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


def test_a_soft_mixture_needs_a_slot() -> None:
    with pytest.raises(UserError, match="slots_per_expert is 0"):
        Soft(slots_per_expert=0)

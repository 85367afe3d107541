"""A router's weights as a table of tokens and experts, against a rule in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from mmjax.nn.routers.base import Router, Slots

Rule = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
Weights = np.ndarray  # [T, E]: of each expert's output in each token's sum


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def weights_of(slots: Slots, tokens: int) -> Weights:
    """Return what the slots of the first group hold, token by token; each is at an expert once at most."""
    index, gate = np.asarray(slots.index_GEC[0]), np.asarray(slots.gate_GEC[0])
    result = np.zeros((tokens, index.shape[0]))
    for e, row in enumerate(index):
        for c, t in enumerate(row):
            if gate[e, c] > 0:
                assert result[t, e] == 0
                result[t, e] = gate[e, c]
    return result


# Of equal rows, and of equal logits in a row, scores are equal to the bit; of others, far from it.
ROWS = [
    (-1.0, 0.0, 0.5), (0.0, 0.5, 2.0), (2.0, -1.0, 0.5),
    (0.3, 0.3, 0.3), (-1.0, -1.0, 2.0), (0.9, 0.9, -0.7),
]  # fmt: skip


def check_against_loops(router: Router, rule: Rule, data: st.DataObject) -> None:
    """Compare a router with its rule: with ties, tokens that are not there, and groups of one token."""
    tokens, experts = data.draw(st.sampled_from([(1, 3), (7, 3)]))
    rows = st.lists(st.sampled_from(ROWS), min_size=tokens, max_size=tokens)
    logits = np.array(data.draw(rows))
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    # A second group must not matter.
    both = jnp.stack([jnp.asarray(logits), jnp.asarray(-logits)])
    there = jnp.stack([jnp.asarray(valid), jnp.ones(tokens, bool)])
    found = weights_of(jax.jit(router.route)(both, there), tokens)
    np.testing.assert_allclose(found, rule(router, logits, valid), rtol=1e-12)

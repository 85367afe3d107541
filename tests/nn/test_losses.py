"""Losses of predicted tokens, against a loop."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn.losses import next_token_losses, wide


@pytest.mark.usefixtures("x64")
def test_next_token_losses_are_the_logs_of_a_softmax() -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    found = next_token_losses(jnp.asarray(logits), jnp.asarray(ids))
    for b in range(2):
        for s in range(3):
            total = sum(math.exp(x) for x in logits[b, s])
            expected = math.log(total) - logits[b, s, ids[b, s]]
            assert found[b, s] == pytest.approx(expected, rel=1e-12)


def test_they_are_computed_in_float32_at_least() -> None:
    assert next_token_losses(jnp.zeros((1, 1, 2), jnp.bfloat16), jnp.zeros((1, 1), int)).dtype == (
        jnp.float32
    )
    assert wide(jnp.zeros(1, jnp.float16)).dtype == jnp.float32

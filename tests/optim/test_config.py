"""The optimizer's block, and its learning rate."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.optim.config import OptimizerConfig, learning_rate

pytestmark = pytest.mark.usefixtures("x64")


@settings(deadline=None)
@given(
    steps=st.integers(1, 400),
    warmup=st.integers(0, 60),
    final=st.floats(0, 1),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    data=st.data(),
)
def test_the_rate_at_any_step(
    steps: int, warmup: int, final: float, decay: str, data: st.DataObject
) -> None:
    config = OptimizerConfig(learning_rate=0.02, warmup=warmup, decay=decay, end_lr_ratio=final)
    step = data.draw(st.integers(0, steps + 50))
    found = float(learning_rate(config, steps)(step))
    if step < warmup:
        expected = 0.02 * (step + 1) / warmup
    elif decay == "constant":
        expected = 0.02
    elif decay == "linear":
        left = max(1 - (step - warmup) / max(steps - warmup, 1), 0.0)
        expected = 0.02 * (final + (1 - final) * left)
    else:
        part = min((step - warmup) / max(steps - warmup, 1), 1.0)
        expected = 0.02 * (final + (1 - final) * (1 + math.cos(math.pi * part)) / 2)
    # Optax computes in float32.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-8)


@settings(deadline=None, max_examples=30)
@given(
    steps=st.integers(1, 10**6), warmup=st.integers(0, 10**5), part=st.floats(0, 1.1), final=st.floats(0, 1)
)  # fmt: skip
def test_a_length_that_is_an_argument_gives_the_rate_of_one_that_is_a_constant(
    steps: int, warmup: int, part: float, final: float
) -> None:
    """To the rounding of float32, beside Optax's schedules with the length in the program."""
    config, count = (
        OptimizerConfig(learning_rate=0.3, warmup=warmup, end_lr_ratio=final),
        int(part * steps),
    )
    schedules = [optax.cosine_decay_schedule(0.3, max(steps - warmup, 1), alpha=final)]
    if warmup:
        schedules.insert(0, optax.linear_schedule(0.3 / warmup, 0.3, max(warmup - 1, 1)))
    constant = optax.join_schedules(schedules, [warmup] * (len(schedules) - 1))
    rate = jax.jit(lambda length, warmup, count: learning_rate(config, length, warmup)(count))
    with jax.enable_x64(False):
        found = rate(jnp.int32(steps), jnp.int32(warmup), jnp.int32(count))
        expected = float(jax.jit(constant)(jnp.int32(count)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(float(found), expected, rtol=0, atol=0.3 * 2**-22)


def test_the_rate_meets_its_corners() -> None:
    at = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=4, end_lr_ratio=0.1), 24)
    corners = [float(at(s)) for s in (0, 3, 4, 14, 24, 1000)]
    np.testing.assert_allclose(corners, [0.25, 1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-6)


def test_a_linear_decay_meets_its_corners() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup=4, end_lr_ratio=0.1, decay="linear")
    at = learning_rate(config, 24)
    corners = [float(at(s)) for s in (0, 3, 4, 9, 14, 19, 24, 1000)]
    np.testing.assert_allclose(corners, [0.25, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1], rtol=1e-6)

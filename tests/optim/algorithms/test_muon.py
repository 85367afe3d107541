"""Muon against an independent statement of its published update in NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from directions import (
    MATRICES,
    SPECS,
    Direction,
    adam,
    agree,
    draws,
    expected,
    make_optimizer,
    rms,
    steps_of,
)

from mmjax.optim.algorithms.adamw import Adamw
from mmjax.optim.algorithms.muon import Muon

pytestmark = pytest.mark.usefixtures("x64")


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Return five steps of Jordan's quintic iteration from `X / |X|_F`, on the wide side."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    a, b, c = np.float32([3.4445, -4.7750, 2.0315]).astype(np.float64)
    x = x / (np.sqrt((x**2).sum()) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def muon(name: str, beta: float) -> Direction:
    """Compute as Jordan (2024) with Nesterov's momentum, unbiased as in NAdam; the size of Liu et al. (2025), eq. 4."""
    held: dict[str, Any] = {"m": 0.0, "t": 0}
    shape = MATRICES[name]

    def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
        held["t"] += 1
        t, held["m"] = held["t"], beta * held["m"] + (1 - beta) * g
        ahead = beta * held["m"] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        turned = np.stack([orthogonal(x) for x in ahead.reshape(shape)])
        return 0.2 * math.sqrt(max(shape[1:])) * turned.reshape(g.shape)

    return direction


def test_muon_is_the_published_one_and_adamw_elsewhere() -> None:
    have, _ = steps_of(Muon(b1=0.8, b2=0.95, eps=1e-3, momentum=0.9))
    agree(
        have,
        expected(lambda n: muon(n, 0.9) if n in MATRICES else adam(0.8, 0.95, 1e-3)),
        1e-6,  # the coefficients are float32
    )
    # The control: each of them was treated otherwise under AdamW.
    plain, _ = steps_of(Adamw(b1=0.8, b2=0.95, eps=1e-3))
    differs = {n for n in SPECS if not np.allclose(have[n], plain[n], rtol=1e-3)}
    assert differs == set(MATRICES)


def test_muons_update_has_the_size_of_adams() -> None:
    """Singular values near 1, so a root mean square near 0.2, whatever the matrix's shape."""
    optimizer = make_optimizer(Muon())
    before = {n: jnp.asarray(p) for n, p in draws(0).items()}
    grads = {n: jnp.asarray(g) for n, g in draws(1).items()}
    updated = optimizer.update(grads, optimizer.init(before), before, jnp.float64(1))
    for name in MATRICES:
        assert 0.1 < rms(np.asarray(updated.parameters[name] - before[name])) < 0.3, name

"""Adafactor against an independent statement of its published update in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from directions import SPECS, Direction, agree, expected, rms, steps_of

from mmjax.optim.algorithms.adafactor import Adafactor

pytestmark = pytest.mark.usefixtures("x64")


def adafactor(name: str, least: int) -> Direction:
    """Return algorithms 4 (matrices) and 5 (all else) by layer: `beta2_t = 1 - t^-0.8`, d = 1, eps = (1e-30, 1e-3)."""
    shape = {**{n: s.shape[1:] for n, s in SPECS.items() if s.stack}, "table": (7, 4)}
    inner = {"mlp": (4, 6), "query": (4, 6), "out": (6, 4)}.get(name, shape.get(name, (4,)))
    repeat = 2 if SPECS[name].stack else 1
    held: dict[str, Any] = {"r": 0.0, "c": 0.0, "v": 0.0, "t": 0}

    def direction(g: np.ndarray, p: np.ndarray) -> np.ndarray:
        held["t"] += 1
        beta = 1 - held["t"] ** -0.8
        g, p = g.reshape(repeat, *inner), p.reshape(repeat, *inner)
        square = g**2 + 1e-30
        if len(inner) > 1 and sorted(inner)[-2] >= least:
            held["r"] = beta * held["r"] + (1 - beta) * square.mean(axis=-1)
            held["c"] = beta * held["c"] + (1 - beta) * square.mean(axis=-2)
            mean = held["r"].mean(axis=-1)[..., None, None]
            second = held["r"][..., :, None] * held["c"][..., None, :] / mean
        else:
            held["v"] = beta * held["v"] + (1 - beta) * square
            second = held["v"]
        turned = g / np.sqrt(second)
        sized = [u / max(1.0, rms(u)) * max(1e-3, rms(x)) for u, x in zip(turned, p, strict=True)]
        return np.stack(sized).reshape(SPECS[name].shape)

    return direction


@pytest.mark.parametrize("least", [4, 128])
def test_adafactor_is_the_published_one(least: int) -> None:
    have, state = steps_of(Adafactor(min_dim_to_factor=least))
    agree(have, expected(lambda n: adafactor(n, least)), 1e-6)  # its decay is a float32 power
    factored = {n for n in SPECS if set(state[n]) == {"count", "v_row", "v_col"}}
    assert factored == ({"mlp", "query", "out", "experts", "table"} if least == 4 else set())
    assert all(set(state[n]) == {"count", "v"} for n in SPECS if n not in factored)


def test_factored_state_is_small() -> None:
    _, state = steps_of(Adafactor(min_dim_to_factor=4))
    assert {k: v.shape for k, v in state["query"].items()} == {
        "count": (2,), "v_row": (2, 4), "v_col": (2, 6)
    }  # fmt: skip

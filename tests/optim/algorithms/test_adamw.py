"""AdamW against an independent statement of its published update in NumPy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from directions import SPECS, adam, agree, expected, steps_of

from mmjax.optim.algorithms.adamw import Adamw

pytestmark = pytest.mark.usefixtures("x64")


def test_adamw_is_the_published_one() -> None:
    values, state = steps_of(Adamw(b1=0.8, b2=0.95, eps=1e-3))
    agree(values, expected(lambda _: adam(0.8, 0.95, 1e-3)))
    assert all(set(state[name]) == {"count", "mu", "nu"} for name in SPECS)


def test_first_moments_in_bfloat16() -> None:
    """Rounded between steps, not within one."""

    def rounded(_: str) -> Any:
        held: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

        def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
            held["t"] += 1
            m = 0.9 * held["m"] + (1 - 0.9) * g
            held["v"] = 0.999 * held["v"] + (1 - 0.999) * g**2
            held["m"] = m.astype(jnp.bfloat16).astype(np.float64)
            root = np.sqrt(held["v"] / (1 - 0.999 ** held["t"])) + 1e-8
            return m / (1 - 0.9 ** held["t"]) / root

        return direction

    have, state = steps_of(Adamw(moments_dtype="bfloat16"))
    agree(have, expected(rounded), 1e-8)
    assert state["mlp"]["mu"].dtype == jnp.bfloat16 and state["mlp"]["nu"].dtype == jnp.float64
    assert not np.allclose(have["mlp"], steps_of(Adamw())[0]["mlp"], rtol=1e-5)

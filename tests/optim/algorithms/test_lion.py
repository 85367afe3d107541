"""Lion against an independent statement of its published update in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from directions import agree, expected, steps_of

from mmjax.optim.algorithms.lion import Lion

pytestmark = pytest.mark.usefixtures("x64")


def test_lion_is_the_published_one() -> None:
    def lion(_: str) -> Any:
        held: dict[str, Any] = {"m": 0.0}

        def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
            turned = np.sign(0.7 * held["m"] + 0.3 * g)
            held["m"] = 0.9 * held["m"] + 0.1 * g
            return turned

        return direction

    have, state = steps_of(Lion(b1=0.7, b2=0.9))
    agree(have, expected(lion))
    assert set(state["mlp"]) == {"count", "mu"}

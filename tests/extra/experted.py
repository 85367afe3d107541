"""Parts that the tests of experts share: tokens, settings, and an MLP in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.core.parameters import Declaration

ROWS, LENGTH, WIDTH, HIDDEN, COUNT = 4, 6, 5, 7, 3
LAYOUT = (("text", 2), ("image", 4))
VALID = np.random.default_rng(3).random((ROWS, LENGTH)) < 0.8
X = np.random.default_rng(4).normal(size=(ROWS, LENGTH, WIDTH))
CHOICE = {"count": COUNT, "router": {"name": "expert_choice", "capacity": 0.8}, "group_size": 12}
TOKENS = {
    "count": COUNT,
    "router": {"name": "token_choice", "top_k": 2, "capacity": 0.4},
    "group_size": 12,
}


def random(declaration: Declaration, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s.shape) for n, s in declaration.specs.items()}


def mlp(p: Mapping[str, np.ndarray], e: int, x: np.ndarray) -> np.ndarray:
    up = x @ p["mlps/up/kernel"][e]
    return (
        0.5
        * up
        * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        @ p["mlps/down/kernel"][e]
    )


def block(**more: Any) -> dict[str, Any]:
    return {"name": "transformer", "num_heads": 2, "mlp_dim": HIDDEN, **more}

"""Run an algorithm of the optimizer over small parameters, and the same steps by a statement of it in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from mmjax.core.parameters import LayerStack, Spec
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.config import OptimizerConfig
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.views import UpdateScope

STEPS, RATE, DECAY = 7, 0.05, 0.3
Values = dict[str, np.ndarray]
Direction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def spec(name: str, shape: tuple[int, ...], axes: Any = None, stacked: bool = False) -> Spec:
    axes = (None,) * len(shape) if axes is None else axes
    if not stacked:
        return Spec(name, shape, axes, initializers.zeros, False, len(shape) > 1, None)
    stack = LayerStack(first=0, stride=1, repeat=2, prefix="trunk/layers", inner=name)
    init = initializers.zeros
    return Spec(name, (2, *shape), ("layers", *axes), init, False, len(shape) > 1, stack)


SPECS = {
    s.name: s
    for s in (
        spec("mlp", (4, 6), ("embed", "mlp"), stacked=True),
        spec("query", (4, 2, 3), ("embed", "heads", None), stacked=True),
        spec("out", (2, 3, 4), ("heads", None, "embed"), stacked=True),
        spec("experts", (3, 5, 4), (None, "embed", "mlp"), stacked=True),
        spec("scale", (4,), ("embed",), stacked=True),
        spec("table", (7, 4), ("vocabulary", "embed")),
        spec("bias", (4,)),
    )
}
# Layers' matrices by hand: `[layers * experts, inputs, outputs]`.
MATRICES = {"mlp": (2, 4, 6), "query": (2, 4, 6), "out": (2, 6, 4), "experts": (6, 5, 4)}


def draws(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s.shape) for name, s in SPECS.items()}


def make_optimizer(algorithm: Algorithm, **settings: Any) -> Optimizer:
    """Return an optimizer for one task that moves everything."""
    config = OptimizerConfig(algorithm=algorithm, clip=0.0, **settings)
    return Optimizer(
        config, SPECS, lambda _: STEPS, {"task": UpdateScope("shared", frozenset(SPECS))}
    )


def steps_of(algorithm: Algorithm) -> tuple[Values, dict[str, Any]]:
    """Return parameters and state after `STEPS` steps."""
    optimizer = make_optimizer(algorithm, weight_decay=DECAY)
    parameters = {n: jnp.asarray(p) for n, p in draws(0).items()}
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        grads = {n: jnp.asarray(g) for n, g in draws(100 + step).items()}
        updated = update(grads, state, parameters, jnp.float64(RATE))
        parameters, state = updated.parameters, updated.optimizer
    return {n: np.asarray(p) for n, p in parameters.items()}, state


def expected(directions: Callable[[str], Direction]) -> Values:
    """Return `p -= rate (direction + decay p)`; `directions(name)` is a fresh `(gradient, parameter) -> direction`."""
    parameters = draws(0)
    for name, s in SPECS.items():
        direction, decay = directions(name), DECAY if s.decay else 0.0
        for step in range(STEPS):
            p = parameters[name]
            parameters[name] = p - RATE * (direction(draws(100 + step)[name], p) + decay * p)
    return parameters


def agree(have: Values, want: Values, tolerance: float = 1e-9) -> None:
    for name in SPECS:
        np.testing.assert_allclose(have[name], want[name], rtol=tolerance, err_msg=name)


def adam(b1: float, b2: float, eps: float) -> Direction:
    held: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

    def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
        held["t"] += 1
        held["m"] = b1 * held["m"] + (1 - b1) * g
        held["v"] = b2 * held["v"] + (1 - b2) * g**2
        root = np.sqrt(held["v"] / (1 - b2 ** held["t"])) + eps
        return held["m"] / (1 - b1 ** held["t"]) / root

    return direction


def rms(x: np.ndarray) -> float:
    return math.sqrt((x**2).mean())

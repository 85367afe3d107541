"""Diffusion: how data are noised, what a model predicts, and how that is turned back into data.

Time t runs from 0 (data) to 1 (noise): `x_t = alpha(t) x + sigma(t) e` with e ~ N(0, 1).

    epsilon  predicts e                      cosine schedule (Nichol and Dhariwal 2021, eq. 17)
    v        predicts alpha e - sigma x      cosine schedule (Salimans and Ho 2022, appendix D)
    flow     predicts e - x                  alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)

Time is continuous, in training and in sampling; there is no table of 1,000 steps. A sampler takes `steps` equal steps
from 1 to 0, each from x_t to x_s with s < t, by the data x and the noise e that the prediction stands for:

    ddim     deterministic: x_s = alpha(s) x + sigma(s) e (Song et al. 2021, eq. 12; for `flow`, Euler's method)
    ddpm     ancestral: draws x_s from q(x_s | x_t, x) (Ho et al. 2020; in continuous time, Kingma et al. 2021)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.errors import UserError, nearest

TARGETS = ("epsilon", "v", "flow")
SAMPLERS = ("ddim", "ddpm")
_OFFSET = 0.008  # s of the cosine schedule
_LEAST = 1e-3  # of alpha: at t = 1 the data would be divided by it


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule and what is predicted, named by `prediction`, and a sampler.

    Raises:
      UserError: an unknown prediction or sampler.
    """

    prediction: str = "epsilon"
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        if self.prediction not in TARGETS:
            raise UserError(
                f"Unknown diffusion prediction '{self.prediction}'.{nearest(self.prediction, TARGETS)}"
            )
        if self.sampler not in SAMPLERS:
            raise UserError(
                f"Unknown diffusion sampler '{self.sampler}'.{nearest(self.sampler, SAMPLERS)}"
            )

    def levels(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `alpha(t)` and `sigma(t)`."""
        if self.prediction == "flow":
            return 1 - t, t
        start = math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2)
        alpha = jnp.cos((t + _OFFSET) / (1 + _OFFSET) * (math.pi / 2)) / start
        alpha = jnp.clip(alpha, _LEAST, 1.0)
        return alpha, jnp.sqrt(1 - jnp.square(alpha))

    def noised(self, x: jax.Array, e: jax.Array, t: jax.Array) -> jax.Array:
        """Return `x_t`; `t` has an axis for each of `x`, or as many leading ones."""
        alpha, sigma = self.levels(_spread(t, x))
        return alpha * x + sigma * e

    def target(self, x: jax.Array, e: jax.Array, t: jax.Array) -> jax.Array:
        """Return the target that the model should predict from `x_t` and t."""
        if self.prediction == "epsilon":
            return e
        if self.prediction == "flow":
            return e - x
        alpha, sigma = self.levels(_spread(t, x))
        return alpha * e - sigma * x

    def resolved(
        self, predicted: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the data and the noise in `x_t` according to a prediction."""
        alpha, sigma = self.levels(_spread(t, x_t))
        if self.prediction == "epsilon":
            return (x_t - sigma * predicted) / alpha, predicted
        if self.prediction == "flow":
            return x_t - sigma * predicted, x_t + alpha * predicted
        return alpha * x_t - sigma * predicted, sigma * x_t + alpha * predicted

    def sample(
        self,
        predict: Callable[[Any, jax.Array, jax.Array], Any],
        noise: Any,
        steps: int,
        bound: float | None = None,
        fresh: Callable[[jax.Array], Any] | None = None,
    ) -> Any:
        """Return data made from noise.

        Args:
          predict: `(x_t, t, step) -> prediction`, t a scalar, the steps counted from 0.
          noise: `x_1`, an array or a tree of arrays.
          bound: data lie in [-bound, bound], and predictions of them are clipped to that.
          fresh: `step -> noise` like `x_1`, which `ddpm` adds; it must differ from `noise` and from step to step.
        """
        times = jnp.linspace(1.0, 0.0, steps + 1, dtype=jax.tree.leaves(noise)[0].dtype)

        def step(x_t: Any, ends: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
            t, after, index = ends

            def one(predicted: jax.Array, x_t: jax.Array) -> jax.Array:
                return self._less(predicted, x_t, t, after, bound)

            less = jax.tree.map(one, predict(x_t, t, index), x_t)
            if self.sampler == "ddim":
                return less, None
            assert fresh is not None
            deviation = jnp.sqrt(self._posterior(t, after)[2])
            return jax.tree.map(lambda x, e: x + deviation * e, less, fresh(index)), None

        return jax.lax.scan(step, noise, (times[:-1], times[1:], jnp.arange(steps)))[0]

    def _less(
        self,
        predicted: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        after: jax.Array,
        bound: float | None,
    ) -> jax.Array:
        """Return `x_after` of `x_t`, or its mean where the sampler draws it."""
        x, e = self.resolved(predicted.astype(x_t.dtype), x_t, t)
        if bound is not None:
            x = jnp.clip(x, -bound, bound)
            alpha, sigma = self.levels(t)
            e = (x_t - alpha * x) / jnp.maximum(sigma, _LEAST)
        if self.sampler == "ddim":
            return self.noised(x, e, after)
        of_noisy, of_data, _ = self._posterior(t, after)
        return of_noisy * x_t + of_data * x

    def _posterior(self, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the weights of `x_t` and of x in the mean of `q(x_s | x_t, x)`, and its variance, for s < t.

        With `a = alpha(t) / alpha(s)` and `v = sigma(t)^2 - a^2 sigma(s)^2`, the variance of `x_t` given `x_s`:
        `a sigma(s)^2 / sigma(t)^2`, `alpha(s) v / sigma(t)^2` and `v sigma(s)^2 / sigma(t)^2`.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.levels(t), self.levels(s)
        ratio, whole = alpha_t / alpha_s, jnp.square(sigma_t)
        added = jnp.maximum(whole - jnp.square(ratio * sigma_s), 0)
        before = jnp.square(sigma_s) / whole
        return ratio * before, alpha_s * added / whole, added * before


def _spread(t: jax.Array, x: jax.Array) -> jax.Array:
    """Return `t` with trailing axes, so that it broadcasts over `x`."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))

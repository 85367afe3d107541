"""The optimizer: Optax per parameter leaf, so that each has its own state and its own count.

Adding a task never changes the tree of a leaf's state, and a stacked leaf is updated layer by layer, as
if its layers stood apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmjax.errors import UserError, nearest
from mmjax.parameters import Arrays, Spec
from mmjax.transforms import Axes, LeafState, leaf_transform


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of Optax, with a warm-up and a decay.

    Attributes:
      name: `adamw` (Loshchilov & Hutter 2019); `adafactor` (Shazeer & Stern 2018; the rate is relative
        to a parameter's size); `lion` (Chen et al. 2023; its authors set b2 to 0.99 and the rate to a
        third of Adam's or less); `muon` (Jordan 2024) for the matrices of a trunk's layers, at the size
        of Adam's updates (Liu et al. 2025), and `adamw` for all else.
      learning_rate: the peak.
      warmup: steps of linear warm-up from 0.
      decay: `cosine` to `final` times the peak at the last step, or `constant`.
      b1, b2, eps: Adam's; the first two are Lion's as well.
      momentum: Muon's.
      factored: Adafactor keeps rows and columns apart in matrices with no side below this.
      moments_dtype: of first moments, `bfloat16` or `float32`; empty for the parameters' own. Second
        moments keep theirs: a bfloat16 average whose weight is 0.999 stands still.
      weight_decay: decoupled, times the learning rate; on matrices only.
      clip: bound of the global gradient norm; 0 for none.
      ema: decay of an exponential moving average of the parameters, kept in buffers and used by
        evaluation; 0 for none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 0
    decay: str = "cosine"
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    factored: int = 128
    moments_dtype: str = ""
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0


@struct.dataclass
class Updated:
    """Parameters and optimizer state after an update, and scalars to report."""

    parameters: Arrays
    optimizer: dict[str, LeafState]
    metrics: dict[str, jax.Array]


class Optimizer:
    """See `OptimizerConfig`; `steps` is the length of the run, at which the decay ends."""

    def __init__(self, config: OptimizerConfig, specs: Mapping[str, Spec], steps: int):
        self.config, self.specs = config, specs
        self.learning_rate = learning_rate(config, steps)
        self._leaves = {name: leaf_transform(config, spec) for name, spec in specs.items()}

    def init(self, parameters: Arrays) -> dict[str, LeafState]:
        """The state of every leaf. Meant to be jitted."""
        return {name: self._init_leaf(name, p) for name, p in parameters.items()}

    def axes(self, name: str) -> dict[str, Axes]:
        """Logical axes of the state of a leaf, by field."""
        layers: Axes = ("layers",) if self.specs[name].stack else ()
        return {field: layers + axes for field, axes in self._leaves[name].fields.items()}

    def update(
        self, grads: Arrays, state: Mapping[str, LeafState], parameters: Arrays, step: jax.Array
    ) -> Updated:
        """One update: clip over all leaves, then the transform and decoupled weight decay leaf by leaf."""
        norm = optax.tree.norm(grads)
        clip = self.config.clip
        factor = jnp.where(norm > clip, clip / norm, 1.0) if clip else jnp.ones_like(norm)
        rate = self.learning_rate(step)
        updated = {
            name: self._update_leaf(
                name,
                grads[name] * factor.astype(grads[name].dtype),
                state[name],
                p,
                rate,
            )
            for name, p in parameters.items()
        }
        metrics = {"grad_norm": norm, "learning_rate": jnp.asarray(rate)}
        return Updated(
            {n: u[0] for n, u in updated.items()}, {n: u[1] for n, u in updated.items()}, metrics
        )

    def _init_leaf(self, name: str, parameter: jax.Array) -> LeafState:
        init = self._leaves[name].init
        return jax.vmap(init)(parameter) if self.specs[name].stack else init(parameter)

    def _update_leaf(
        self, name: str, grad: jax.Array, state: LeafState, parameter: jax.Array, rate: Any
    ) -> tuple[jax.Array, LeafState]:
        decay = self.config.weight_decay if self.specs[name].decay else 0.0

        def update(g: jax.Array, s: LeafState, p: jax.Array) -> tuple[jax.Array, LeafState]:
            direction, after = self._leaves[name].update(g, s, p)
            step = -rate * (direction + decay * p)
            return p + step.astype(p.dtype), after

        return (jax.vmap(update) if self.specs[name].stack else update)(grad, state, parameter)


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The rate as a function of completed steps: linear warm-up, then the decay."""
    peak, tail = config.learning_rate, max(steps - config.warmup, 1)
    if config.decay not in ("cosine", "constant"):
        raise UserError(
            f"optimizer.decay: no '{config.decay}'.{nearest(config.decay, ['cosine', 'constant'])}"
        )
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, tail, alpha=config.final)
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup:
        return after
    # The first step of the warm-up already moves: the rate at step t is (t + 1) / warmup of the peak.
    before = optax.linear_schedule(peak / config.warmup, peak, max(config.warmup - 1, 1))
    return optax.join_schedules([before, after], [config.warmup])

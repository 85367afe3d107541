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

LeafState = dict[str, jax.Array]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up and a decay.

    Attributes:
      name: `adamw` (Loshchilov & Hutter 2019).
      learning_rate: the peak.
      warmup: steps of linear warm-up from 0.
      decay: `cosine` to `final` times the peak at the last step, or `constant`.
      b1, b2, eps: Adam's.
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
        transforms = {"adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps)}
        if config.name not in transforms:
            raise UserError(
                f"optimizer.name: no '{config.name}'.{nearest(config.name, transforms)}"
            )
        self.config, self.specs = config, specs
        self.learning_rate = learning_rate(config, steps)
        self._transform = transforms[config.name]()

    def init(self, parameters: Arrays) -> dict[str, LeafState]:
        """The state of every leaf. Meant to be jitted."""
        return {name: self._init_leaf(self.specs[name], p) for name, p in parameters.items()}

    def update(
        self, grads: Arrays, state: Mapping[str, LeafState], parameters: Arrays, step: jax.Array
    ) -> Updated:
        """One update: clip over all leaves, then Adam and decoupled weight decay leaf by leaf."""
        norm = optax.tree.norm(grads)
        clip = self.config.clip
        factor = jnp.where(norm > clip, clip / norm, 1.0) if clip else jnp.ones_like(norm)
        rate = self.learning_rate(step)
        updated = {
            name: self._update_leaf(
                self.specs[name],
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

    def _init_leaf(self, spec: Spec, parameter: jax.Array) -> LeafState:
        def init(p: jax.Array) -> LeafState:
            return _named(self._transform.init(p))

        return jax.vmap(init)(parameter) if spec.stack else init(parameter)

    def _update_leaf(
        self, spec: Spec, grad: jax.Array, state: LeafState, parameter: jax.Array, rate: Any
    ) -> tuple[jax.Array, LeafState]:
        def update(g: jax.Array, s: LeafState, p: jax.Array) -> tuple[jax.Array, LeafState]:
            direction, after = self._transform.update(g, _unnamed(self._transform, s, p), p)
            decay = self.config.weight_decay if spec.decay else 0.0
            step = -rate * (direction + decay * p)
            return p + step.astype(p.dtype), _named(after)

        return (jax.vmap(update) if spec.stack else update)(grad, state, parameter)


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


def _named(state: Any) -> LeafState:
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path).strip("."): leaf for path, leaf in pairs}


def _unnamed(
    transform: optax.GradientTransformation, state: LeafState, parameter: jax.Array
) -> Any:
    template = jax.eval_shape(transform.init, parameter)
    pairs, tree = jax.tree_util.tree_flatten_with_path(template)
    return jax.tree_util.tree_unflatten(
        tree, [state[jax.tree_util.keystr(p).strip(".")] for p, _ in pairs]
    )

"""The optimizer's block of a config, and its schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.bounds import AMOUNT, COUNT, FRACTION, PART, check
from mmjax.core.config import STRUCTURAL
from mmjax.core.errors import UserError, nearest
from mmjax.optim.algorithms.adamw import Adamw
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.rules import RuleConfig
from mmjax.optim.views import SHARED

# What is left of the peak after a part of the decay, in [0, 1], that ends at `end_lr_ratio`.
DECAYS: Mapping[str, Callable[[Any, float], Any]] = {
    "cosine": lambda part, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * part)),
    "linear": lambda part, final: 1 - (1 - final) * part,
    "constant": lambda part, final: jnp.ones_like(part),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimization algorithm, and what holds for all: a rate with warm-up and decay, weight decay, clipping, rules.

    Attributes:
      algorithm: `{name: adamw, adafactor, lion or muon, ...}`, its keys those of the class in
        `mmjax/optim/algorithms/NAME.py`; without `name` it is `adamw`.
      learning_rate: the peak.
      warmup: units of linear warm-up from 0.
      decay: `cosine` or `linear`, to `end_lr_ratio` times the peak at the end of the run; or `constant`.
      end_lr_ratio: the last learning rate, as a part of the peak.
      weight_decay: decoupled, times the learning rate; on matrices only, unless a rule sets it.
      clip: bound of the norm of the gradient of all that a step moves; 0 for none.
      unit: what `warmup` and the decay count: `steps` of the run, `examples` of all tasks, or `visits`
        (each task its own: its rate falls to `end_lr_ratio` by its last visit in the config's schedule, under
        `budget` that by model FLOPs. Where measured times or a quarantine give it more visits, the rate
        stays at `end_lr_ratio` for these; where fewer, it ends above).
      update_scope: of tasks that name none (see `mmjax.optim.views.UpdateScope`).
      rules: by parameter path.
      ema: decay of an exponential moving average of the parameters, kept in buffers and used by
        evaluation; 0 for none.
      accumulate: steps whose gradients make one update, of their mean, whatever their tasks. At the
        length of the schedule's cycle this is the gradient of the tasks' losses summed by their
        shares, the baseline of AGD; every view must be `shared` then. A step whose loss or gradient is not
        finite, or whose batch has no valid row, is no part of the mean; a round that the run's end cuts short is
        applied.
    """

    algorithm: Algorithm = field(default=Adamw(), metadata=STRUCTURAL)
    learning_rate: float = 1e-3
    warmup: int = 0
    decay: str = "cosine"
    end_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    unit: str = "steps"
    update_scope: str = SHARED
    rules: tuple[RuleConfig, ...] = ()
    ema: float = 0.0
    accumulate: int = field(default=1, metadata=STRUCTURAL)

    def __post_init__(self) -> None:
        check(
            self,
            learning_rate=AMOUNT,
            warmup=AMOUNT,
            end_lr_ratio=FRACTION,
            weight_decay=AMOUNT,
            clip=AMOUNT,
        )
        check(self, ema=PART, accumulate=COUNT)


def learning_rate(
    config: OptimizerConfig, length: Any, warmup: Any = None
) -> Callable[[Any], jax.Array]:
    """Return the rate as a function of completed units: linear warm-up, then the decay up to `length`.

    `length` and `warmup` (the config's, if None) are integers or traced ones.
    """
    if config.decay not in DECAYS:
        raise UserError(f"optimizer.decay: no '{config.decay}'.{nearest(config.decay, DECAYS)}")
    decay = DECAYS[config.decay]
    warmup = config.warmup if warmup is None else warmup
    tail = jnp.maximum(length - warmup, 1)

    def rate(count: Any) -> jax.Array:
        # The first step of the warm-up already moves: the rate at step t is (t + 1) / warmup of the peak.
        before = _ratio(count + 1, jnp.maximum(warmup, 1))
        after = decay(_ratio(jnp.clip(count - warmup, 0, tail), tail), config.end_lr_ratio)
        return config.learning_rate * jnp.where(count < warmup, before, after)

    return rate


def _ratio(part: Any, whole: Any) -> jax.Array:
    """Return the quotient of two integers, in the default floating-point dtype."""
    dtype = jnp.result_type(float)
    return jnp.asarray(part, dtype) / jnp.asarray(whole, dtype)

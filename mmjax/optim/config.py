"""The optimizer's block of a config, and its schedule of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.bounds import AMOUNT, COUNT, FRACTION, PART, POSITIVE, check
from mmjax.core.config import STRUCTURAL
from mmjax.core.errors import UserError, nearest
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
    """An optimizer of Optax, with a warm-up and a decay.

    Attributes:
      name: `adamw` (Loshchilov & Hutter 2019); `adafactor` (Shazeer & Stern 2018; the rate is relative
        to a parameter's size); `lion` (Chen et al. 2023; its authors set b2 to 0.99 and the rate to a
        third of Adam's or less); `muon` (Jordan 2024) for the matrices of a trunk's layers, at the size
        of Adam's updates (Liu et al. 2025), and `adamw` for all else.
      learning_rate: the peak.
      warmup: units of linear warm-up from 0.
      decay: `cosine` or `linear`, to `end_lr_ratio` times the peak at the end of the run; or `constant`.
      b1, b2, eps: Adam's; the first two are Lion's as well.
      momentum: Muon's.
      min_dim_to_factor: Adafactor keeps rows and columns apart in matrices with no side below this.
      moments_dtype: of first moments, `bfloat16` or `float32`; empty for the parameters' own. Second moments are
        float32 or wider, like averages and sums: a bfloat16 average whose weight is 0.999 stands still.
      weight_decay: decoupled, times the learning rate; on matrices only, unless a rule says otherwise.
      clip: bound of the norm of the gradient of all that a step moves; 0 for none.
      unit: what `warmup` and the decay count: `steps` of the run, `examples` of all tasks, or `visits`
        (each task its own: its rate falls to `end_lr_ratio` by its last visit in the config's schedule, under
        `budget` that by model FLOPs. Where measured times or a quarantine give it more visits, the rate
        stays at `end_lr_ratio` for these; where fewer, it ends above).
      update_scope: of tasks that name none (see `mmjax.optim.views.View`).
      rules: by parameter path.
      ema: decay of an exponential moving average of the parameters, kept in buffers and used by
        evaluation; 0 for none.
      accumulate: steps whose gradients make one update, of their mean, whatever their tasks. At the
        length of the schedule's period this is the gradient of the tasks' losses summed by their
        shares, the baseline of AGD; every view must be `shared` then. A step whose loss or gradient is not
        finite, or whose batch has no valid row, is no part of the mean; a round that the run's end cuts short is
        applied.
    """

    name: str = field(default="adamw", metadata=STRUCTURAL)
    learning_rate: float = 1e-3
    warmup: int = 0
    decay: str = "cosine"
    end_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    min_dim_to_factor: int = field(default=128, metadata=STRUCTURAL)
    moments_dtype: str = field(default="", metadata=STRUCTURAL)
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
        check(self, b1=PART, b2=PART, momentum=PART, ema=PART, eps=POSITIVE)
        check(self, min_dim_to_factor=COUNT, accumulate=COUNT)


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

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

from mmjax.bounds import AMOUNT, COUNT, FRACTION, PART, POSITIVE, check
from mmjax.errors import UserError, nearest
from mmjax.parameters import Arrays, Spec
from mmjax.rules import RuleConfig, apply_rules
from mmjax.transforms import Axes, LeafState, leaf_transform, wide
from mmjax.views import OWN_MOMENTS, SHARED, View, in_common, own_name


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
      decay: `cosine` or `linear`, to `final` times the peak at the end of the run; or `constant`.
      b1, b2, eps: Adam's; the first two are Lion's as well.
      momentum: Muon's.
      factored: Adafactor keeps rows and columns apart in matrices with no side below this.
      moments_dtype: of first moments, `bfloat16` or `float32`; empty for the parameters' own. Second moments are
        float32 or wider, like averages and sums: a bfloat16 average whose weight is 0.999 stands still.
      weight_decay: decoupled, times the learning rate; on matrices only, unless a rule says otherwise.
      clip: bound of the norm of the gradient of all that a step moves; 0 for none.
      unit: what `warmup` and the decay count: `steps` of the run, `examples` of all tasks, or `visits`
        (each task its own: its rate falls to `final` by its last visit in the config's schedule, under
        `budget` that by model FLOPs. Where measured times or a quarantine give it more visits, the rate
        stays at `final` for these; where fewer, it ends above).
      view: of tasks that name none (see `mmjax.views.View`).
      rules: by parameter path.
      ema: decay of an exponential moving average of the parameters, kept in buffers and used by
        evaluation; 0 for none.
      accumulate: steps whose gradients make one update, of their mean, whatever their tasks. At the
        length of the schedule's period this is the gradient of the tasks' losses summed by their
        shares, the baseline of AGD; every view must be `shared` then. A step whose loss or gradient is not
        finite, or whose batch has no valid row, is no part of the mean; a round that the run's end cuts short is
        applied.
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
    unit: str = "steps"
    view: str = SHARED
    rules: tuple[RuleConfig, ...] = ()
    ema: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        check(
            self,
            learning_rate=AMOUNT,
            warmup=AMOUNT,
            final=FRACTION,
            weight_decay=AMOUNT,
            clip=AMOUNT,
        )
        check(self, b1=PART, b2=PART, momentum=PART, ema=PART, eps=POSITIVE)
        check(self, factored=COUNT, accumulate=COUNT)


# The tick of a step that each unit counts by. Examples come as parts of the run's, since there may be
# more of them than 32 bits hold.
UNITS = {"steps": "step", "examples": "part", "visits": "visit"}
PARTS = 2**30
# Ticks that say how long the warm-up and the decay are, in the unit, and a phase's factor of the rate. They are
# arguments of a program, so that a run of another length needs no other program.
EXTENT = ("length", "warmup", "scale")
_MOST = 2**31 - 1

# What is left of the peak after a part of the decay, in [0, 1], that ends at `final`.
DECAYS: Mapping[str, Callable[[Any, float], Any]] = {
    "cosine": lambda part, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * part)),
    "linear": lambda part, final: 1 - (1 - final) * part,
    "constant": lambda part, final: jnp.ones_like(part),
}


@struct.dataclass
class Updated:
    """Parameters and optimizer state after an update, and scalars to report."""

    parameters: Arrays
    optimizer: dict[str, LeafState]
    metrics: dict[str, jax.Array]


class Optimizer:
    """See `OptimizerConfig`."""

    def __init__(
        self,
        config: OptimizerConfig,
        specs: Mapping[str, Spec],
        length: Callable[[str], int],
        views: Mapping[str, View],
        common: frozenset[str] | None = None,
    ):
        """An optimizer of the parameters in `specs`.

        Args:
          length: of the run for a task, in `config.unit`.
          views: of the tasks.
          common: the parameters of whose state tasks have one in common; those that a view moves, if None.
        """
        if config.unit not in UNITS:
            raise UserError(f"optimizer.unit: no '{config.unit}'.{nearest(config.unit, UNITS)}")
        learning_rate(config, 1)  # what is wrong with it is said now
        self.config, self.specs, self.views = config, specs, views
        self._length = length
        self._rules = apply_rules(config.rules, specs)
        self._leaves = {name: leaf_transform(config, spec) for name, spec in specs.items()}
        self._common = in_common(views) if common is None else common

    def init(self, parameters: Arrays) -> dict[str, LeafState]:
        """The state that tasks have in common, of every leaf that has such. Meant to be jitted."""
        return {n: self._init_leaf(n, p) for n, p in parameters.items() if n in self._common}

    def init_own(self, parameters: Arrays) -> dict[str, LeafState]:
        """The tasks' own state, by `own_name`. Meant to be jitted."""
        return {
            own_name(task, n): self._init_leaf(n, parameters[n])
            for task, view in self.views.items()
            if view.kind == OWN_MOMENTS
            for n in sorted(view.moves)
        }

    @property
    def accumulates(self) -> frozenset[str]:
        """The parameters whose gradients are summed over several steps, if any are."""
        return self._common if self.config.accumulate > 1 else frozenset()

    def axes(self, name: str) -> dict[str, Axes]:
        """Logical axes of the state of a leaf, by field."""
        layers: Axes = ("layers",) if self.specs[name].stack else ()
        return {field: layers + axes for field, axes in self._leaves[name].fields.items()}

    @property
    def ticks(self) -> frozenset[str]:
        """Names of the ticks that an update reads: those of `rate`, and whether the step is the run's last one."""
        last = ["last"] if self.accumulates else []
        return frozenset({UNITS[self.config.unit], *EXTENT, *last})

    def extent(self, task: str) -> dict[str, float]:
        """Return the ticks of `EXTENT` for a task, under a factor of 1."""
        length, warmup = self._length(task), self.config.warmup
        if self.config.unit == "examples":
            # No warm-up is longer than the run.
            warmup, length = min(warmup * PARTS // length, PARTS), PARTS
        return {"length": min(length, _MOST), "warmup": min(warmup, _MOST), "scale": 1.0}

    def rate(self, task: str, ticks: Mapping[str, Any]) -> jax.Array:
        """Return the learning rate of a task's step, from numbers alone; ticks of `EXTENT` may be left out."""
        if not set(EXTENT) <= ticks.keys():
            ticks = {**self.extent(task), **ticks}
        count, warmup = ticks[UNITS[self.config.unit]], ticks["warmup"]
        return learning_rate(self.config, ticks["length"], warmup)(count) * ticks["scale"]

    def update(
        self, grads: Arrays, state: Mapping[str, LeafState], parameters: Arrays, rate: jax.Array
    ) -> Updated:
        """One update of the parameters that have a gradient; all else stays as it is, its state too.

        Clip over all of them, then the transform and decoupled weight decay leaf by leaf, in float32 or wider. A
        bfloat16 parameter is rounded after its step: what is below half of its last place (1/512 of its value) is
        lost, so that small rates move large parameters not at all.
        """
        grads = {name: g.astype(wide(g.dtype)) for name, g in grads.items()}
        norm = optax.tree.norm(grads)
        clip = self.config.clip
        factor = jnp.where(norm > clip, clip / norm, 1.0) if clip else jnp.ones_like(norm)
        updated = {
            name: self._update_leaf(
                name, g * factor.astype(g.dtype), state[name], parameters[name], rate
            )
            for name, g in grads.items()
        }
        metrics = {"grad_norm": norm, "learning_rate": rate}
        return Updated(
            {**parameters, **{n: u[0] for n, u in updated.items()}},
            {**state, **{n: u[1] for n, u in updated.items()}},
            metrics,
        )

    def _init_leaf(self, name: str, parameter: jax.Array) -> LeafState:
        init = self._leaves[name].init
        return jax.vmap(init)(parameter) if self.specs[name].stack else init(parameter)

    def _update_leaf(
        self, name: str, grad: jax.Array, state: LeafState, parameter: jax.Array, rate: Any
    ) -> tuple[jax.Array, LeafState]:
        rule = self._rules[name]
        rates = rate * jnp.asarray(rule.scale, rate.dtype)
        decays = jnp.asarray(self.config.weight_decay * rule.decays, wide(parameter.dtype))

        def update(
            g: jax.Array, s: LeafState, p: jax.Array, rate: jax.Array, decay: jax.Array
        ) -> tuple[jax.Array, LeafState]:
            direction, after = self._leaves[name].update(g, s, p)
            precise = p.astype(wide(p.dtype))
            step = -rate * (direction + decay * precise)
            return (precise + step.astype(precise.dtype)).astype(p.dtype), after

        each = jax.vmap(update) if self.specs[name].stack else update
        return each(grad, state, parameter, rates, decays)


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
        after = decay(_ratio(jnp.clip(count - warmup, 0, tail), tail), config.final)
        return config.learning_rate * jnp.where(count < warmup, before, after)

    return rate


def _ratio(part: Any, whole: Any) -> jax.Array:
    """Return the quotient of two integers, in the default floating-point dtype."""
    dtype = jnp.result_type(float)
    return jnp.asarray(part, dtype) / jnp.asarray(whole, dtype)

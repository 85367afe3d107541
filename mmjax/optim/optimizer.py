"""The optimizer: Optax per parameter leaf, so that each has its own state and its own count.

Adding a task never changes the tree of a leaf's state, and a stacked leaf is updated layer by layer, as
if its layers stood apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import Arrays, Spec
from mmjax.optim.config import OptimizerConfig, learning_rate
from mmjax.optim.rules import apply_rules
from mmjax.optim.transforms import Axes, LeafState, wide
from mmjax.optim.views import OWN_MOMENTS, UpdateScope, shared_parameters, task_state_name

# The tick of a step that each unit counts by. Examples come as parts of the run's, since there may be
# more of them than 32 bits hold.
UNITS = {"steps": "step", "examples": "part", "visits": "visit"}
PARTS = 2**30
# Ticks for the lengths of the warm-up and the decay, in the unit, and a phase's factor of the rate. They are
# arguments of a program, so that a run of another length needs no other program.
EXTENT = ("length", "warmup", "scale")
_MOST = 2**31 - 1


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
        views: Mapping[str, UpdateScope],
        common: frozenset[str] | None = None,
        buffers: Mapping[str, Spec] = MappingProxyType({}),
    ):
        """Make an optimizer of the parameters in `specs`.

        Args:
          length: of the run for a task, in `config.unit`.
          views: of the tasks.
          common: the parameters of whose state tasks have one in common; those that a view moves, if None.
          buffers: the model's, which rules may freeze.
        """
        if config.unit not in UNITS:
            raise UserError(f"optimizer.unit: no '{config.unit}'.{nearest(config.unit, UNITS)}")
        learning_rate(config, 1)  # raises now what is wrong with it
        self.config, self.specs, self.views = config, specs, views
        self._length = length
        self._rules = apply_rules(config.rules, {**specs, **buffers})
        self.frozen_buffers = frozenset(n for n in buffers if self._rules[n].frozen)
        self._leaves = {n: config.algorithm.transform(spec) for n, spec in specs.items()}
        self._common = shared_parameters(views) if common is None else common

    def init(self, parameters: Arrays) -> dict[str, LeafState]:
        """Return the state that tasks have in common, of every leaf that has such. Meant to be jitted."""
        return {n: self._init_leaf(n, p) for n, p in parameters.items() if n in self._common}

    def init_own(self, parameters: Arrays) -> dict[str, LeafState]:
        """Return the tasks' own state, by `task_state_name`. Meant to be jitted."""
        return {
            task_state_name(task, n): self._init_leaf(n, parameters[n])
            for task, view in self.views.items()
            if view.kind == OWN_MOMENTS
            for n in sorted(view.trains)
        }

    @property
    def accumulates(self) -> frozenset[str]:
        """The parameters whose gradients are summed over several steps, if any are."""
        return self._common if self.config.accumulate > 1 else frozenset()

    def axes(self, name: str) -> dict[str, Axes]:
        """Return the logical axes of the state of a leaf, by field."""
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
        """Return the learning rate of a task's step, from numbers alone; ticks of `EXTENT` are optional."""
        if not set(EXTENT) <= ticks.keys():
            ticks = {**self.extent(task), **ticks}
        count, warmup = ticks[UNITS[self.config.unit]], ticks["warmup"]
        return learning_rate(self.config, ticks["length"], warmup)(count) * ticks["scale"]

    def update(
        self, grads: Arrays, state: Mapping[str, LeafState], parameters: Arrays, rate: jax.Array
    ) -> Updated:
        """Update the parameters that have a gradient; all else stays as it is, its state too.

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

        update_layers = jax.vmap(update) if self.specs[name].stack else update
        return update_layers(grad, state, parameter, rates, decays)

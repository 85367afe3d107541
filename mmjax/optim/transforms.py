"""An Optax transform of one parameter, and how its state lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax.core.parameters import Spec

LeafState = dict[str, jax.Array]
Axes = tuple[str | None, ...]


def wide(dtype: Any) -> Any:
    """Return the dtype in which sums, averages and second moments of values of `dtype` are kept: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclass(frozen=True)
class LeafTransform:
    """An Optax transform of one parameter; of a stacked parameter, of one of its layers.

    Attributes:
      transform: turns gradients into directions; the step goes against them.
      shape: the shape in which the transform sees the parameter.
      fields: what its state keeps between steps: name -> logical axes. What else Optax holds is
        constant, and recomputed by each step.
      moments: dtype in which `mu` is kept between steps; empty for the parameter's. All else is kept, and everything
        is computed, in float32 or wider.
    """

    transform: optax.GradientTransformation
    shape: tuple[int, ...]
    fields: Mapping[str, Axes]
    moments: str = ""

    def init(self, parameter: jax.Array) -> LeafState:
        """Return the state at step 0."""
        return self._state(self.transform.init(self._shaped(parameter)), parameter.dtype)

    def update(
        self, grad: jax.Array, state: LeafState, parameter: jax.Array
    ) -> tuple[jax.Array, LeafState]:
        """Return the direction, in the parameter's shape and float32 or wider, and the state after it."""
        shaped = self._shaped(parameter)
        pairs, tree = jax.tree_util.tree_flatten_with_path(self.transform.init(shaped))
        # In the dtype that Optax computes in: it would multiply a bfloat16 moment in bfloat16.
        leaves = [state.get(_field(path), leaf).astype(leaf.dtype) for path, leaf in pairs]
        moments = jax.tree_util.tree_unflatten(tree, leaves)
        direction, after = self.transform.update(self._shaped(grad), moments, shaped)
        return jnp.reshape(direction, parameter.shape), self._state(after, parameter.dtype)

    def _shaped(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.shape).astype(wide(x.dtype))

    def _state(self, state: Any, dtype: Any) -> LeafState:
        pairs, _ = jax.tree_util.tree_flatten_with_path(state)
        fields = {_field(path): leaf for path, leaf in pairs if _field(path) in self.fields}
        if "mu" in fields:
            fields["mu"] = fields["mu"].astype(self.moments or dtype)
        return fields


def layer_shape(spec: Spec) -> tuple[tuple[int, ...], Axes]:
    """Return shape and logical axes of a parameter, of one of its layers where it is stacked."""
    skip = 1 if spec.stack else 0
    return spec.shape[skip:], spec.axes[skip:]


def as_matrix(spec: Spec) -> tuple[tuple[int, ...], Axes]:
    """Return shape and logical axes of a parameter (of one layer, if stacked) with heads joined to their size.

    Attention's `[D, heads, K]` is the matrix `[D, heads * K]`, its `[heads, K, D]` is
    `[heads * K, D]`; leading axes (experts) index separate matrices.
    """
    shape: list[int] = []
    axes: list[str | None] = []
    joins = False
    for size, axis in zip(*layer_shape(spec), strict=True):
        if joins:
            shape[-1] *= size
        else:
            shape.append(size)
            axes.append(axis)
        joins = axis == "heads"
    return tuple(shape), tuple(axes)


def _field(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf of an Optax state: the last attribute on the way to it."""
    return next(key.name for key in reversed(path) if hasattr(key, "name"))

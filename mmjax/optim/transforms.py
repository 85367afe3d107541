"""The optimizers by name: what the gradient of one parameter goes through, and how its state lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import Spec
from mmjax.optim.config import OptimizerConfig

LeafState = dict[str, jax.Array]
Axes = tuple[str | None, ...]

# Size of Muon's update relative to Adam's, after Liu et al. (2025): one learning rate and one weight
# decay then serve the matrices and the rest.
_MUON_RMS = 0.2


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
        constant, and made anew by each step.
      moments: dtype in which `mu` is kept between steps; empty for the parameter's. All else is kept, and everything
        is computed, in float32 or wider.
    """

    transform: optax.GradientTransformation
    shape: tuple[int, ...]
    fields: Mapping[str, Axes]
    moments: str = ""

    def init(self, parameter: jax.Array) -> LeafState:
        """The state at step 0."""
        return self._kept(self.transform.init(self._shaped(parameter)), parameter.dtype)

    def update(
        self, grad: jax.Array, state: LeafState, parameter: jax.Array
    ) -> tuple[jax.Array, LeafState]:
        """Return the direction, in the parameter's shape and float32 or wider, and the state after it."""
        shaped = self._shaped(parameter)
        pairs, tree = jax.tree_util.tree_flatten_with_path(self.transform.init(shaped))
        # In the dtype that Optax computes in: it would multiply a bfloat16 moment in bfloat16.
        leaves = [state.get(_field(path), leaf).astype(leaf.dtype) for path, leaf in pairs]
        held = jax.tree_util.tree_unflatten(tree, leaves)
        direction, after = self.transform.update(self._shaped(grad), held, shaped)
        return jnp.reshape(direction, parameter.shape), self._kept(after, parameter.dtype)

    def _shaped(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.shape).astype(wide(x.dtype))

    def _kept(self, state: Any, dtype: Any) -> LeafState:
        pairs, _ = jax.tree_util.tree_flatten_with_path(state)
        kept = {_field(path): leaf for path, leaf in pairs if _field(path) in self.fields}
        if "mu" in kept:
            kept["mu"] = kept["mu"].astype(self.moments or dtype)
        return kept


def leaf_transform(config: OptimizerConfig, spec: Spec) -> LeafTransform:
    """The transform of a parameter under the optimizer that the config names."""
    if config.name not in _MAKERS:
        raise UserError(f"optimizer.name: no '{config.name}'.{nearest(config.name, _MAKERS)}")
    if config.moments_dtype not in ("", "float32", "bfloat16"):
        raise UserError(
            f"optimizer.moments_dtype is '{config.moments_dtype}'; expected 'float32', 'bfloat16' or ''."
        )
    if config.moments_dtype and config.name == "adafactor":
        raise UserError("optimizer.moments_dtype: adafactor keeps no first moment. Leave it out.")
    return _MAKERS[config.name](config, spec)


def as_matrix(spec: Spec) -> tuple[tuple[int, ...], Axes]:
    """Shape and logical axes of a parameter (of one layer, where stacked) with heads joined to their size.

    Attention's `[D, heads, K]` is the matrix `[D, heads * K]`, its `[heads, K, D]` is
    `[heads * K, D]`; what stands before the last two axes (experts) are matrices side by side.
    """
    skip = 1 if spec.stack else 0
    shape: list[int] = []
    axes: list[str | None] = []
    joins = False
    for size, axis in zip(spec.shape[skip:], spec.axes[skip:], strict=True):
        if joins:
            shape[-1] *= size
        else:
            shape.append(size)
            axes.append(axis)
        joins = axis == "heads"
    return tuple(shape), tuple(axes)


def _adamw(config: OptimizerConfig, spec: Spec) -> LeafTransform:
    """Loshchilov and Hutter (2019)."""
    transform = optax.scale_by_adam(config.b1, config.b2, config.eps)
    shape, axes = _own(spec)
    fields = {"count": (), "mu": axes, "nu": axes}
    return LeafTransform(transform, shape, fields, config.moments_dtype)


def _lion(config: OptimizerConfig, spec: Spec) -> LeafTransform:
    """Chen et al. (2023), algorithm 2."""
    shape, axes = _own(spec)
    transform = optax.scale_by_lion(config.b1, config.b2)
    return LeafTransform(transform, shape, {"count": (), "mu": axes}, config.moments_dtype)


def _muon(config: OptimizerConfig, spec: Spec) -> LeafTransform:
    """Jordan (2024), with the update's size of Liu et al. (2025); AdamW where no trunk's matrix is."""
    shape, axes = as_matrix(spec)
    if spec.stack is None or len(shape) < 2:
        return _adamw(config, spec)
    sides = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    transform = optax.chain(
        contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=sides),
        optax.scale(math.sqrt(max(shape[-2:])) * _MUON_RMS),
    )
    return LeafTransform(transform, shape, {"count": (), "mu": axes}, config.moments_dtype)


def _adafactor(config: OptimizerConfig, spec: Spec) -> LeafTransform:
    """Shazeer and Stern (2018), algorithms 4 and 5, without a first moment."""
    shape, axes = as_matrix(spec)
    transform = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=config.min_dim_to_factor),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    if len(shape) < 2 or sorted(shape)[-2] < config.min_dim_to_factor:
        return LeafTransform(transform, shape, {"count": (), "v": axes})
    # As Optax chooses: the row statistics lose the largest axis, the column statistics the next.
    second, largest = np.argsort(shape)[-2:]
    fields = {
        "count": (),
        "v_row": tuple(a for i, a in enumerate(axes) if i != largest),
        "v_col": tuple(a for i, a in enumerate(axes) if i != second),
    }
    return LeafTransform(transform, shape, fields)


_MAKERS: Mapping[str, Callable[[OptimizerConfig, Spec], LeafTransform]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _own(spec: Spec) -> tuple[tuple[int, ...], Axes]:
    skip = 1 if spec.stack else 0
    return spec.shape[skip:], spec.axes[skip:]


def _field(path: tuple[Any, ...]) -> str:
    """The name of a leaf of an Optax state: the last attribute on the way to it."""
    return next(key.name for key in reversed(path) if hasattr(key, "name"))

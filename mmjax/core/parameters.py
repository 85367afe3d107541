"""Parameters: declared by modules, kept as a flat dict of arrays, stored under canonical names.

A module declares `nnx.Param`s that hold shapes, not arrays. `Declaration` splits a model once into its
graph definition and specifications; from then on parameters are `dict[str, Array]`, and `merge` makes
the callable model inside a traced function.

A group of layers run by `lax.scan` holds one stacked array for all its repeats. Its canonical names have
the layer's own index in place of the group's, so a checkpoint does not depend on the grouping.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Arrays = dict[str, jax.Array]
Initializer = Callable[..., jax.Array]
Fold = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    *,
    keep_dtype: bool = False,
    decay: bool | None = None,
) -> nnx.Param:
    """Declare a parameter.

    Args:
      shape: its shape.
      axes: one logical axis name per dimension, resolved only in `mmjax.core.sharding`.
      init: `init(key, shape, dtype)`.
      keep_dtype: stay in the parameter dtype when the model computes in a lower precision.
      decay: whether weight decay applies; by default to matrices (two or more axes) only.
    """
    assert len(shape) == len(axes), (shape, axes)
    decay = len(shape) >= 2 if decay is None else decay
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, jnp.float32),
        axes=axes,
        init=init,
        keep_dtype=keep_dtype,
        decay=decay,
        stack=None,
        copies=1,
    )


@dataclass(frozen=True)
class LayerStack:
    """The places of a stacked parameter's repeats among the layers: index of repeat r = first + r * stride."""

    first: int
    stride: int
    repeat: int
    prefix: str
    inner: str

    def names(self) -> list[str]:
        return [
            f"{self.prefix}/{self.first + r * self.stride:03d}/{self.inner}"
            for r in range(self.repeat)
        ]


def stack_copies(module: nnx.Module, count: int, axis: str) -> None:
    """Add a leading axis of size `count` to a module's declarations, in place; each copy gets its own key."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            value, meta = node.get_raw_value(), node.get_metadata()
            node.set_raw_value(jax.ShapeDtypeStruct((count, *value.shape), value.dtype))
            node.set_metadata(axes=(axis, *meta["axes"]), init=_per_copy(meta["init"]))


def _per_copy(init: Initializer) -> Initializer:
    def many(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        keys = jax.random.split(key, shape[0])
        return jax.vmap(lambda k: init(k, shape[1:], dtype))(keys)

    return many


def mark_copies(part: nnx.Module | nnx.Param, of: float) -> None:
    """Mark a part's declarations, in place, as one of `of` copies, of which a token meets one.

    A token may meet more or less than one expert: `of` is then their count divided by that.
    """
    nodes = [part] if isinstance(part, nnx.Param) else [node for _, node in nnx.iter_graph(part)]
    for node in nodes:
        if isinstance(node, nnx.Param):
            node.set_metadata(copies=of * node.get_metadata()["copies"])


@dataclass(frozen=True)
class Spec:
    """A parameter's specification: shape and axes as held (stacked), and its canonical names.

    `copies` is how many of its kind there are, of which a token meets one. A `frozen` one is trained only where a rule
    of the optimizer states so.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    keep_dtype: bool
    decay: bool
    stack: LayerStack | None
    copies: float = 1
    frozen: bool = False

    @property
    def canonical(self) -> list[str]:
        return self.stack.names() if self.stack else [self.name]


class Declaration:
    """A model split once: `specs` by name, and `merge` back to a callable module."""

    def __init__(self, model: nnx.Module):
        self._graph, state = nnx.split(model)
        self._variables = {
            "/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)
        }
        self.specs = {
            name: _spec(name, variable) for name, (_, variable) in self._variables.items()
        }
        _check_unique(self.specs)
        self._fold: Fold = dict

    def extend(self, specs: Mapping[str, Spec], fold: Fold) -> None:
        """Add or replace specifications; `fold` makes the arrays of the model of all arrays, before each pass."""
        self.specs = {**self.specs, **specs}
        _check_unique(self.specs)
        self._fold = fold

    def shapes(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shape of every parameter, by name."""
        return {n: jax.ShapeDtypeStruct(spec.shape, dtype) for n, spec in self.specs.items()}

    def merge(self, parameters: Mapping[str, jax.Array], compute_dtype: Any = None) -> Any:
        """Return the model with these arrays; floating ones cast to `compute_dtype` unless declared `keep_dtype`."""
        parameters, pairs = self._fold(parameters), []
        for name, (path, variable) in self._variables.items():
            value = jnp.asarray(parameters[name])  # of a file, perhaps
            if compute_dtype is not None and not self.specs[name].keep_dtype:
                value = value.astype(compute_dtype)
            pairs.append((path, variable.replace(value)))
        return nnx.merge(self._graph, nnx.from_flat_state(pairs))

    def initialise(self, seed: int, dtype: Any = jnp.float32) -> Arrays:
        """Return initial parameters; each depends on (seed, canonical name) only. Meant to be jitted."""
        key = jax.random.key(seed)
        return {name: _initial(spec, key, dtype) for name, spec in self.specs.items()}


def _spec(name: str, variable: Any) -> Spec:
    meta = variable.get_metadata()
    stack = meta["stack"]
    if stack is not None:
        # A trunk's names read `PREFIX/groups/G/blocks/B/INNER`.
        prefix, inner = name.split("/groups/", 1)
        first, stride, repeat = stack
        stack = LayerStack(first, stride, repeat, f"{prefix}/layers", inner.split("/", 3)[3])
    return Spec(
        name=name,
        shape=variable.shape,
        stack=stack,
        **{key: meta[key] for key in ("axes", "init", "keep_dtype", "decay", "copies")},
    )


def stack_layers(block: nnx.Module, first: int, stride: int, repeat: int) -> None:
    """Turn a block's declarations into stacked ones for `repeat` layers (in place)."""
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        assert variable.get_metadata()["stack"] is None, "groups do not nest"
    for _, node in nnx.iter_graph(block):
        if isinstance(node, nnx.Param):
            value = node.get_raw_value()
            node.set_raw_value(jax.ShapeDtypeStruct((repeat, *value.shape), value.dtype))
            node.set_metadata(
                axes=("layers", *node.get_metadata()["axes"]), stack=(first, stride, repeat)
            )


def _check_unique(specs: Mapping[str, Spec]) -> None:
    names = [c for spec in specs.values() for c in spec.canonical]
    assert len(names) == len(set(names)), "two parameters share a canonical name"


def _initial(spec: Spec, key: jax.Array, dtype: Any) -> jax.Array:
    folds = np.array([zlib.crc32(name.encode()) for name in spec.canonical], np.uint32)
    if spec.stack is None:
        return spec.init(jax.random.fold_in(key, folds[0]), spec.shape, dtype)
    keys = jax.vmap(lambda fold: jax.random.fold_in(key, fold))(folds)
    return jax.vmap(lambda k: spec.init(k, spec.shape[1:], dtype))(keys)


# --- canonical form ----------------------------------------------------------------------------


def to_canonical(specs: Mapping[str, Spec], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return canonical name -> value as a dict; `tree` has a pytree per parameter, its leaves stacked where it is."""
    result = {}
    for name, value in tree.items():
        spec = specs[name]
        for r, canonical in enumerate(spec.canonical):
            result[canonical] = jax.tree.map(lambda x, r=r: x[r], value) if spec.stack else value
    return result


def from_canonical(
    specs: Mapping[str, Spec], flat: Mapping[str, Any], names: Any = None
) -> dict[str, Any]:
    """Return the inverse of `to_canonical`, for the parameters in `names` (default all)."""
    result = {}
    for name in specs if names is None else names:
        values = [flat[c] for c in specs[name].canonical]
        result[name] = (
            jax.tree.map(lambda *x: jnp.stack(x), *values) if specs[name].stack else values[0]
        )
    return result


def digest(canonical: Mapping[str, np.ndarray]) -> str:
    """Return a stable SHA-256 of named arrays: name, dtype, shape and little-endian bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(canonical):
        array = np.asarray(canonical[name])
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()

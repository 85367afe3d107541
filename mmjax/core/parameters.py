"""Parameters: declared by modules, kept as a flat dict of arrays, stored under canonical names.

A module declares `nnx.Param`s that hold shapes, not arrays. `Declaration` splits a model once into its
graph definition and specifications; from then on parameters are `dict[str, Array]`, and `merge` makes
the callable model inside a traced function.

A group of layers run by `lax.scan` holds one stacked array for all its repeats. Its canonical names have
the layer's own index in place of the group's, so a checkpoint does not depend on the grouping.

A buffer is an array that a forward pass reads and no gradient moves: `declare_buffer`. The state and checkpoints
hold it under `stat/NAME`, beside the parameters.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from mmjax.core.errors import UserError, nearest
from mmjax.core.teachers import TEACHER

Arrays = dict[str, jax.Array]
Initializer = Callable[..., jax.Array]
Settle = Callable[[jax.Array, Arrays, jax.Array], jax.Array]
Field = tuple[tuple[int, ...], tuple[str | None, ...]]  # shape and logical axes
STAT = "stat/"  # begins the name of a buffer among the arrays of a model
COUNT = "steps"  # beside the summed statistics of a buffer: how many steps proposed them
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
        compute="",
    )


def compute_in(module: nnx.Module, dtype: str) -> None:
    """Let a module's declarations be cast to `dtype`, in place, whatever the model computes in."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            node.set_metadata(compute=dtype)


@struct.dataclass
class Rows:
    """Statistics of a `replace` buffer: arrays with a row for each row of the whole batch."""

    fields: Arrays


class Buffer(nnx.Variable[Any]):
    """An array that forward passes read and that the step settles, once per update; made by `declare_buffer`."""

    def propose(self, statistics: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `Aux.proposals` or `Loss.proposals` takes: these statistics, for this buffer.

        They are float32 or wider, and have no gradient. Rows that do not exist must weigh 0 in them.
        """
        meta = self.get_metadata()
        path, declared, replaces = meta["path"], dict(meta["statistics"]), meta["replace"]
        if path is None:
            raise ValueError("a buffer proposes within a model that `Declaration` has made")
        if statistics.keys() != declared.keys():
            raise UserError(
                f"buffer '{path}': statistics {_words(statistics)} are proposed; it declares {_words(declared)}."
            )
        fields = {name: _precise(jax.lax.stop_gradient(x)) for name, x in statistics.items()}
        for name, x in fields.items():
            shape = x.shape[1:] if replaces else x.shape
            if shape != declared[name][0]:
                raise UserError(
                    f"buffer '{path}': statistic '{name}' has the shape {list(shape)}; "
                    f"it declares {list(declared[name][0])}."
                )
        return {path: Rows(fields) if replaces else fields}


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"


def _precise(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def declare_buffer(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    settle: Settle,
    statistics: Mapping[str, Field],
    *,
    replace: bool = False,
) -> Buffer:
    """Declare a buffer: float32 or wider, never below the parameters' dtype.

    A forward pass reads it as any variable, `self.NAME[...]`, and proposes statistics by `self.NAME.propose`. These
    add up over calls, micro-batches, devices and accumulated steps.

    Args:
      shape: its shape.
      axes: one logical axis name per dimension.
      init: `init(key, shape, dtype)`.
      settle: a pure function `settle(old, statistics, key) -> new`, called once per update that has statistics.
      statistics: shape and axes of each statistic.
      replace: the statistics are not sums but rows `[B, ...]` of the whole batch, `statistics` then giving the
        shape of one; a second proposal in one step is an error.
    """
    assert len(shape) == len(axes), (shape, axes)
    assert all(len(size) == len(names) for size, names in statistics.values()), statistics
    assert statistics, "a buffer without statistics never changes"
    assert COUNT not in statistics, f"a statistic cannot have the name '{COUNT}'"
    return Buffer(
        jax.ShapeDtypeStruct(shape, jnp.float32),
        axes=axes,
        init=init,
        settle=settle,
        statistics=tuple(sorted(statistics.items())),
        replace=replace,
        stack=None,
        path=None,
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
        if isinstance(node, nnx.Param | Buffer):
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

    `copies` is how many of its kind there are, of which a token meets one; `compute` the dtype it is cast to, that of
    the model if empty. A `frozen` one is trained only where a rule of the optimizer states so.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    keep_dtype: bool
    decay: bool
    stack: LayerStack | None
    copies: float = 1
    compute: str = ""
    frozen: bool = False

    @property
    def canonical(self) -> list[str]:
        return self.stack.names() if self.stack else [self.name]


def _no_settle(old: jax.Array, statistics: Arrays, key: jax.Array) -> jax.Array:
    del statistics, key
    return old


@dataclass(frozen=True)
class BufferSpec(Spec):
    """A buffer's specification, see `declare_buffer`.

    Its `name` and canonical names are those of a parameter at its place; among arrays `stat/` stands before them.
    """

    settle: Settle = _no_settle
    statistics: Mapping[str, Field] = field(default_factory=dict)
    replace: bool = False


S = TypeVar("S", bound=Spec)


class Declaration:
    """A model split once: `specs` of its parameters and `buffers` by name, and `merge` back to a callable module.

    Attributes:
      specs: of the parameters.
      buffers: of the buffers, by their name without `stat/`.
      teachers: the parameters that each teacher copies, by its name (`teach`).
      read: of all arrays that a forward pass reads: parameters by name, buffers by `stat/NAME`, teachers by
        `teacher/TEACHER/NAME`.
      stored: of all arrays of the state by name, without the prefix of averages and sums: `read`, and the statistics
        of a buffer by `stat/NAME/STATISTIC`.
    """

    def __init__(self, model: nnx.Module):
        self._graph, state = nnx.split(model)
        named = {"/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
        self._variables = {
            name: (path, v) for name, (path, v) in named.items() if not isinstance(v, Buffer)
        }
        self._buffers = {name: pair for name, pair in named.items() if name not in self._variables}
        self.specs = {
            name: _spec(name, variable) for name, (_, variable) in self._variables.items()
        }
        self.buffers = {name: _buffer_spec(name, v) for name, (_, v) in self._buffers.items()}
        self._fold: Fold = dict
        self.teachers: Mapping[str, frozenset[str]] = {}
        self._index()

    def _index(self) -> None:
        self.read = {**self.specs, **{STAT + n: _under(STAT, s) for n, s in self.buffers.items()}}
        self.stored = {**self.read, **_statistics_of(self.buffers)}
        _check_unique({**self.specs, **self.buffers})

    def extend(self, specs: Mapping[str, Spec], fold: Fold) -> None:
        """Add or replace specifications; `fold` makes the arrays of the model of all arrays, before each pass."""
        self.specs, self._fold = {**self.specs, **specs}, fold
        self._index()

    def teach(self, teachers: Mapping[str, frozenset[str]]) -> None:
        """Add teachers, which copy parameters; the model then has them as `model.teacher(NAME)`."""
        self.teachers = dict(teachers)
        copies = [
            _under(f"{TEACHER}{teacher}/", self.specs[name])
            for teacher, names in teachers.items()
            for name in sorted(names)
        ]
        self.read |= {spec.name: spec for spec in copies}
        self.stored |= {spec.name: spec for spec in copies}

    def shapes(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shape of every parameter, by name."""
        return {n: jax.ShapeDtypeStruct(spec.shape, dtype) for n, spec in self.specs.items()}

    def buffer_shapes(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of what passes read beside parameters; they are float32 or wider than `dtype`."""
        wide = jnp.promote_types(jnp.float32, dtype)
        beside = {n: s for n, s in self.read.items() if n not in self.specs}
        return {n: jax.ShapeDtypeStruct(s.shape, wide) for n, s in beside.items()}

    def merge(self, parameters: Mapping[str, jax.Array], compute_dtype: Any = None) -> Any:
        """Return the model with these arrays; floating ones cast to `compute_dtype` unless declared `keep_dtype`.

        Args:
          parameters: by name, and the buffers by `stat/NAME`, which keep their dtype and have no gradient; and the
            teachers by `teacher/TEACHER/NAME`, where they are read.
        """
        arrays, parameters, pairs = parameters, self._fold(parameters), []
        for name, (path, variable) in self._variables.items():
            value = jnp.asarray(parameters[name])  # of a file, perhaps
            if compute_dtype is not None and not self.specs[name].keep_dtype:
                value = value.astype(self.specs[name].compute or compute_dtype)
            pairs.append((path, variable.replace(value)))
        for name, (path, variable) in self._buffers.items():
            value = jax.lax.stop_gradient(jnp.asarray(parameters[STAT + name]))
            pairs.append((path, variable.replace(value, path=name)))
        module: Any = nnx.merge(self._graph, nnx.from_flat_state(pairs))
        if self.teachers:
            module.teacher_of = partial(self._taught, arrays, compute_dtype)
        return module

    def _taught(self, arrays: Mapping[str, jax.Array], compute_dtype: Any, teacher: str) -> Any:
        """Return the model with a teacher's parameters in place; nothing in it has a gradient."""
        if teacher not in self.teachers:
            raise UserError(
                f"no teacher '{teacher}' in model.teachers.{nearest(teacher, self.teachers)}"
            )
        copies = {n: f"{TEACHER}{teacher}/{n}" for n in self.teachers[teacher]}
        chosen = {n: arrays[copies.get(n, n)] for n in self.read if not n.startswith(TEACHER)}
        return self.merge(jax.lax.stop_gradient(chosen), compute_dtype)

    def initialise(self, seed: int, dtype: Any = jnp.float32) -> Arrays:
        """Return initial parameters; each depends on (seed, canonical name) only. Meant to be jitted."""
        key = jax.random.key(seed)
        return {name: _initial(spec, key, dtype) for name, spec in self.specs.items()}

    def initial_buffers(self, seed: int, dtype: Any = jnp.float32) -> Arrays:
        """Return initial buffers by `stat/NAME`, for parameters of `dtype`; each depends on (seed, its name) only."""
        key, wide = jax.random.key(seed), jnp.promote_types(jnp.float32, dtype)
        return {n: _initial(s, key, wide) for n, s in self.read.items() if n.startswith(STAT)}


def _spec(name: str, variable: Any) -> Spec:
    meta = variable.get_metadata()
    return Spec(
        name=name,
        shape=variable.shape,
        stack=_stack(name, meta["stack"]),
        **{key: meta[key] for key in ("axes", "init", "keep_dtype", "decay", "copies", "compute")},
    )


def _stack(name: str, stack: tuple[int, int, int] | None) -> LayerStack | None:
    if stack is None:
        return None
    # A trunk's names read `PREFIX/groups/G/blocks/B/INNER`.
    prefix, inner = name.split("/groups/", 1)
    return LayerStack(*stack, f"{prefix}/layers", inner.split("/", 3)[3])


def _buffer_spec(name: str, variable: Any) -> BufferSpec:
    meta = variable.get_metadata()
    return BufferSpec(
        name=name,
        shape=variable.shape,
        stack=_stack(name, meta["stack"]),
        keep_dtype=True,
        decay=False,
        statistics=dict(meta["statistics"]),
        **{key: meta[key] for key in ("axes", "init", "settle", "replace")},
    )


def _under(prefix: str, spec: S) -> S:
    """Return the specification of an array beside the parameters, whose names begin with `prefix`."""
    stack = spec.stack and changed(spec.stack, prefix=prefix + spec.stack.prefix)
    return changed(spec, name=prefix + spec.name, stack=stack)


def _statistics_of(buffers: Mapping[str, BufferSpec]) -> dict[str, Spec]:
    """Return a specification of each statistic that accumulated steps add up, by `stat/NAME/STATISTIC`.

    `COUNT` is the number of steps that have proposed some.
    """
    specs: dict[str, Spec] = {}
    for buffer in (_under(STAT, b) for b in buffers.values() if not b.replace):
        for statistic, (shape, axes) in {**buffer.statistics, COUNT: ((), ())}.items():
            stack = buffer.stack and changed(
                buffer.stack, inner=f"{buffer.stack.inner}/{statistic}"
            )
            name = f"{buffer.name}/{statistic}"
            layers = (stack.repeat,) if stack else ()
            axes = ("layers", *axes) if stack else axes
            specs[name] = Spec(name, (*layers, *shape), axes, jnp.zeros, True, False, stack)
    return specs


def stack_layers(block: nnx.Module, first: int, stride: int, repeat: int) -> None:
    """Turn a block's declarations into stacked ones for `repeat` layers (in place)."""
    for _, variable in nnx.to_flat_state(nnx.state(block)):
        assert variable.get_metadata()["stack"] is None, "groups do not nest"
    for _, node in nnx.iter_graph(block):
        if isinstance(node, nnx.Param | Buffer):
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

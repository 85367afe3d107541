"""Meshes and the one table from logical axis names to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.core.bounds import SIZE, check
from mmjax.core.errors import UserError, nearest

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Logical axis -> mesh axes that share it. A name that is not here is an error; None is never sharded.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "tokens": ("sequence",),
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocabulary": ("tensor",),
    "codes": ("tensor",),
    "positions": (),
    "experts": ("expert",),
    "groups": ("data", "fsdp"),
    "joint": (),
}

_OWN_RULES = "rules:"  # begins the name of a mesh axis of size 1, see `make_mesh`


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 (what is left of the devices).

    Attributes:
      data: devices that share the rows of a batch and hold the same parameters.
      fsdp: devices that share the rows of a batch and the parameters.
      expert: devices that share the experts.
      tensor: devices that share heads and the units of MLPs.
      sequence: devices that share the tokens of a row.
      slices: groups of devices that only a slower network joins; 0 for as many as TPUs report, else 1.
      dcn_axis: the axis that the slices divide, so that no other one crosses that network.
      rules: logical axis -> mesh axes that share it, in place of the entry in `RULES`.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1
    slices: int = 0
    dcn_axis: str = "data"
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, slices=SIZE, **dict.fromkeys(AXES, "[-1, 2147483647]"))
        if self.dcn_axis not in AXES:
            raise UserError(
                f"mesh.dcn_axis: no axis '{self.dcn_axis}'.{nearest(self.dcn_axis, AXES)}"
            )
        for name, axes in self.rules.items():
            if name not in RULES:
                raise UserError(f"mesh.rules: no logical axis '{name}'.{nearest(name, RULES)}")
            for axis in axes:
                if axis not in AXES:
                    raise UserError(f"mesh.rules.{name}: no axis '{axis}'.{nearest(axis, AXES)}")
            if len(set(axes)) < len(axes):
                raise UserError(f"mesh.rules.{name} names an axis twice: {', '.join(axes)}.")


# --- meshes ------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of all `devices` with the axes `AXES`; a size that does not divide them is an error.

    Where the config has rules of its own, the mesh has one more axis, of size 1, whose name holds them: so
    a mesh has one table wherever it goes, in traces and threads too.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    names, grid = list(AXES), device_grid(sizes, config, devices)
    if config.rules:
        names, grid = [*AXES, _encoded(config.rules)], grid[..., None]
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _sizes(config: MeshConfig, devices: int) -> list[int]:
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1."
        )
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not make up the {devices} devices here. "
            "Set --config.mesh.AXIS so that the sizes multiply to it, or one of them to -1."
        )
    return sizes


def device_grid(sizes: Sequence[int], config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array of shape `sizes`, neighbours on the chips' network where it is known.

    Along `config.dcn_axis` the slices follow one another; every other axis stays within one.
    """
    slices = _by_slice(config.slices, devices)
    axis, inner = AXES.index(config.dcn_axis), list(sizes)
    if inner[axis] % len(slices):
        raise UserError(
            f"mesh.{config.dcn_axis} is {inner[axis]}, which {len(slices)} slices do not divide. Set "
            f"--config.mesh.{config.dcn_axis} to a multiple of {len(slices)}, or --config.mesh.dcn_axis to "
            "another axis."
        )
    inner[axis] //= len(slices)
    return np.concatenate(
        [_within_slice(inner, slice_devices) for slice_devices in slices], axis=axis
    )


def _by_slice(count: int, devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices of each slice: as TPUs report them, else runs of equal length."""
    if devices[0].platform != "tpu":
        count = count or 1
        if count < 1 or len(devices) % count:
            raise UserError(
                f"mesh.slices is {count}; it must divide the {len(devices)} devices here."
            )
        return [list(part) for part in np.split(np.asarray(devices), count)]
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if count not in (0, len(slices)):
        raise UserError(
            f"mesh.slices is {count}; the devices here are in {len(slices)}. Set it to that, or remove it."
        )
    return [slices[index] for index in sorted(slices)]


def _within_slice(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


# --- rules -------------------------------------------------------------------------------------


def _encoded(rules: Mapping[str, Sequence[str]]) -> str:
    return _OWN_RULES + ";".join(f"{name}={'+'.join(rules[name])}" for name in sorted(rules))


@lru_cache(maxsize=64)
def _decoded(name: str) -> Mapping[str, tuple[str, ...]]:
    pairs = (rule.split("=") for rule in name.removeprefix(_OWN_RULES).split(";"))
    return {**RULES, **{logical: tuple(filter(None, axes.split("+"))) for logical, axes in pairs}}


def rules_of(mesh: Any) -> Mapping[str, tuple[str, ...]]:
    """Return the table of a mesh, abstract or not: `RULES`, with what its config has in place of them."""
    last = mesh.axis_names[-1]
    return _decoded(last) if last.startswith(_OWN_RULES) else RULES


@dataclass(frozen=True, order=True)
class ReplicatedDim:
    """A dimension of `size` along logical axis `name` that stays whole on a mesh `axis` of `parts`."""

    axis: str
    parts: int
    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.name} {self.size} over {self.axis} {self.parts}"


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Return the partition of an array; a dimension that a mesh axis does not divide stays whole on it."""
    return _resolve(axes, shape, mesh)[0]


def replicated_dims(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> list[ReplicatedDim]:
    """Return the dimensions of an array that stay whole although a rule would divide them."""
    return _resolve(axes, shape, mesh)[1]


def describe_replicated(replicated: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for each thing that stays whole: `heads 4 over tensor 8: a, b and 7 more`."""
    where: dict[str, list[str]] = {}
    for name in replicated:
        for dimension in replicated[name]:
            where.setdefault(dimension, []).append(name)
    lines = []
    for dimension, names in sorted(where.items()):
        others = f" and {len(names) - 2} more" if len(names) > 2 else ""
        lines.append(f"{dimension}: {', '.join(names[:2])}{others}")
    return lines


def _resolve(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any
) -> tuple[PartitionSpec, list[ReplicatedDim]]:
    rules, used, dims = rules_of(mesh), set[str](), list[ReplicatedDim]()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule in mmjax.core.sharding.RULES")
        entry: list[str] = []
        for axis in rules[name] if name else ():
            parts = mesh.shape[axis]
            if parts == 1 or axis in used:
                continue
            if size % (math.prod(mesh.shape[a] for a in entry) * parts) == 0:
                entry.append(axis)
            else:
                dims.append(ReplicatedDim(axis, parts, str(name), size))
        used.update(entry)
        entries.append(tuple(entry) or None)
    return PartitionSpec(*entries), dims


def named(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int, where: str) -> NamedSharding:
    """Return the sharding of rows over all batch axes of the mesh; it is an error if they do not divide."""
    axes = rules_of(mesh)["batch"]
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if rows % parts:
        raise UserError(
            f"{where}: batch {rows} does not divide over the {parts} parts of the mesh axes "
            f"{', '.join(axes)}. Choose a multiple of {parts}."
        )
    return named(("batch",), (rows,), mesh)


_noted: ContextVar[set[ReplicatedDim] | None] = ContextVar("noted", default=None)


@contextmanager
def record_replicated() -> Iterator[set[ReplicatedDim]]:
    """Record which dimensions stay whole in the activations that are traced meanwhile."""
    dims: set[ReplicatedDim] = set()
    token = _noted.set(dims)
    try:
        yield dims
    finally:
        _noted.reset(token)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Hint the sharding of an activation; outside a mesh it does nothing."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec, dims = _resolve(axes, x.shape, mesh)
    recorded = _noted.get()
    if recorded is not None:
        recorded.update(dims)
    return jax.lax.with_sharding_constraint(x, spec)


def whole_along(x: jax.Array, dimension: int) -> jax.Array:
    """Return `x` with this dimension whole on every device, the others as they are; outside a mesh it does nothing."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    entries[dimension] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def split_rows(x: jax.Array, count: int, together: int = 1) -> jax.Array:
    """Reshape `[B, ...]` to `[count, B / count, ...]`: every count-th run of `together` rows, on its device."""
    x = jnp.swapaxes(x.reshape(-1, count, together, *x.shape[1:]), 0, 1)
    x = x.reshape(count, -1, *x.shape[3:])
    return constrain(x, (None, "batch", *(None,) * (x.ndim - 2)))


def joined_rows(x: jax.Array, together: int = 1) -> jax.Array:
    """Return the inverse of `split_rows`."""
    count, rows = x.shape[:2]
    x = jnp.swapaxes(x.reshape(count, rows // together, together, *x.shape[2:]), 0, 1)
    x = x.reshape(count * rows, *x.shape[3:])
    return constrain(x, ("batch", *(None,) * (x.ndim - 1)))


def shard_bytes(tree: Any) -> int:
    """Return the bytes of one device that hold a tree of arrays, concrete or abstract, with their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )

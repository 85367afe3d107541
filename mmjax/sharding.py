"""Meshes and the one table from logical axis names to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmjax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor", "sequence")

# Logical axis -> mesh axes that share it. A name that is not here is an error; None is never sharded.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocabulary": ("tensor",),
    "positions": (),
    "joint": (),
}


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 (what is left of the devices)."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` with the axes `AXES`; a size that does not divide them is an error."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1."
        )
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not make up the {len(devices)} devices here. "
            "Set --config.mesh.AXIS so that the sizes multiply to it, or one of them to -1."
        )
    grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The partition of an array; a dimension that a mesh axis does not divide stays whole on it."""
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule in mmjax.sharding.RULES")
        entry: list[str] = []
        for axis in RULES[name] if name else ():
            parts = math.prod(mesh.shape[a] for a in entry) * mesh.shape[axis]
            if mesh.shape[axis] > 1 and axis not in used and size % parts == 0:
                entry.append(axis)
        used.update(entry)
        entries.append(tuple(entry) or None)
    return PartitionSpec(*entries)


def named(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int, where: str) -> NamedSharding:
    """Rows over all batch axes of the mesh; an error if they do not divide."""
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if rows % parts:
        raise UserError(
            f"{where}: batch {rows} does not divide over the {parts} parts of the mesh axes "
            f"{', '.join(RULES['batch'])}. Choose a multiple of {parts}."
        )
    return named(("batch",), (rows,), mesh)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Hint the sharding of an activation; outside a mesh it does nothing."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh))

"""Groups of devices that a collective joins, and the axes of the mesh that it runs along.

Compiled HLO states it in three ways: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)` (counted up
in the one shape, transposed, and read in the other), and `mesh['a'=2,'b'=2] {'b'}` with perhaps
`device_ids=([2,2]T(1,0))` (groups are along the named axes of a mesh of its own).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((\[[\d,]*\](?:T\([\d,]+\))?)\))? ?\{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_SET = re.compile(r"\{([\d,]*)\}")
_AXIS = re.compile(r"'?([^',=:]+)'?(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True)
class Layout:
    """The mesh that a program is compiled for.

    Attributes:
      axes: sizes of the mesh axes; a device's number counts them up, the last one fastest.
      slices: the slice (or node) of each device, by its number.
    """

    axes: Mapping[str, int]
    slices: Sequence[int]

    @property
    def size(self) -> int:
        return math.prod(self.axes.values())

    @cached_property
    def across(self) -> np.ndarray:
        """The devices that have one place in their slices, in rows [N / slices, slices]."""
        order = np.argsort(np.asarray(self.slices), kind="stable")
        return order.reshape(len(set(self.slices)), -1).T

    @cached_property
    def _places(self) -> np.ndarray:
        return np.stack(np.unravel_index(np.arange(self.size), tuple(self.axes.values())))

    def along(self, groups: np.ndarray) -> str:
        """Return the mesh axes along which the members of groups [G, N] differ: `fsdp`, `data+fsdp`, ..."""
        places = self._places[:, groups]  # [axis, G, N]
        differ = (places != places[:, :, :1]).any(axis=(1, 2))
        return "+".join(a for a, d in zip(self.axes, differ, strict=True) if d) or "none"

    def crosses(self, groups: np.ndarray) -> bool:
        """Return whether a group has members in several slices."""
        slices = np.asarray(self.slices)[groups]
        return bool((slices != slices[:, :1]).any())


def groups_of(attributes: str, size: int) -> np.ndarray:
    """Return the groups [G, N] of device numbers that a collective's attributes name; of a permute, its pairs.

    No groups, or `{}`, means all `size` devices in one.
    """
    if match := _PAIRS.search(attributes):
        return _sets(match[1])
    if match := _MESH.search(attributes):
        return _of_mesh(match[1], match[2], match[3], size)
    if match := _IOTA.search(attributes):
        shape, order = match[1].split("<=")
        return _counted(order).reshape(_numbers(shape))
    match = _LISTED.search(attributes)
    return _sets(match[1]) if match and match[1] else np.arange(size)[None]


def _sets(text: str) -> np.ndarray:
    """Return sets of device numbers, cut to the smallest one's size: enough to see along which axes they lie."""
    rows = [_numbers(inside) for inside in _SET.findall(text)]
    least = min(map(len, rows))
    return np.asarray([row[:least] for row in rows])


def _of_mesh(axes: str, order: str | None, named: str, size: int) -> np.ndarray:
    sizes = {m[0].strip(" '"): int(m[1]) for m in (part.split("=") for part in axes.split(","))}
    ids = (_counted(order) if order else np.arange(size)).reshape(tuple(sizes.values()))
    shape: list[int] = []
    grouped: list[int] = []
    parts = {m[1]: (int(m[2] or 1), int(m[3] or 0)) for m in _AXIS.finditer(named) if m[1].strip()}
    for axis, length in sizes.items():
        before, width = parts.get(axis, (1, 0))
        width = (width or length) if axis in parts else 1
        grouped += [len(shape) + 1] if axis in parts else []
        shape += [before, width, length // (before * width)]
    ids = ids.reshape(shape)
    others = [i for i in range(len(shape)) if i not in grouped]
    return ids.transpose(others + grouped).reshape(-1, math.prod(shape[i] for i in grouped))


def _counted(text: str) -> np.ndarray:
    """Parse groups such as `[4,2]T(1,0)`: 0, 1, ... in the shape, transposed; flat."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))

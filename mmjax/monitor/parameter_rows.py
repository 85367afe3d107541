"""Rows of the table of parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from mmjax.core.parameters import Spec


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: a tower, `stems/NAME` or `heads/NAME`."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] in ("stems", "heads") else parts[0]


def rows_of_config(specs: Mapping[str, Spec]) -> list[dict[str, Any]]:
    """Return the parameter table's rows: total, and per token (one row of a lookup table, one of several copies)."""
    total: dict[str, int] = defaultdict(int)
    active: dict[str, float] = defaultdict(float)
    for spec in specs.values():
        size = math.prod(spec.shape)
        looked_up = [
            n
            for axis, n in zip(spec.axes, spec.shape, strict=True)
            if axis in ("vocabulary", "positions")
        ]
        total[part_of(spec.name)] += size
        active[part_of(spec.name)] += size / math.prod(looked_up) / spec.copies
    return [
        {"part": part, "total": total[part], "active_per_token": round(active[part])}
        for part in sorted(total)
    ]


def rows_of_checkpoint(shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the parameter table from the shapes that a checkpoint holds."""
    total: dict[str, int] = defaultdict(int)
    for name, leaf in shapes.items():
        total[part_of(name)] += math.prod(leaf.shape)
    return [{"part": part, "total": total[part]} for part in sorted(total)]

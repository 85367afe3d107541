"""Buffers of a run: what a step's loss proposes to them, added up and settled once per update.

A buffer is declared in `mmjax.core.parameters.declare_buffer`. The state holds it as `stat/NAME`, its average as
`ema/stat/NAME`, and what accumulated steps have proposed as `sum/stat/NAME/STATISTIC`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import COUNT, STAT, Arrays, BufferSpec, Rows

Proposals = Mapping[str, Any]


def checked(
    proposals: Proposals,
    specs: Mapping[str, BufferSpec],
    frozen: frozenset[str],
    task: str,
    accumulate: int = 1,
) -> Arrays:
    """Return the statistics that a step settles, by `stat/NAME/STATISTIC`; none of a frozen buffer.

    Raises:
      UserError: statistics of a buffer that no module declares; rows, where several steps make one update.
    """
    for name in proposals:
        if name not in specs:
            known = ", ".join(specs) or "none"
            raise UserError(
                f"tasks.{task}: its loss proposes to the buffer '{name}', which no module declares (declared: {known})."
                f"{nearest(name, specs)} Declare it with mmjax.core.parameters.declare_buffer."
            )
    rows = [name for name, s in proposals.items() if isinstance(s, Rows)]
    if rows and accumulate > 1:
        raise UserError(
            f"optimizer.accumulate is {accumulate}, and buffer '{rows[0]}' is replaced by the rows of one step. "
            "Set it to 1, or declare the buffer with statistics that add up."
        )
    fields = {name: s.fields if isinstance(s, Rows) else s for name, s in proposals.items()}
    return {
        f"{STAT}{name}/{statistic}": x
        for name, statistics in fields.items()
        if name not in frozen
        for statistic, x in statistics.items()
    }


def proposed(statistics: Arrays, specs: Mapping[str, BufferSpec]) -> list[str]:
    """Return the names of the buffers that `statistics` are of."""
    return [n for n, s in specs.items() if _first(n, s) in statistics]


def _first(name: str, spec: BufferSpec) -> str:
    return f"{STAT}{name}/{next(iter(spec.statistics))}"


def settled(
    buffers: Arrays, statistics: Arrays, specs: Mapping[str, BufferSpec], seed: int, step: jax.Array
) -> Arrays:
    """Return the new values, by `stat/NAME`, of the buffers that `statistics` are of.

    Each layer of a stacked buffer settles alone, with the key of (seed, its canonical name, step).
    """
    after = {}
    for name in proposed(statistics, specs):
        spec, old = specs[name], buffers[STAT + name]
        fields = {s: statistics[f"{STAT}{name}/{s}"] for s in spec.statistics}
        settle = jax.vmap(spec.settle) if spec.stack else spec.settle
        new = settle(old, fields, _keys(spec, seed, step))
        if new.shape != old.shape:
            raise UserError(
                f"buffer '{name}': its settle returns the shape {list(new.shape)}, expected {list(old.shape)}."
            )
        after[STAT + name] = new.astype(old.dtype)
    return after


def _keys(spec: BufferSpec, seed: int, step: jax.Array) -> jax.Array:
    """Return the key of a buffer's settle, or one for each of its layers."""
    folds = np.array([zlib.crc32((STAT + n).encode()) for n in spec.canonical], np.uint32)

    def key_of(fold: Any) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), fold), step)

    return jax.vmap(key_of)(folds) if spec.stack else key_of(folds[0])


def added(sums: Arrays, statistics: Arrays, counts: jax.Array) -> Arrays:
    """Return the sums with a step's statistics, if it counts; `COUNT` of each buffer that they are of goes up."""
    seen = {name.rpartition("/")[0] for name in statistics}
    steps = {f"{name}/{COUNT}": counts for name in seen}
    return {
        name: total
        + (
            jnp.where(counts, statistics[name], 0).astype(total.dtype)
            if name in statistics
            else steps[name].astype(total.dtype)
            if name in steps
            else jnp.zeros((), total.dtype)
        )
        for name, total in sums.items()
    }

"""Checkpoints of 0.1, 1 and 4 GB: what saving holds up, how fast it is in all, and restoring, against others.

The same arrays (float32, a fifth of them each) are saved by this library's `Checkpoints`, which returns when the arrays
are copied; by Orbax alone (`AsyncCheckpointer`, its defaults); by `torch.save`, and by PyTorch's distributed ones
(DCP, `async_save`), where PyTorch is installed. Asserted: what is restored is what was saved, to the bit. `blocked` is
until the call returns, `saved` until the checkpoint stands. The operating system's cache is as it is: what is written
is read back from memory where that has room.

Rounds are as many as `--pairs` for the smallest, a tenth for the others. The config is not read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from benchmarks._pairs import Effort, Quantity, quantity
from mmjax.engine import checkpoint

SIZES = (0.1, 1.0, 4.0)  # GB
PARTS = 5
OURS = "mmjax"
Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """One way to save and restore.

    Attributes:
      save: begins to save into a folder, and gives what waits for the rest.
      restore: the arrays of a folder.
    """

    save: Callable[[Path], Callable[[], None]]
    restore: Callable[[Path], Arrays]


def measure(effort: Effort) -> list[Quantity]:
    """Return, by size, throughputs, and ratios of times to those of the others."""
    result = []
    for size in SIZES:
        pairs = effort.pairs if size == SIZES[0] else max(3, effort.pairs // 10)
        values = arrays(size)
        times = _times(_peers(values), values, pairs)
        for kind in ("blocked", "saved", "restored"):
            ours = times[OURS, kind]
            for name in dict.fromkeys(n for n, _ in times):
                each = times[name, kind]
                what = f"{size:g} GB, {kind}"
                if name != OURS:
                    ratio = [a / b for a, b in zip(ours, each, strict=True)]
                    wanted = "at most 1" if size == SIZES[-1] else ""
                    result.append(quantity(f"{what}: {OURS} to {name}", ratio, wanted=wanted))
                if kind == "blocked":
                    result.append(quantity(f"{what}: {name}", [1000 * t for t in each], "ms"))
                else:
                    rates = [size / t for t in each]
                    result.append(quantity(f"{what}: {name}", rates, "GB/s"))
    return result


def _times(
    peers: Mapping[str, Peer], expected: Arrays, pairs: int
) -> dict[tuple[str, str], list[float]]:
    result: dict[tuple[str, str], list[float]] = {}
    for pair in range(-1, pairs):
        names = list(peers)
        at = pair % len(names)
        for name in names[at:] + names[:at]:
            with tempfile.TemporaryDirectory() as folder:
                once = _once(peers[name], Path(folder), expected)
            if pair >= 0:  # the first round is slower
                for kind, seconds in once.items():
                    result.setdefault((name, kind), []).append(seconds)
    return result


def _once(peer: Peer, folder: Path, expected: Arrays) -> dict[str, float]:
    began = time.perf_counter()
    wait = peer.save(folder)
    blocked = time.perf_counter() - began
    wait()
    saved = time.perf_counter() - began
    began = time.perf_counter()
    restored = peer.restore(folder)
    seconds = time.perf_counter() - began
    assert restored.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(restored[name]), value)
    return {"blocked": blocked, "saved": saved, "restored": seconds}


def arrays(size: float) -> dict[str, np.ndarray]:
    """Return `PARTS` arrays of random numbers, of so many gigabytes."""
    rng = np.random.default_rng(0)
    rows = max(1, round(size * 1e9 / 4 / PARTS / 1024))
    return {f"part_{i}": rng.random((rows, 1024), np.float32) for i in range(PARTS)}


def _peers(values: Arrays) -> dict[str, Peer]:
    """Return our writer and those whose packages are there; at 4 GB there is no room for many copies of the arrays."""
    on_device = _on_device(values)
    result = {OURS: _mmjax(*on_device), "Orbax": _orbax(*on_device)}
    if find_spec("torch") is not None:
        result |= _torch(values)
    return result


def _on_device(values: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays on a device, and what they are to be restored as."""
    device = jax.local_devices()[0]
    held = jax.device_put(dict(values), device)
    shape = jax.sharding.SingleDeviceSharding(device)
    abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shape) for n, x in held.items()}
    return held, abstract


def _mmjax(held: Arrays, abstract: Arrays) -> Peer:
    def save(folder: Path) -> Callable[[], None]:
        made = checkpoint.Checkpoints(epath.Path(folder), checkpoint.CheckpointConfig())
        made.__enter__()
        made.save(1, {"parameters": held}, {})

        def wait() -> None:
            made.wait()
            made.__exit__()

        return wait

    def restore(folder: Path) -> Arrays:
        state = checkpoint.read_state(epath.Path(folder), 1, {"parameters": abstract})
        result: Arrays = jax.block_until_ready(state["parameters"])
        return result

    return Peer(save, restore)


def _orbax(held: Arrays, abstract: Arrays) -> Peer:
    def save(folder: Path) -> Callable[[], None]:
        made = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        made.save(folder / "state", args=ocp.args.StandardSave(held))

        def wait() -> None:
            made.wait_until_finished()
            made.close()

        return wait

    def restore(folder: Path) -> Arrays:
        with ocp.StandardCheckpointer() as made:
            result: Arrays = jax.block_until_ready(made.restore(folder / "state", abstract))
        return result

    return Peer(save, restore)


def _torch(values: Arrays) -> dict[str, Peer]:
    import torch
    import torch.distributed.checkpoint as dcp

    held = {name: torch.from_numpy(value) for name, value in values.items()}

    def save(folder: Path) -> Callable[[], None]:
        torch.save(held, folder / "state.pt")
        return lambda: None

    def begin(folder: Path) -> Callable[[], None]:
        future = dcp.async_save(held, checkpoint_id=str(folder / "state"))
        return lambda: future.result()

    def restore(folder: Path) -> Arrays:
        result: Arrays = torch.load(folder / "state.pt", weights_only=True)
        return result

    def read(folder: Path) -> Arrays:
        result = {name: torch.empty_like(value) for name, value in held.items()}
        dcp.load(result, checkpoint_id=str(folder / "state"))
        return result

    return {"torch.save": Peer(save, restore), "DCP": Peer(begin, read)}

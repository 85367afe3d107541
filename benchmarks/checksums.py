"""Checkpoints of 0.25 and 1 GB with checksums (format 2), to those without (format 1), and to CRC-32C in the codec.

The same arrays (float32, a fifth of them each) are saved and restored by `Checkpoints` three ways, in turn: as it is;
with Orbax's own handler of trees, which wrote format 1; and with that handler and the codec `crc32c` of Zarr 3, which
TensorStore compares when it reads a chunk. Asserted: what is restored is what was saved, to the bit. `blocked` is until
the call returns, `saved` until the checkpoint stands.

Rounds are as many as `--pairs` for the smaller size, a quarter for the other. The config is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from benchmarks._pairs import Effort, Quantity, quantity
from benchmarks.checkpoints import Arrays, Peer, _mmjax, _on_device, _times, arrays
from mmjax.engine import arrays as stored
from mmjax.engine import checkpoint

SIZES = (0.25, 1.0)  # GB
NEW, OLD, CODEC = "format 2", "format 1", "crc32c"


def measure(effort: Effort) -> list[Quantity]:
    """Return, by size, ratios of times to those without checksums, and throughputs."""
    result = []
    for size in SIZES:
        values = arrays(size)
        held, abstract = _on_device(values)
        peers = {
            OLD: _orbax(held, abstract, {}),
            NEW: _mmjax(held, abstract),
            CODEC: _orbax(held, abstract, {"use_zarr3": True}),
        }
        pairs = effort.pairs if size == SIZES[0] else max(3, effort.pairs // 4)
        with _crc32c():
            times = _times(peers, values, pairs)
        for kind in ("blocked", "saved", "restored"):
            for name in (NEW, CODEC):
                ratio = [a / b for a, b in zip(times[name, kind], times[OLD, kind], strict=True)]
                wanted = "at most 1.1" if name == NEW and kind != "blocked" else ""
                what = f"{size:g} GB, {kind}: {name} to {OLD}"
                result.append(quantity(what, ratio, wanted=wanted))
            for name in peers if kind != "blocked" else ():
                rates = [size / t for t in times[name, kind]]
                result.append(quantity(f"{size:g} GB, {kind}: {name}", rates, "GB/s"))
    return result


def _orbax(held: Arrays, abstract: Arrays, options: dict[str, Any]) -> Peer:
    """Return `Checkpoints` with Orbax's own handler of trees."""

    def handler() -> Any:
        return ocp.PyTreeCheckpointHandler(use_compression=False, **options)

    def save(folder: Path) -> Callable[[], None]:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(stored, "TreeHandler", handler))
            stack.enter_context(
                mock.patch.object(stored, "TreeSave", lambda tree, step: ocp.args.PyTreeSave(tree))
            )
            made = checkpoint.Checkpoints(epath.Path(folder), checkpoint.CheckpointConfig())
            made.__enter__()
            made.save(1, {"parameters": held}, {})

        def wait() -> None:
            made.wait()
            made.__exit__()

        return wait

    def restore(folder: Path) -> Arrays:
        path = epath.Path(folder) / checkpoint.FOLDER / "1" / "state"
        state = checkpoint._read_unverified(path, {"parameters": abstract})
        read: Arrays = jax.block_until_ready(state["parameters"])
        return read

    return Peer(save, restore)


@contextmanager
def _crc32c() -> Iterator[None]:
    """Give arrays in Zarr 3 a CRC-32C of each chunk."""

    def metadata(shape: Any, chunk: Any, compressed: bool) -> dict[str, Any]:
        assert not compressed
        grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        return {"shape": shape, "chunk_grid": grid, "codecs": codecs}

    with mock.patch.object(tensorstore_utils, "_build_zarr3_metadata", metadata):
        yield

"""The arrays of a checkpoint: written by Orbax, with a checksum of each part that a process stores, and read back.

The folder is an Orbax checkpoint of a tree, which Orbax reads too. Beside it lies `checksums.json`: every array's
name, shape and dtype, and the checksum of every part of it that was stored. Whoever needs a piece of a part reads
the whole part and compares. The stored form is Zarr in TensorStore's OCDBT, whose nodes have checksums of their own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint._src.serialization import jax_array_handlers, replica_slices

from mmjax.core.files import naming
from mmjax.engine.integrity import Mismatch, checksum, is_damage, seal, unseal, words

CHECKSUMS = "checksums.json"
_PARTS = "checksums"  # one file of each process, until all are in one
_THREADS = 16
_ALIGNED = 64  # bytes; JAX takes such memory as it is on a processor, and copies other
_CONTEXT = {
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
    "file_io_concurrency": {"limit": 128},
}

Box = tuple[tuple[int, int], ...]  # start and stop along each axis


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint.

    Attributes:
      path: its keys in the tree.
      name: Orbax's name for it.
      shape: of the whole array.
      dtype: of its elements.
      parts: boxes that make up the array, and the checksum of each.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Mapping[Box, str]


# --- writing -----------------------------------------------------------------------------------


class ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of `jax.Array`, which also takes the checksums of what it writes.

    The bytes that are hashed are those that are handed to TensorStore: the host's copy of each part.
    """

    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        slices = replica_slices.transfer_arrays_to_host(
            values,
            self._replica_id,
            self._use_replica_parallel,
            enable_pinned_host_transfer=infos[0].enable_pinned_host_transfer,
        )
        writing = jax_array_handlers._async_serialize_replica_slices(
            slices,
            infos,
            args or [ocp.SaveArgs()] * len(values),
            primary_host=self._primary_host,
            metadata_key=self._metadata_key,
            array_metadata_store=self._array_metadata_store,
            enable_replica_parallel_separate_folder=False,
            use_replica_parallel=self._use_replica_parallel,
            ext_metadata={},
        )
        return [  # two threads, side by side
            ocp.future.CommitFutureAwaitingContractedSignals(writing, name="arrays"),
            ocp.future.CommitFutureAwaitingContractedSignals(
                _write_part(slices, infos), name="checksums"
            ),
        ]


async def _write_part(slices: Sequence[Any], infos: Sequence[Any]) -> None:
    """Write what this process stores, and its checksums."""
    folder = infos[0].parent_dir / _PARTS
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(part, info) for part, info in zip(slices, infos, strict=True)]
    path = folder / f"{jax.process_index()}.json"
    with naming(path):
        path.write_text(json.dumps(entries))


def _entry(stored: Any, info: Any) -> dict[str, Any]:
    boxes = [(_box(f.index, stored.global_shape), f.value) for f in stored.to_fragments().fragments]
    return {
        "path": [str(getattr(key, "key", key)) for key in info.keypath],
        "name": info.name,
        "shape": list(stored.global_shape),
        "dtype": np.dtype(stored.dtype).name,
        "parts": [[box, checksum(value)] for box, value in boxes],
    }


class TreeHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees, here of `jax.Array` only, each with the checksums of its parts."""

    def __init__(self) -> None:
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ArrayHandler(enable_write_sharding_file=False))
        )
        # Compression saves at most 10 % on trained weights and doubles the time to read them.
        super().__init__(use_compression=False, type_handler_registry=registry)
        self._step = 0

    async def async_save(self, directory: epath.Path, args: TreeSave) -> Any:
        self._step = args.step
        return await super().async_save(directory, args=args)

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if jax.process_index() == 0:
            _merge(directory, self._step)


@ocp.args.register_with_handler(TreeHandler, for_save=True, for_restore=True)
@dataclass
class TreeSave(ocp.args.PyTreeSave):
    """The tree to save: a tree, as the state of a run after `step` steps."""

    step: int = 0


def _merge(folder: epath.Path, step: int) -> None:
    """Put the checksums of all processes into one sealed file."""
    arrays: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / _PARTS).iterdir()):
        for entry in json.loads(path.read_text()):
            arrays.setdefault(entry["name"], {**entry, "parts": []})["parts"] += entry["parts"]
    document = seal({"step": step, "arrays": list(arrays.values())})
    with naming(folder / CHECKSUMS):
        (folder / CHECKSUMS).write_text(json.dumps(document))
    (folder / _PARTS).rmtree()


# --- reading -----------------------------------------------------------------------------------


def index(folder: epath.Path, step: int) -> dict[tuple[str, ...], Stored]:
    """Return what the folder of arrays of a step holds, by path.

    Raises:
      Mismatch: the list is damaged, or is that of another step.
    """
    content = unseal(_load(folder / CHECKSUMS), f"'{CHECKSUMS}'")
    if content["step"] != step:
        raise Mismatch(f"its arrays are those of step {content['step']}")
    arrays = [_stored(entry) for entry in content["arrays"]]
    return {stored.path: stored for stored in arrays}


def _load(path: epath.Path) -> Any:
    return json.loads(path.read_bytes().decode())


def _stored(entry: Mapping[str, Any]) -> Stored:
    parts = {
        tuple((int(start), int(stop)) for start, stop in box): digest
        for box, digest in entry["parts"]
    }
    dtype = jax.numpy.dtype(entry["dtype"])
    return Stored(tuple(entry["path"]), entry["name"], tuple(entry["shape"]), dtype, parts)


def shapes(stored: Mapping[tuple[str, ...], Stored]) -> dict[str, Any]:
    """Return the tree of shapes and dtypes that an index describes."""
    tree: dict[str, Any] = {}
    for path, array in stored.items():
        *parents, last = path
        block = tree
        for key in parents:
            block = block.setdefault(key, {})
        block[last] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return tree


def read(folder: epath.Path, stored: Mapping[tuple[str, ...], Stored], abstract: Any) -> Any:
    """Return the arrays that the tree `abstract` asks for, each verified.

    Args:
      folder: where the arrays lie.
      stored: its index.
      abstract: a tree of shapes and dtypes, with shardings for `jax.Array`, without for NumPy's.

    Raises:
      Mismatch: bytes that do not match their checksum, or are not there.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    context = ts.Context(_CONTEXT)

    def read_leaf(pair: tuple[Any, Any]) -> Any:
        path, leaf = pair
        return _read_array(folder, context, stored[tuple(key.key for key in path)], leaf)

    with ThreadPoolExecutor(_THREADS) as pool:
        return jax.tree.unflatten(structure, pool.map(read_leaf, leaves))


def _read_array(folder: epath.Path, context: ts.Context, stored: Stored, leaf: Any) -> Any:
    sharding, shape = getattr(leaf, "sharding", None), stored.shape
    store = _open(folder, context, stored)
    if sharding is None:
        whole: Box = tuple((0, size) for size in shape)
        return _fill(store, stored, [whole])[whole].astype(leaf.dtype, copy=False)
    places: dict[Box, list[jax.Device]] = {}
    for device, place in sharding.addressable_devices_indices_map(shape).items():
        places.setdefault(_box(place, shape), []).append(device)
    arrays = []
    for box, array in _fill(store, stored, list(places)).items():
        array = array.astype(leaf.dtype, copy=False)
        arrays += [jax.device_put(array, device) for device in places[box]]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _open(folder: epath.Path, context: ts.Context, stored: Stored) -> ts.TensorStore:
    path = os.fspath(folder)
    base = f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": base,
            "path": stored.name,
            "cache_pool": "cache_pool#ocdbt",
        },
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": False,
    }
    store = _result(ts.open(spec, open=True, read=True, context=context))
    if tuple(store.shape) != stored.shape or store.dtype.numpy_dtype != stored.dtype:
        raise Mismatch(f"{stored.name} is not of the shape and dtype that its checksums are of")
    return store


def _fill(store: ts.TensorStore, stored: Stored, boxes: Sequence[Box]) -> dict[Box, np.ndarray]:
    """Return the array in each of some boxes, out of the whole parts that they meet."""
    arrays = {box: _empty(box, stored.dtype) for box in boxes}
    missing = {box: _size(box) for box in boxes}
    for part, expected in stored.parts.items():
        meetings = [(box, common) for box in boxes if (common := _common(box, part)) is not None]
        if not meetings:
            continue
        array = arrays[part] if part in arrays else _empty(part, stored.dtype)
        _read_part(store, part, array)
        if checksum(array) != expected:
            raise Mismatch(f"the bytes of {stored.name} do not match their checksum")
        for box, common in meetings:
            if box != part:
                arrays[box][_inside(common, box)] = array[_inside(common, part)]
            missing[box] -= _size(common)
    if any(missing.values()):
        raise Mismatch(f"parts of {stored.name} are missing")
    return arrays


def _read_part(store: ts.TensorStore, part: Box, into: np.ndarray) -> None:
    source = store[tuple(slice(start, stop) for start, stop in part)]
    if part:
        source = source[ts.d[:].translate_to[0]]
    _result(ts.array(into).write(source))


def _result(future: Any) -> Any:
    """Return the result of a future of TensorStore, whose errors on bad bytes state only that a value is wrong."""
    try:
        return future.result()
    except ValueError as error:
        if is_damage(error, (ValueError,)):
            raise Mismatch(words(error)) from error
        raise


def _empty(box: Box, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return memory for a box, placed so that JAX can take it without a copy."""
    size = _size(box) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape([stop - start for start, stop in box])


def _box(place: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple(p.indices(size)[:2] for p, size in zip(place, shape, strict=True))


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _common(one: Box, other: Box) -> Box | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _inside(box: Box, outer: Box) -> tuple[slice, ...]:
    """Return a box as slices of an array that covers `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, outer, strict=True))

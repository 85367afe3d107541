"""Parameters to begin with: from a run of mmjax or a file of arrays, by name; no code in it is run."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax import checkpoint, processes
from mmjax.errors import UserError
from mmjax.monitor.lines import read_bytes, replace_file
from mmjax.parameters import Spec
from mmjax.rules import matches
from mmjax.state import EMA
from mmjax.transforms import as_matrix

Values = dict[str, np.ndarray]
PINNED = "init_from.json"
EXPERTS = "/mlps/"  # in the names of a block's experts, where its MLP's have nothing
_LISTED = 12  # names in a line of the list
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class NameConfig:
    r"""What parameters are called there.

    Attributes:
      match: a regular expression of whole names here, canonical ones: `trunk/layers/(\d+)/mlp/(.*)`.
      name: their name there; `\1` and so on are the groups of `match`.
      transpose: there a matrix has its outputs first, as in PyTorch.
    """

    match: str
    name: str
    transpose: bool = False


@dataclass(frozen=True)
class WarmStartConfig:
    """Where a run that starts fresh takes parameters from; one that goes on never looks there.

    Attributes:
      path: a workdir of mmjax (its newest checkpoint when the run first begins), or a .npz or .safetensors
        file; empty for none.
      names: the first that matches says what a parameter is called there; else the name is the same.
      skip: patterns of names here that begin at random all the same.
      average: take the moving averages of a workdir that has them.
    """

    path: str = ""
    names: tuple[NameConfig, ...] = ()
    skip: tuple[str, ...] = ()
    average: bool = False


@dataclass
class Taken:
    """What a warm start found: `values` by canonical name, and lists for a person."""

    values: Values = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def pin(config: WarmStartConfig, workdir: epath.Path, say: Callable[[str], None]) -> int | None:
    """The step of the run that `path` names, settled when this run first begins; None of a file.

    It is kept in `WORKDIR/init_from.json`, with the digest of a file: begun once more before its first
    checkpoint, a run takes the same, though the other has gone on, and tells where it cannot.
    """
    if not config.path:
        return None
    now: dict[str, Any] | None = None
    if processes.is_first():
        held = pinned(workdir)
        same = held if held.get("path") == config.path else {}
        now = _source(config.path, same.get("step"))
        if same and now != same:
            say(f"init_from has changed since this run first began: it was {same}, it is {now}.")
        replace_file(workdir / PINNED, json.dumps(now))
    step: int | None = processes.gather(now)[0].get("step")
    return step


def pinned(workdir: epath.Path) -> dict[str, Any]:
    """What `pin` has kept; empty where it has not been called."""
    path = workdir / PINNED
    try:
        found = json.loads(read_bytes(path) or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"'{path}' is damaged. It names what the run began with: delete it to take what is there now."
        )
    return found


def _source(name: str, step: int | None) -> dict[str, Any]:
    """What is there now: of a run's checkpoints that of `step`, or else the newest."""
    path = epath.Path(name).expanduser()
    if path.is_dir():
        steps = checkpoint.steps(path)
        return {"path": name, "step": step if step in steps else next(iter(steps), None)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    return {"path": name, "sha256": digest}


def warm_start(
    config: WarmStartConfig,
    specs: Mapping[str, Spec],
    say: Callable[[str], None],
    step: int | None = None,
) -> Values:
    """The parameters to begin with, by canonical name, each in its shape here; tells what matched.

    A table of positions with other buckets is resampled. A dense layer's MLP begins every expert that takes its place
    (sparse upcycling, Komatsuzaki et al. 2023), and the router begins at random. So does a head of another shape, and
    what is not there. Of a run, the checkpoint of `step` is read, or the newest if None.

    Raises:
      UserError: nothing there; a pattern without a match; a shape that does not fit outside the heads.
    """
    if not config.path:
        return {}
    here = {name: spec for spec in specs.values() for name in spec.canonical}
    taken = _take(config, here, read(config, step))
    if not taken.values:
        raise UserError(
            f"init_from: none of the {len(here)} parameters is in '{config.path}', which holds "
            f"{_some(taken.unused)}. Say in init_from.names what they are called there."
        )
    where = config.path if step is None else f"step {step} of {config.path}"
    say(f"Begins with {len(taken.values)} of {len(here)} parameters from {where}.")
    for words, names in (
        ("  adapted", taken.adapted),
        ("  at random", taken.random),
        ("  not used of it", taken.unused),
    ):
        if names:
            say(f"{words} ({len(names)}): {_some(names)}")
    return taken.values


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _take(config: WarmStartConfig, here: Mapping[str, Spec], there: Values) -> Taken:
    skipped = frozenset().union(
        *(matches(p, here, f"init_from.skip[{i}]") for i, p in enumerate(config.skip))
    )
    for index, each in enumerate(config.names):
        matches(each.match, here, f"init_from.names[{index}].match")
    taken, used, wrong = Taken(), set(), []
    for name, spec in here.items():
        source, transpose = _there(name, config.names)
        if source not in there and EXPERTS in source:
            source = source.replace(EXPERTS, "/", 1)
        if name in skipped or source not in there:
            taken.random.append(name)
            continue
        used.add(source)
        value = there[source].T if transpose else there[source]
        shape = spec.shape[1:] if spec.stack else spec.shape
        adapted = _adapt(value, spec, shape)
        if adapted is not None:
            taken.values[name] = adapted
            if value.shape != shape:
                taken.adapted.append(f"{name} {list(value.shape)} -> {list(shape)}")
        elif name.startswith("heads/"):
            taken.random.append(f"{name} (there {list(value.shape)})")
        else:
            wrong.append(f"{name}: expected {list(shape)}, found {list(value.shape)} ({source})")
    if wrong:
        raise UserError(
            f"init_from '{config.path}' does not fit this config:\n  "
            + "\n  ".join(wrong[:8])
            + "\nName them in init_from.skip to begin at random, or change model and modalities."
        )
    taken.unused = sorted(there.keys() - used)
    return taken


def _there(name: str, names: tuple[NameConfig, ...]) -> tuple[str, bool]:
    for each in names:
        found = re.fullmatch(each.match, name)
        if found:
            return found.expand(each.name), each.transpose
    return name, False


def _adapt(value: np.ndarray, spec: Spec, shape: tuple[int, ...]) -> np.ndarray | None:
    """`value` in the shape of a parameter, if there is a way."""
    if value.shape == shape:
        return value
    if value.shape == as_matrix(spec)[0]:
        return value.reshape(shape)
    axes = spec.axes[1:] if spec.stack else spec.axes
    if axes[:1] == ("experts",) and value.shape == shape[1:]:
        return np.broadcast_to(value, shape)
    if axes[:1] == ("positions",) and value.shape[1:] == shape[1:] and value.ndim == len(shape):
        return resample(value, shape[0])
    return None


def resample(table: np.ndarray, buckets: int) -> np.ndarray:
    """A table of positions `[n, D]` with another number of buckets, linear between the old ones.

    A coordinate c in [0, 1) reads bucket `int(c n)`. So bucket j of the new ones stands at j / buckets,
    and what stood there in the old table stays exactly.
    """
    at = np.arange(buckets) * len(table) / buckets
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, len(table) - 1)
    part = (at - low)[:, None]
    wide = table.astype(np.promote_types(table.dtype, np.float32))
    return ((1 - part) * wide[low] + part * wide[high]).astype(table.dtype)


# --- reading -----------------------------------------------------------------------------------


def read(config: WarmStartConfig, step: int | None = None) -> Values:
    """The arrays of a workdir's checkpoint (the newest if `step` is None), or of a file, by name."""
    path = epath.Path(config.path).expanduser()
    if not path.exists():
        raise UserError(f"init_from.path: there is no '{config.path}'.")
    if path.is_dir():
        return _read_run(path, config.average, step)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UserError(
            f"init_from.path '{config.path}' is no workdir, .npz or .safetensors file. Other formats "
            "may hold code, and are not read."
        )
    try:
        return readers[path.suffix](path)
    except (ValueError, KeyError, struct.error, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"init_from.path '{config.path}' cannot be read: {error}") from error


def _read_run(path: epath.Path, average: bool, step: int | None) -> Values:
    found = checkpoint.steps(path)
    if not found:
        raise UserError(f"init_from.path: '{path}' holds no checkpoint.")
    step = found[0] if step is None else step
    shapes = checkpoint.read_shapes(path, step)
    part, prefix = ("buffers", EMA) if average else ("parameters", "")
    wanted = {
        n: jax.ShapeDtypeStruct(s.shape, s.dtype)
        for n, s in shapes.get(part, {}).items()
        if n.startswith(prefix)
    }
    if not wanted:
        raise UserError(f"init_from.average: the run in '{path}' keeps no averages.")
    values = checkpoint.read_state(path, step, {part: wanted})[part]
    return {n.removeprefix(prefix): value for n, value in values.items()}


def _read_npz(path: epath.Path) -> Values:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: epath.Path) -> Values:
    """The format is a length (8 bytes, little-endian), a header in JSON, and the bytes of the arrays."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    body = memoryview(data)[8 + length :]
    header.pop("__metadata__", None)
    values = {}
    for name, each in header.items():
        begin, end = each["data_offsets"]
        array = np.frombuffer(body[begin:end], jnp.dtype(_DTYPES[each["dtype"]]))
        values[name] = array.reshape(each["shape"])
    return values

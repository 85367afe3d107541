"""Build embedded data sets.

    mmjax build NAME ... [--data_dir=DIR] [--force]
    mmjax build quickstart       all that the quickstart reads
    mmjax build emoji speech     these

A data set called NAME is a module `mmjax/datasets/NAME.py` with a function `prepare(root, limit)` that
writes one TFDS directory under `root` and returns `Made`. This module does the rest:

    DIR/NAME/1.0.0/    dataset_info.json, features.json, *.array_record*, what else was made
                       manifest.json    counts, hashes, licences, names and sizes of all files

Everything is made in a temporary directory, copied near its place with the manifest last, and
renamed into place. A directory without its manifest, or with files that the manifest does not
describe, is half-built, and is built again. The data set's identity is the manifest's `digest`, a
hash of the decoded records and of the tokenizer: not the version number, not the bytes of the
files, which differ between builds of equal data.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import pkgutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

import mmjax.data
import mmjax.datasets
from mmjax.core import errors, flags
from mmjax.core.errors import UserError
from mmjax.core.files import new_folder, swap_in

VERSION = "1.0.0"
"""Of every embedded data set, for TFDS; contents are distinguished by the manifest's `digest`."""

FORMAT = 1
"""Of the manifest and the records' fields: a build of another format is built again."""

BUNDLES = {"quickstart": ("emoji", "speech", "notes", "emoji_line")}
"""Names that stand for several data sets."""

MANIFEST = "manifest.json"

Json = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """The result of `prepare`: a TFDS directory, and facts for the manifest (JSON values)."""

    path: epath.Path
    facts: Json


@dataclass(frozen=True)
class Built:
    """A finished data set: its directory, its manifest, and whether it was there before."""

    path: epath.Path
    manifest: Json
    reused: bool


def dataset_dir(name: str, root: epath.PathLike | None = None) -> epath.Path:
    """Return the directory of the data set in `root`, which defaults to `mmjax.data.data_dir()`."""
    base = mmjax.data.data_dir() if root is None else epath.Path(root).expanduser()
    return base / name / VERSION


def find(name: str, root: epath.PathLike | None = None) -> Built:
    """Return the finished data set; `UserError` with what to run when it is missing or half-built."""
    path = dataset_dir(name, root)
    fault = _fault(path, name)
    if fault:
        raise UserError(
            f"The data set '{name}' {fault} ({path}). Build it:"
            f" mmjax build {name} --data_dir={path.parent.parent}"
        )
    return Built(path, _read_manifest(path), reused=True)


def build(
    name: str,
    root: epath.PathLike | None = None,
    *,
    force: bool = False,
    limit: int | None = None,
) -> Built:
    """Return the finished data set, built if it is not there yet (or `force` is set).

    `limit` takes a part of the data, for tests; a data set of another `limit` is built again.
    Safe to run in several processes at once: one that finds the work done leaves it as it is.
    """
    path = dataset_dir(name, root)
    if not force and _reusable(path, name, limit):
        return Built(path, _read_manifest(path), reused=True)
    module = _module(name)
    with _part(path) as part, _scratch() as scratch, _quiet():
        prepared = module.prepare(scratch, limit)
        manifest = _manifest(name, limit, prepared)
        _copy(prepared.path, manifest, part)
        if force or not _reusable(path, name, limit):
            try:
                swap_in(part, path)
            except OSError:  # another process may have been faster by a moment
                if not _reusable(path, name, limit):
                    raise
    return Built(path, manifest, reused=False)


def _reusable(path: epath.Path, name: str, limit: int | None) -> bool:
    return not _fault(path, name) and _read_manifest(path)["limit"] == limit


def _read_manifest(path: epath.Path) -> Json:
    manifest: Json = json.loads((path / MANIFEST).read_text())
    return manifest


def _fault(path: epath.Path, name: str) -> str | None:
    """Return what is wrong with the directory, as the end of a sentence; None for a finished one.

    Looks at names and sizes only, so that it takes milliseconds.
    """
    if not path.exists():
        return "is not there"
    try:
        manifest = _read_manifest(path)
        if (manifest["name"], manifest["format"]) != (name, FORMAT):
            return f"is not of format {FORMAT}: another version of mmjax built it"
        for file, size in manifest["files"].items():
            if not (path / file).exists():
                return f"is half-built: it lacks {file}"
            if (path / file).stat().length != size:
                return f"is half-built: {file} does not have its {size} bytes"
    except FileNotFoundError:
        return f"is half-built: it has no {MANIFEST}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"has an unreadable {MANIFEST}"
    return None


def _module(name: str) -> Any:
    """Return the module `mmjax.datasets.NAME` with its `prepare`."""
    try:
        module = importlib.import_module(f"mmjax.datasets.{name}")
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("mmjax"):
            raise UserError(
                f"Building '{name}' needs the package {error.name}, which is not installed:"
                " pip install 'mmjax[data]'"
            ) from error
        module = None
    if not hasattr(module, "prepare"):
        near = errors.nearest(name, [*known(), *BUNDLES])
        raise UserError(f"Unknown embedded data set '{name}'.{near}")
    return module


def known() -> list[str]:
    """Return the names of the embedded data sets: the modules of `mmjax.datasets` that have a `prepare`."""
    names = []
    for module in pkgutil.iter_modules(mmjax.datasets.__path__):
        with contextlib.suppress(ImportError):
            if hasattr(importlib.import_module(f"mmjax.datasets.{module.name}"), "prepare"):
                names.append(module.name)
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS's messages, progress bars and advice about decoders off the screen."""
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()


def _manifest(name: str, limit: int | None, prepared: Made) -> Json:
    """Return all facts about the data, read back from what was written."""
    import tensorflow_datasets as tfds

    sources = tfds.builder_from_directory(prepared.path).as_data_source()
    splits = {
        split: {"examples": len(source), "sha256": records_digest(source)}
        for split, source in sorted(sources.items())
    }
    identity = {split: facts["sha256"] for split, facts in splits.items()}
    identity["tokenizer"] = prepared.facts.get("tokenizer", {}).get("sha256", "")
    return {
        "name": name,
        "version": VERSION,
        "format": FORMAT,
        "limit": limit,
        "digest": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "splits": splits,
        "files": {file.name: file.stat().length for file in sorted(prepared.path.iterdir())},
        **prepared.facts,
    }


def records_digest(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 (hex) of decoded records in their order.

    For each record, its fields sorted by name: `name|dtype|shape|`, then the value's bytes in C
    order, little-endian (`dtype` and `shape` are `bytes` and the length for a text).
    """
    digest = hashlib.sha256()
    for record in records:
        for name in sorted(record):
            digest.update(_field_bytes(name, record[name]))
    return digest.hexdigest()


def _field_bytes(name: str, value: Any) -> bytes:
    import numpy as np

    if isinstance(value, bytes):
        return f"{name}|bytes|{len(value)}|".encode() + value
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("<"))
    return f"{name}|{array.dtype.name}|{array.shape}|".encode() + array.tobytes()


@contextlib.contextmanager
def _scratch() -> Iterator[epath.Path]:
    """Yield a temporary local directory: ArrayRecord is written by code that knows no remote paths."""
    with tempfile.TemporaryDirectory(prefix="mmjax-data-") as scratch:
        yield epath.Path(scratch)


@contextlib.contextmanager
def _part(path: epath.Path) -> Iterator[epath.Path]:
    """Make a new folder near `path` (see `new_folder`), or raise an error if the data directory is read-only."""
    with contextlib.ExitStack() as stack:
        try:
            part = stack.enter_context(new_folder(path))
        except OSError as error:
            raise UserError(
                f"Cannot write to the data directory {path.parent.parent}: {error.strerror or error}."
                " Give another one by --data_dir or MMJAX_DATA_DIR."
            ) from error
        yield part


def _copy(source: epath.Path, manifest: Json, part: epath.Path) -> None:
    """Copy the directory's files, then write the manifest."""
    for file in sorted(source.iterdir()):
        file.copy(part / file.name)
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def summary(built: Built, seconds: float) -> str:
    """Return a summary of a build in a few lines."""
    splits = built.manifest["splits"]
    lines = [f"{built.manifest['name']}: {sum(s['examples'] for s in splits.values()):,} examples"]
    lines += [f"  {split:<20}{facts['examples']:>7,}" for split, facts in splits.items()]
    did = "already built, checked" if built.reused else "built"
    return "\n".join([*lines, f"{did} in {seconds:.1f} s: {built.path}"])


def main() -> None:
    """Run the command."""
    parser = flags.plain_command("build", __doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="data sets or bundles, e.g. emoji")
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        help="where they lie; default $MMJAX_DATA_DIR, else ~/.cache/mmjax/data",
    )
    parser.add_argument("--force", action="store_true", help="build again what is there")
    args = parser.parse_args()
    for name in _unbundled(args.names):
        start = time.perf_counter()
        built = build(name, args.data_dir, force=args.force)
        print(summary(built, time.perf_counter() - start), flush=True)


def _unbundled(names: Iterable[str]) -> list[str]:
    """Return the data sets, each once; a name that no module has is refused before the first is built."""
    parts = [part for name in names for part in BUNDLES.get(name, (name,))]
    modules = {module.name for module in pkgutil.iter_modules(mmjax.datasets.__path__)}
    for name in parts:
        if name not in modules:
            _module(name)
    return list(dict.fromkeys(parts))


if __name__ == "__main__":
    errors.run(main)

"""Files that are whole or not there, and errors that name their file."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from etils import epath

_PART = ".part-"
_STALE_SECONDS = 3600.0


def is_local(path: epath.Path) -> bool:
    """Return whether `path` is on a mounted file system, where files can be appended to."""
    return "://" not in os.fspath(path)


@contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Put the name of a file into the `OSError`s of a block: writes through a descriptor do not know it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def replace_file(path: epath.Path, content: str | bytes) -> None:
    """Write a file, whole and durable or not at all. Raises `OSError` with its name in it."""
    data = content.encode() if isinstance(content, str) else content
    with naming(path):
        if not is_local(path):
            path.write_bytes(data)  # an object store replaces the object as a whole
            return
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_bytes(path: epath.Path) -> bytes:
    """Return a file's bytes, none where there is no file. One that cannot be read is an error, not an empty one."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def new_folder(path: epath.Path) -> Iterator[epath.Path]:
    """Make a new folder near `path`, to be filled in the block and brought there by `swap_in`.

    It is gone at the end unless it was renamed, and so is what blocks that were killed an hour ago or more left. It is
    made before the work, so that a place that cannot be written to is known at once (`OSError`), and lies one level
    deeper than `path`, so that a listing of a data set's versions does not include it.
    """
    prefix = f"{_PART}{path.name}-"
    shelter = path.parent / f"{prefix}{uuid.uuid4().hex}"
    part = shelter / path.name
    part.mkdir(parents=True)
    try:
        for other in path.parent.iterdir():
            if other.name.startswith(prefix) and _last_change(other) < time.time() - _STALE_SECONDS:
                other.rmtree()
        yield part
    finally:
        if shelter.exists():
            shelter.rmtree()


def _last_change(shelter: epath.Path) -> float:
    inner = list(shelter.glob("*")) + list(shelter.glob("*/*"))
    return max(float(file.stat().mtime or 0) for file in (shelter, *inner))


def swap_in(part: epath.Path, path: epath.Path) -> None:
    """Rename a folder of `new_folder` to `path`; what was there is moved aside, and removed with the rest."""
    if path.exists():
        with suppress(FileNotFoundError):  # another process may be faster by a moment
            path.rename(part.parent / "old")
    part.rename(path)

"""Files that are whole or not there, and errors that name their file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath


def is_local(path: epath.Path) -> bool:
    """Whether `path` is on a mounted file system, where files can be appended to."""
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

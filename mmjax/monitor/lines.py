"""A file of lines that grows, on a local disk or in an object store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from etils import epath

# Object stores limit how often one object may be rewritten (about once a second).
_REMOTE_SECONDS = 2.0


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


class LineFile:
    """Appends whole lines to the file at `path`, after what it holds already.

    A local file is appended to. An object store cannot append: there the lines are kept in
    memory and the whole object is written again. Raises `OSError` with the file's name in it
    when the disk is full or the file may not be written.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._local = is_local(path)
        self._written = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._parts = [b"" if self._local else read_bytes(path)]
        self._file: Any = path.open("ab") if self._local else None
        with naming(path):
            last = _last_byte(path) if self._local else self._parts[0][-1:]
        if last not in (b"", b"\n"):
            self.append("\n")  # a line torn by a kill must not swallow the next one

    def append(self, text: str) -> None:
        """Adds `text`, one or more lines with their newlines. Not yet visible to others."""
        data = text.encode()
        if self._local:
            with naming(self._path):
                self._file.write(data)
        else:
            self._parts.append(data)

    def push(self) -> None:
        """Hands the lines to the operating system: they outlive this process from here on.

        In an object store the object is rewritten, but at most every two seconds.
        """
        if self._local:
            with naming(self._path):
                self._file.flush()
        elif time.monotonic() - self._written >= _REMOTE_SECONDS:
            self._rewrite()

    def sync(self) -> None:
        """Makes the lines durable: they outlive the machine."""
        if not self._local:
            self._rewrite()
            return
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """`sync`, then lets go of the file. Calling it again does nothing."""
        if not self._local:
            self.sync()
        elif not self._file.closed:
            try:
                self.sync()
            except OSError:
                with suppress(OSError):  # it would try the same again, and name no file
                    self._file.close()
                raise
            self._file.close()

    def _rewrite(self) -> None:
        self._parts = [b"".join(self._parts)]
        with naming(self._path):
            self._path.write_bytes(self._parts[0])
        self._written = time.monotonic()


def _last_byte(path: epath.Path) -> bytes:
    if not path.stat().length:
        return b""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()

"""A file of lines that grows, on a local disk or in an object store."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from etils import epath

from mmjax.core.files import is_local, naming, read_bytes

_CHECK_SECONDS = 1.0  # between two calls of `guard` by `push`
# Object stores limit how often one object may be rewritten (about once a second).
_REMOTE_SECONDS = 2.0


class LineFile:
    """Appends whole lines to the file at `path`, after what it holds already.

    A local file is appended to. An object store cannot append: there the lines are kept in
    memory and the whole object is written again. Raises `OSError` with the file's name in it
    when the disk is full or the file may not be written.

    Args:
      path: the file.
      guard: called before lines leave this process; it raises if they must not. `push` calls it at most
        once a second.
    """

    def __init__(self, path: epath.Path, guard: Callable[[], None] = lambda: None) -> None:
        self._path, self._guard, self._checked = path, guard, -math.inf
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
        """Append `text`, one or more lines with their newlines. Not yet visible to others."""
        data = text.encode()
        if self._local:
            with naming(self._path):
                self._file.write(data)
        else:
            self._parts.append(data)

    def push(self) -> None:
        """Hand the lines to the operating system: they outlive this process from here on.

        In an object store the object is rewritten, but at most every two seconds.
        """
        if self._local:
            if time.monotonic() - self._checked >= _CHECK_SECONDS:
                self._check()
            with naming(self._path):
                self._file.flush()
        elif time.monotonic() - self._written >= _REMOTE_SECONDS:
            self._rewrite()

    def sync(self) -> None:
        """Make the lines durable: they outlive the machine."""
        if not self._local:
            self._rewrite()
            return
        self._check()
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Call `sync`, then close the file. Calling it again does nothing."""
        if not self._local:
            self.sync()
        elif not self._file.closed:
            try:
                self.sync()
            except Exception:
                with suppress(OSError):  # it would try the same again, and name no file
                    self._file.close()
                raise
            self._file.close()

    def _check(self) -> None:
        self._guard()
        self._checked = time.monotonic()

    def _rewrite(self) -> None:
        self._check()
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


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of lines, none if there is no file; any other line is skipped.

    A kill or a power cut may have torn the last line, or left none of it.
    """
    records = []
    for line in read_bytes(path).split(b"\n"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records

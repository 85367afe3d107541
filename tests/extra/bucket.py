"""A bucket in memory, under `az://`: whole objects only, no appending, as in an object store.

One class for all tests: epath keeps the first file system that it meets under a protocol.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

_NUMBERS = itertools.count()


class Store(MemoryFileSystem):
    """The object store; `puts` counts the objects written."""

    protocol = "az"
    puts = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + os.fspath(path).removeprefix("az://").strip("/")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "a" in mode:
            raise NotImplementedError("object stores do not append")
        type(self).puts += "w" in mode
        return super()._open(path, mode=mode, **kwargs)


def bucket() -> epath.Path:
    """Return a new, empty bucket."""
    fsspec.register_implementation("az", Store, clobber=True)
    return epath.Path(f"az://bucket{next(_NUMBERS)}")

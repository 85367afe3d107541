"""Files that are whole or not there."""

from __future__ import annotations

import os

from etils import epath

from mmjax.monitor.lines import is_local


def write_whole(path: epath.Path, content: bytes) -> None:
    """Write a file, which holds what it held before until all of it is written.

    Raises:
      OSError: the disk is full or the folder may not be written; the error names the file.
    """
    if not is_local(path):
        path.write_bytes(content)  # an object store replaces an object as a whole
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise

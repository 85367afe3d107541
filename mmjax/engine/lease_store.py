"""Stores of a lease: one file on a file system, or one object in an object store.

Both stores change their entry only if it is still the one that the caller has read, so of several processes that want
to replace it exactly one does. A process that is killed at any moment leaves an entry that the next one can read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tensorstore
from etils import epath

from mmjax.core.errors import UserError
from mmjax.core.files import is_local
from mmjax.core.workdir import LEASE

_DRIVERS = {"gs": "gcs", "s3": "s3"}  # of TensorStore
_ID = re.compile(r"[0-9a-f]{32}")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Entry:
    """The content of a store.

    Attributes:
      text: the lease as JSON; None for no lease.
      version: the store's own name of this content.
    """

    text: bytes | None
    version: Any = None

    @property
    def id(self) -> str:
        """The id of the lease; a digest of the text if that is not a lease."""
        return identity(self.text or b"")


class Store(Protocol):
    """A place for one entry."""

    def read(self) -> Entry:
        """Return the entry as it is now."""

    def swap(self, old: Entry, text: bytes | None) -> bool:
        """Replace `old` by `text` (None removes it) and return True; return False if `old` is no longer there."""


def store_of(workdir: epath.Path) -> Store:
    """Return the store of a workdir.

    Raises:
      UserError: TensorStore knows no object store of this kind.
    """
    if is_local(workdir):
        return FileStore(Path(os.fspath(workdir)))
    return object_store(workdir, LEASE)


def object_store(workdir: epath.Path, key: str) -> ObjectStore:
    """Return the store of one object in a workdir's bucket.

    Raises:
      UserError: neither Google Cloud Storage nor S3.
    """
    scheme, _, where = os.fspath(workdir).partition("://")
    if scheme not in _DRIVERS:
        raise UserError(
            f"--workdir={workdir}: {key} cannot be written there, since no conditional write is known for "
            f"{scheme}://. Use a file system, gs:// or s3://."
        )
    bucket, _, folder = where.partition("/")
    path = f"{folder.rstrip('/')}/" if folder else ""
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": path}
    return ObjectStore(tensorstore.KvStore.open(spec).result(), key)


def identity(text: bytes) -> str:
    """Return the id in the text of a lease; a digest of the text if there is none."""
    try:
        lease_id = json.loads(text)["id"]
    except (ValueError, TypeError, KeyError):
        lease_id = ""
    is_id = isinstance(lease_id, str) and _ID.fullmatch(lease_id)
    return lease_id if is_id else hashlib.sha256(text).hexdigest()[:32]


class ObjectStore:
    """An object, the lease or another, that is written under the condition that its generation has not changed."""

    def __init__(self, kvstore: tensorstore.KvStore, key: str = LEASE):
        self._kvstore, self._key = kvstore, key

    def read(self) -> Entry:
        result = self._kvstore.read(self._key).result()
        return Entry(None if result.state == "missing" else result.value, result.stamp.generation)

    def swap(self, old: Entry, text: bytes | None) -> bool:
        stamp = self._kvstore.write(self._key, text, if_equal=old.version).result()
        # A write that was tried again because its first answer got lost fails, and its text is there.
        return bool(stamp.generation) or self.read().text == text


class FileStore:
    """A file that is created by a hard link, and replaced by whoever links the successor of its id first.

    `lease.json` is the lease. A process that takes over the lease with id X first creates
    `lease.json.after-X`, which only one can, with its own lease as content. From then on its lease is the valid one,
    whether or not `lease.json` was replaced before the process died. That file stays until the lease, or one after
    it, is removed, so a former holder that wakes up in the middle of a write and restores `lease.json` stays replaced.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @property
    def _path(self) -> Path:
        return self._folder / LEASE

    def _after(self, lease_id: str) -> Path:
        return self._folder / f"{LEASE}.after-{lease_id}"

    def read(self) -> Entry:
        chain = self._chain()
        return Entry(chain[-1] if chain else None)

    def _chain(self) -> list[bytes]:
        """Return the lease in the file, and those that succeeded it."""
        chain, seen, text = list[bytes](), set[str](), _read(self._path)
        while text is not None and identity(text) not in seen:
            chain.append(text)
            seen.add(identity(text))
            text = _read(self._after(identity(text)))
        return chain

    def swap(self, old: Entry, text: bytes | None) -> bool:
        if text is None:
            return self._remove(old)
        lease_id = identity(text)
        new = self._folder / f"{LEASE}.{lease_id}.new"
        try:
            _write(new, text)
            if old.text is None:
                return _create(self._path, new, text)
            if old.id != lease_id and not self._succeed(old.id, new, text):
                return False
            try:
                new.replace(self._path)
            except FileNotFoundError:
                return self.read().id == lease_id  # another holder has cleaned up
            return True
        finally:
            new.unlink(missing_ok=True)

    def _succeed(self, old_id: str, new: Path, text: bytes) -> bool:
        """Create the successor of `old_id`; False if another process did, or `old_id` was replaced before."""
        if not _create(self._after(old_id), new, text):
            return False
        if text in self._chain():  # perhaps succeeded by now
            return True
        self._after(old_id).unlink(missing_ok=True)
        return False

    def _remove(self, old: Entry) -> bool:
        if self.read().id != old.id:
            return False
        predecessors = self._predecessors(old.id)
        self._path.unlink(missing_ok=True)
        for path in (*predecessors, *self._folder.glob(f"{LEASE}.*.new")):
            path.unlink(missing_ok=True)
        return True

    def _predecessors(self, lease_id: str) -> list[Path]:
        """Return the files by which one lease after another led to this one."""
        left = {
            path: identity(_read(path) or b"") for path in self._folder.glob(f"{LEASE}.after-*")
        }
        known, files = {lease_id}, list[Path]()
        while earlier := [path for path, successor in left.items() if successor in known]:
            files += earlier
            for path in earlier:
                known.add(path.name.removeprefix(f"{LEASE}.after-"))
                del left[path]
        return files


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, text: bytes) -> None:
    try:
        path.write_bytes(text)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk names no file
        raise


def _create(path: Path, new: Path, text: bytes) -> bool:
    """Let `path` be the file `new`; False if there is a `path` already."""
    try:
        os.link(new, path)
        return True
    except FileNotFoundError:
        return False  # a new holder has cleaned up
    except FileExistsError:
        # On a network file system the answer to a first, successful try may have been lost.
        with suppress(FileNotFoundError):
            return os.path.samefile(new, path)
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        with path.open("xb") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False

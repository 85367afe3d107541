"""WebDataset tars: members of one stem are an example, each extension a field."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import sqlite3
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mmjax.convert.values import KEY, MAX_BYTES, Found, Ignored, raw_file
from mmjax.core.errors import UserError

SUFFIXES: Mapping[str, Callable[[Any], Any]] = {
    ".tar": lambda file: file,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}


class _Header(tarfile.TarInfo):
    """A header whose damage is an error; by default the archive just seems to end there.

    Zero blocks are skipped (`ignore_zeros`), so that archives written one after another are read to the
    end; the last thing must be such a block, or the archive is cut off.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        state: Any = tar
        try:
            header = super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            state.is_zero = type(error).__name__ == "EOFHeaderError" or (
                type(error).__name__ == "EmptyHeaderError" and getattr(state, "is_zero", False)
            )
            if not state.is_zero:
                raise tarfile.ReadError(
                    f"cut off or damaged after {tar.offset} bytes ({error})"
                ) from error
            raise
        state.is_zero = False
        return header


def read_tar(file: epath.Path, ignored: Ignored) -> Iterator[Found]:
    """Yield the members of one stem, one after another, as an example."""
    stems, stem, record = _Names(), "", None
    with _open_tar(file) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            begin, extension = _parts(member.name)
            if not member.isdir() and not extension:
                ignored.add(f"{file.name}/{member.name}")
            elif not member.isdir():
                if record is None or begin != stem:
                    if record is not None:
                        yield record
                    stem = begin
                    record = _begin(file, stem, stems.add(stem))
                _add_member(record, extension.lower(), tar, member)
    if record is not None:
        yield record


def _parts(name: str) -> tuple[str, str]:
    """Return stem and extension, which begins after the file's first dot; a hidden file has no extension."""
    name = name.removeprefix("./")
    file = name.rpartition("/")[2]
    base, _, extension = file.partition(".")
    return name[: len(name) - len(file)] + base, extension if base else ""


def _begin(file: epath.Path, stem: str, is_new: bool) -> Found:
    result = Found(f"{file.name}, {stem!r}")
    result.raw[KEY] = ("bytes", stem.encode("utf-8", "surrogateescape"))
    if not is_new:
        result.fault = "is there twice: members of one stem must lie together (tar --sort=name)"
    return result


def _add_member(
    record: Found, extension: str, tar: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    record.size += member.size
    if not member.isreg():
        record.fault = f"member {member.name!r} is a link or device, which is not followed"
    elif extension in record.raw:
        record.fault = f"has two members '.{extension}'"
    elif record.size > MAX_BYTES:
        record.fault = f"is over {MAX_BYTES >> 20} MiB with member {member.name!r}"
    elif not record.fault:
        opened = tar.extractfile(member)
        assert opened is not None
        record.raw[extension] = raw_file(extension, opened.read())


@contextlib.contextmanager
def _open_tar(file: epath.Path) -> Iterator[tarfile.TarFile]:
    """Yield the archive as a stream; whatever ends it early is a `UserError`."""
    unpack = next(
        opener for suffix, opener in SUFFIXES.items() if file.name.lower().endswith(suffix)
    )
    try:
        with (
            file.open("rb") as opened,
            unpack(opened) as plain,
            tarfile.open(fileobj=plain, mode="r|", tarinfo=_Header, ignore_zeros=True) as tar,
        ):
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{file} cannot be read to its end: {error}. Copy or make it again."
        ) from error


class _Names:
    """A set of names that spills to a temporary file, for sources of any length."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        self._table.execute("CREATE TABLE names (name BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, name: str) -> bool:
        """Return whether the name is new."""
        row = (name.encode("utf-8", "surrogateescape"),)
        return self._table.execute("INSERT OR IGNORE INTO names VALUES (?)", row).rowcount == 1

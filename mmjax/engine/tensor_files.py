"""Arrays in .npz and .safetensors files: listed without reading them, then read by name. Nothing in a file is run.

A file may be damaged or hostile: whatever its bytes are, the result is exact arrays or a `UserError`, and no memory is
taken that the file's own size does not account for.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.core.errors import UserError

# Names of the format -> dtypes here. A file may hold others as long as they are not read.
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
_MOST_AXES = 32
_DEFLATED = 1040  # bytes that one byte of deflate may become, at most


@dataclass(frozen=True)
class Entry:
    """An array of a file.

    Attributes:
      shape: its shape; empty where `dtype` is unknown here and the file does not state it.
      dtype: as the file names it.
      known: the dtype here; None for one that cannot be read.
      place: where its bytes are; only its reader knows what that means.
    """

    shape: tuple[int, ...]
    dtype: str
    known: np.dtype[Any] | None
    place: Any = None

    @property
    def size(self) -> int:
        """Bytes of the array; 0 where its dtype cannot be read."""
        return math.prod(self.shape) * self.known.itemsize if self.known is not None else 0


@dataclass(frozen=True)
class TensorFile:
    """The arrays of a file.

    Attributes:
      path: as the user wrote it.
      entries: by name, the entries of the file's table of contents, checked against its size.
    """

    path: epath.Path
    entries: Mapping[str, Entry]
    _read: Callable[[BinaryIO, Iterable[Entry]], Iterator[np.ndarray]]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return arrays by name, and read no others.

        Raises:
          UserError: a dtype that is unknown here, or bytes that do not form such an array.
        """
        chosen = {name: self.entries[name] for name in names}
        for name, entry in chosen.items():
            if entry.known is None:
                raise UserError(
                    f"'{self.path}' cannot be read: '{printable(name)}' has the dtype {printable(entry.dtype)}, which "
                    "is not numeric here; objects are never unpickled. Store it in another dtype, or remove it."
                )
        with _whole(self.path), self.path.open("rb") as file:
            return dict(zip(chosen, self._read(file, chosen.values()), strict=True))


def open_tensors(path: epath.Path) -> TensorFile:
    """Read the table of contents of a file, and no array.

    Raises:
      UserError: no file of these formats, or one whose contents contradict each other.
    """
    if path.suffix not in _READERS:
        raise UserError(
            f"'{path}' is no workdir, .npz or .safetensors file. Other formats may hold code, and are not read."
        )
    entries, read = _READERS[path.suffix]
    with _whole(path), path.open("rb") as file:
        size = path.stat().length
        return TensorFile(path, entries(file, size), read)


def printable(name: str) -> str:
    """Return a name of a file as it may be shown: at most 200 characters, none of which a terminal would obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:200])
    return shown + ("..." if len(name) > 200 else "")


@contextmanager
def _whole(path: epath.Path) -> Iterator[None]:
    """Turn what decoders raise at a file's bytes into a `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything at bytes that are none of its own
        words = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UserError(f"'{path}' cannot be read: {words}") from error


def _shape(shape: Any, name: str) -> tuple[int, ...]:
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > _MOST_AXES
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ValueError(f"'{printable(name)}' has the shape {printable(str(shape))}")
    return tuple(shape)


# --- safetensors -------------------------------------------------------------------------------


def _safetensors_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """Read eight bytes of length (little-endian), a header in JSON, and the bytes of the arrays without a gap."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError("it ends before its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"its header would have {length} bytes")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("it ends in its header")
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _safetensors_entry(name, info, start) for name, info in header.items()}
    _check_places(entries, start, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("its header has a name twice")
    return names


def _safetensors_entry(name: str, info: Any, start: int) -> Entry:
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise ValueError(f"'{printable(name)}' lacks dtype, shape or data_offsets")
    shape = _shape(info["shape"], name)
    begin, end = _shape(info["data_offsets"], name) if len(info["data_offsets"]) == 2 else (1, 0)
    known = _SAFETENSORS.get(info["dtype"]) if isinstance(info["dtype"], str) else None
    entry = Entry(
        shape, str(info["dtype"]), jnp.dtype(known) if known else None, (start + begin, start + end)
    )
    if begin > end or known and end - begin != entry.size:
        raise ValueError(f"'{printable(name)}' has {end - begin} bytes, its shape {entry.size}")
    return entry


def _check_places(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Refuse arrays that overlap, lie beyond the end, or leave bytes between them or after the last."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].place):
        begin, end = entry.place
        if begin != at:
            raise ValueError(f"'{printable(name)}' begins at byte {begin}, where {at} was expected")
        at = end
    if at != size:
        raise ValueError(f"its arrays end at byte {at}, the file at {size}")


def _read_safetensors(file: BinaryIO, entries: Iterable[Entry]) -> Iterator[np.ndarray]:
    for entry in entries:
        file.seek(entry.place[0])
        data = _exactly(file.read(entry.size), entry)
        yield np.frombuffer(data, entry.known).reshape(entry.shape)


def _exactly(data: bytes, entry: Entry) -> bytes:
    if len(data) != entry.size:
        raise ValueError(f"it ends after {len(data)} of {entry.size} bytes of an array")
    return data


# --- npz ---------------------------------------------------------------------------------------


def _npz_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """Read a zip file whose members `NAME.npy` have a header of their own before the array."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError("it has a name twice")
        return {
            name: _npz_entry(archive, name, member, size)
            for name, member in zip(names, members, strict=True)
        }


def _npz_entry(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo, size: int) -> Entry:
    if not member.filename.endswith(".npy"):
        return Entry((), "no array", None)
    most = member.compress_size * (1 if member.compress_type == zipfile.ZIP_STORED else _DEFLATED)
    if member.compress_size > size or member.file_size > most:
        raise ValueError(f"'{printable(name)}' would have {member.file_size} bytes")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            return Entry((), f"of version {version} of the format", None)
        shape, is_fortran, dtype = readers[version](stream)
        header = stream.tell()
    shape = _shape(shape, name)
    if dtype.hasobject or dtype.kind not in "biufc" or dtype.subdtype is not None:
        return Entry(shape, str(dtype), None)
    entry = Entry(shape, str(dtype), dtype, (member, header, is_fortran))
    if member.file_size - header != entry.size:
        raise ValueError(
            f"'{printable(name)}' has {member.file_size - header} bytes, its shape {entry.size}"
        )
    return entry


def _read_npz(file: BinaryIO, entries: Iterable[Entry]) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        for entry in entries:
            member, header, is_fortran = entry.place
            with archive.open(member) as stream:
                stream.read(header)
                data = _exactly(stream.read(entry.size), entry)
                if stream.read(1):  # at the end, zipfile compares the checksum
                    raise ValueError("it continues after an array")
            assert entry.known is not None
            array = np.frombuffer(data, entry.known)
            array = array.astype(entry.known.newbyteorder("="), copy=False)
            yield array.reshape(entry.shape[::-1]).T if is_fortran else array.reshape(entry.shape)


_READERS: Mapping[str, tuple[Callable[[BinaryIO, int], dict[str, Entry]], Any]] = {
    ".npz": (_npz_entries, _read_npz),
    ".safetensors": (_safetensors_entries, _read_safetensors),
}
SUFFIXES = tuple(_READERS)

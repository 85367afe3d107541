"""Files of arrays, whole, damaged and hostile: exact arrays or a `UserError`, and nothing is run."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.engine.tensor_files import open_tensors, printable

Values = dict[str, np.ndarray]
VALUES: Values = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b/c": np.linspace(-1, 1, 5),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.float32(7.0).reshape(()),
}
DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def raw(header: bytes | dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file by its parts."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def safetensors(values: Values) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in values.items():
        end = len(body) + value.nbytes
        header[name] = {
            "dtype": DTYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [len(body), end]
        }  # fmt: skip
        body += value.tobytes()
    return raw(header, body)


def npz(values: Values) -> bytes:
    file = io.BytesIO()
    np.savez(file, **values)
    return file.getvalue()


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def npy(header: str, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def put(folder: Path, name: str, content: bytes) -> epath.Path:
    (folder / name).write_bytes(content)
    return epath.Path(folder / name)


def read(path: epath.Path) -> Values:
    file = open_tensors(path)
    return file.read(file.entries)


# --- whole files -------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [npz, safetensors])
def test_every_array_comes_back(tmp_path: Path, write: Any) -> None:
    path = put(tmp_path, f"weights.{write.__name__}", write(VALUES))
    found = read(path)
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)
    assert {n: e.shape for n, e in open_tensors(path).entries.items()} == {
        n: v.shape for n, v in VALUES.items()
    }


def test_arrays_that_lie_the_other_way_round_in_a_npz(tmp_path: Path) -> None:
    values = {"f": np.asfortranarray(VALUES["a"]), "big": VALUES["a"].astype(">f4")}
    found = read(put(tmp_path, "w.npz", npz(values)))
    for value in found.values():
        np.testing.assert_array_equal(value, VALUES["a"])
        assert value.dtype == np.dtype("float32")


def test_a_compressed_npz_is_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, zeros=np.zeros((1000, 100), np.float32))
    assert len(file.getvalue()) < 2000
    assert read(put(tmp_path, "w.npz", file.getvalue()))["zeros"].shape == (1000, 100)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """An unknown dtype, or damage, elsewhere in the file is nobody's concern."""
    odd = raw(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "odd": {"dtype": "F4_E2M1", "shape": [4], "data_offsets": [8, 10]},
        },
        np.array([1, 2], np.float32).tobytes() + b"xx",
    )
    file = open_tensors(put(tmp_path, "w.safetensors", odd))
    np.testing.assert_array_equal(file.read(["a"])["a"], [1, 2])
    with pytest.raises(UserError, match=r"w\.safetensors' cannot be read: 'odd' .* F4_E2M1"):
        file.read(["a", "odd"])
    content = bytearray(npz({"a": VALUES["a"], "bad": np.ones(5000)}))
    content[content.rindex(np.float64(1).tobytes())] ^= 1
    file = open_tensors(put(tmp_path, "w.npz", bytes(content)))
    np.testing.assert_array_equal(file.read(["a"])["a"], VALUES["a"])
    with pytest.raises(UserError, match="cannot be read: Bad CRC-32"):
        file.read(["bad"])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_short_floats_are_read(tmp_path: Path, name: str) -> None:
    value = np.array([1.0, -0.5, 2.0]).astype(jnp.dtype(name))
    there = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}[name]
    header = {"a": {"dtype": there, "shape": [3], "data_offsets": [0, value.nbytes]}}
    found = read(put(tmp_path, "w.safetensors", raw(header, value.tobytes())))["a"]
    np.testing.assert_array_equal(found.astype(np.float32), [1.0, -0.5, 2.0])


# --- hostile files -----------------------------------------------------------------------------

F = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8
HOSTILE = {
    "nothing": b"",
    "three bytes": b"abc",
    "no header": raw(b"{}", length=2**63),
    "a header longer than the file": raw(b"{}", length=3),
    "a header that ends early": raw({"a": F}, EIGHT, length=10),
    "a header that is no text": raw(b"\xff\xfe\xfd"),
    "a header that is no object": raw(b"[1, 2]"),
    "a header of arrays in arrays": raw(b"[" * 100_000),
    "a number of too many digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "an array that is no object": raw(b'{"a": 3}'),
    "an array without dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "a dtype that is a list": raw({"a": {**F, "dtype": ["F32"]}}, EIGHT),
    "a name twice": raw(b'{"a": %s, "a": %s}' % ((json.dumps(F).encode(),) * 2), EIGHT),
    "a negative size": raw({"a": {**F, "shape": [-2]}}, EIGHT),
    "a size that is a fraction": raw({"a": {**F, "shape": [2.0]}}, EIGHT),
    "a size that is a truth value": raw({"a": {**F, "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
    "a shape that is a number": raw({"a": {**F, "shape": 2}}, EIGHT),
    "a shape of many axes": raw({"a": {**F, "shape": [1] * 100 + [2]}}, EIGHT),
    "a huge shape": raw({"a": {**F, "shape": [2**62, 2**62]}}, EIGHT),
    "a huge shape of few bytes": raw({"a": {**F, "shape": [2**62, 4]}}, EIGHT),
    "offsets beyond the end": raw({"a": {**F, "data_offsets": [8, 16]}}, EIGHT),
    "offsets the other way round": raw({"a": {**F, "data_offsets": [8, 0]}}, EIGHT),
    "negative offsets": raw({"a": {**F, "data_offsets": [-8, 0]}}, EIGHT),
    "offsets that are words": raw({"a": {**F, "data_offsets": ["0", "8"]}}, EIGHT),
    "three offsets": raw({"a": {**F, "data_offsets": [0, 8, 8]}}, EIGHT),
    "offsets that are a number": raw({"a": {**F, "data_offsets": 8}}, EIGHT),
    "arrays that overlap": raw({"a": F, "b": {**F, "data_offsets": [4, 12]}}, EIGHT + EIGHT),
    "arrays in one place": raw({"a": F, "b": F}, EIGHT),
    "bytes between the arrays": raw({"a": F, "b": {**F, "data_offsets": [9, 17]}}, EIGHT + b"x" + EIGHT),
    "bytes behind the arrays": raw({"a": F}, EIGHT + b"x"),
    "too few bytes for the shape": raw({"a": {**F, "data_offsets": [0, 4]}}, b"1234"),
}  # fmt: skip

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }\n"
HOSTILE_ZIPS = {
    "no zip": b"PK nothing of the kind",
    "no array": zipped([("a.npy", b"hello")]),
    "a header that ends early": zipped([("a.npy", npy(HEADER % "(2,)")[:20])]),
    "a header that is code": zipped([("a.npy", npy("__import__('os').abort()\n"))]),
    "a huge shape": zipped([("a.npy", npy(HEADER % "(4611686018427387904, 4)", EIGHT))]),
    "a shape that overflows to few bytes": zipped([("a.npy", npy(HEADER % f"({2**62}, 4)", b""))]),
    "a negative size": zipped([("a.npy", npy(HEADER % "(-2,)", EIGHT))]),
    "fewer bytes than the shape": zipped([("a.npy", npy(HEADER % "(3,)", EIGHT))]),
    "more bytes than the shape": zipped([("a.npy", npy(HEADER % "(1,)", EIGHT))]),
    "a dtype that is none": zipped([("a.npy", npy(HEADER.replace("<f4", "<q9") % "(2,)", EIGHT))]),
    "a name twice": zipped([("a.npy", npy(HEADER % "(2,)", EIGHT)), ("a", b"")]),
}


def bomb() -> bytes:
    """Return a directory that promises more bytes than any deflate of so few can become."""
    content = bytearray(
        zipped([("a.npy", npy(HEADER % f"({2**29},)", EIGHT))], zipfile.ZIP_DEFLATED)
    )
    place = content.rindex(b"PK\x01\x02") + 24  # the size of the member when it is whole
    content[place : place + 4] = struct.pack("<I", 2**31 + len(npy(HEADER % f"({2**29},)")))
    return bytes(content)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_safetensors_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = put(tmp_path, "hostile.safetensors", HOSTILE[what])
    with pytest.raises(UserError, match=r"hostile\.safetensors' cannot be read: ."):
        read(path)


@pytest.mark.parametrize("what", HOSTILE_ZIPS)
def test_a_hostile_npz_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = put(tmp_path, "hostile.npz", HOSTILE_ZIPS[what])
    with pytest.raises(UserError, match=r"hostile\.npz' cannot be read: ."):
        read(path)


def test_an_object_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    values = {"trap": np.array([Trap()], dtype=object), "good": VALUES["a"]}
    path = put(tmp_path, "w.npz", npz(values))
    np.testing.assert_array_equal(open_tensors(path).read(["good"])["good"], VALUES["a"])
    with pytest.raises(UserError, match="'trap' has the dtype object"):
        read(path)
    with pytest.raises(UserError):
        read(put(tmp_path, "x.npz", pickle.dumps(Trap())))
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "w.npz", allow_pickle=True)["trap"]  # the control
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.safetensors", HOSTILE["a huge shape"]),
        ("w.npz", HOSTILE_ZIPS["a huge shape"]),
        ("w.npz", bomb()),
    ],
)
def test_no_memory_is_taken_for_what_is_not_there(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = put(tmp_path, name, content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_a_name_cannot_command_a_terminal() -> None:
    assert printable("a/b_1.weight") == "a/b_1.weight"
    assert printable("\x1b[2J\ud800\n") == "\\x1b[2J\\ud800\\n"
    assert len(printable("x" * 1000)) == 203


# --- any damage --------------------------------------------------------------------------------


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Replace a stretch of the file by other bytes, or by none."""
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 12))
    return content[:start] + data.draw(st.binary(max_size=12)) + content[start + length :]


@given(st.data())
def test_a_damaged_npz_gives_what_was_written_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = damaged(data, npz(VALUES))
    path = put(tmp_path_factory.getbasetemp(), "damaged.npz", content)
    try:
        found = read(path)
    except UserError:
        return
    written = {(v.dtype.str, v.shape, v.tobytes()) for v in VALUES.values()}
    assert {(v.dtype.str, v.shape, v.tobytes()) for v in found.values()} <= written


OFFSETS = st.one_of(st.integers(-1, 40), st.integers(2**60, 2**65), st.none(), st.text(max_size=2))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "X", "", 3]),
        "shape": st.lists(OFFSETS, max_size=3) | st.integers(0, 3),
        "data_offsets": st.lists(OFFSETS, max_size=3),
    }
)


def by_hand(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Return a file with what the format's words name."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    return {
        name: (e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]])
        for name, e in header.items()
        if name != "__metadata__"
    }


@given(st.data())
def test_any_safetensors_file_gives_what_its_header_says_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = st.dictionaries(st.text(max_size=3), ENTRY, max_size=3)
    made = st.builds(raw, header, st.binary(max_size=40))
    content = data.draw(st.one_of(made, st.just(safetensors(VALUES))))
    content = damaged(data, content) if data.draw(st.booleans()) else content
    path = put(tmp_path_factory.getbasetemp(), "damaged.safetensors", content)
    try:
        found = read(path)
    except UserError:
        return
    expected = by_hand(content)
    assert found.keys() == expected.keys()
    sizes = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "F8_E4M3": 1}
    for name, (dtype, shape, stored) in expected.items():
        assert found[name].tobytes() == stored and list(found[name].shape) == shape
        assert found[name].dtype.itemsize == sizes.get(dtype, found[name].dtype.itemsize)

"""Check what is damage and what is not; checksums by another way of counting; documents that cannot be changed."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.engine.integrity import (
    DECODING,
    Damaged,
    Mismatch,
    Unreadable,
    checksum,
    is_damage,
    reading,
    seal,
    unseal,
    words,
)

FOLDER = epath.Path("run/checkpoints/4")


# --- damage ------------------------------------------------------------------------------------


def store(text: str) -> ValueError:
    """Raise what TensorStore raises: the number of the system's error stands before or behind its spec."""
    before, bracket, code = text.partition(" [")
    spec = ' [tensorstore_spec=\'{"path":["x"]}\']'
    return ValueError(f"{before}{spec}{bracket}{code}")


ERRORS: dict[str, tuple[BaseException, bool]] = {
    "a missing file": (FileNotFoundError(errno.ENOENT, "No such file", "x"), True),
    "a file in a folder's place": (NotADirectoryError(errno.ENOTDIR, "x"), True),
    "no JSON": (json.JSONDecodeError("Expecting value", "", 0), True),
    "no text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), True),
    "brackets without end": (RecursionError("maximum recursion depth"), True),
    "a checksum": (Mismatch("does not match"), True),
    "lost data": (
        store('DATA_LOSS: Error reading "x": CRC-32C checksum verification failed'),
        True,
    ),
    "a missing object": (store('NOT_FOUND: Error opening "zarr" driver'), True),
    "a short file": (store("OUT_OF_RANGE: Requested byte range"), True),
    "a missing file of a store": (store("UNKNOWN: Opening x [os_error_code='2']"), True),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "x"), False),
    "a bad disk": (OSError(errno.EIO, "Input/output error", "x"), False),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "x"), False),
    "a stale mount": (OSError(errno.ESTALE, "Stale file handle", "x"), False),
    "no memory": (MemoryError(), False),
    "no memory for a device": (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
    "a device": (RuntimeError("INVALID_ARGUMENT: the device"), False),
    "a store's permission": (store("PERMISSION_DENIED: Opening x [os_error_code='13']"), False),
    "a store's files": (
        ValueError("RESOURCE_EXHAUSTED: Opening x [os_error_code='24'] [tensorstore_spec='{}']"),
        False,
    ),
    "a store's disk": (store("DATA_LOSS: Reading x [os_error_code='5']"), False),
    "a store that is away": (store("UNAVAILABLE: no answer"), False),
    "a store that is slow": (store("DEADLINE_EXCEEDED: no answer"), False),
    "an error of our own": (KeyError("x"), False),
}


@pytest.mark.parametrize("what", ERRORS)
def test_only_bytes_that_are_wrong_or_missing_are_damage(what: str) -> None:
    error, expected = ERRORS[what]
    assert is_damage(error) is expected
    wrapped = Exception("Encountered error while reading array index: (slice(0, 8, None),).")
    wrapped.__cause__ = error
    assert is_damage(wrapped) is expected
    with pytest.raises(Damaged if expected else Unreadable) as raised, reading(FOLDER):
        raise error
    assert str(FOLDER) in str(raised.value) and raised.value.__cause__ is error


def test_a_failure_behind_a_decoding_error_is_no_damage() -> None:
    error = json.JSONDecodeError("Expecting value", "", 0)
    error.__context__ = OSError(errno.EIO, "Input/output error")
    assert not is_damage(error)


def test_decoding_errors_are_damage_where_there_are_no_checksums() -> None:
    for error in (KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("Unknown type")):
        assert is_damage(error, DECODING) and not is_damage(error)
    for error in (store("PERMISSION_DENIED: x"), OSError(errno.EIO, "x"), MemoryError()):
        assert not is_damage(error, DECODING)


def test_a_refusal_is_passed_on() -> None:
    with pytest.raises(UserError, match="^another run's$") as raised, reading(FOLDER):
        raise UserError("another run's")
    assert type(raised.value) is UserError


def test_the_words_are_those_of_the_innermost_cause_in_one_line() -> None:
    outer = Exception("Encountered error. See full details: " + "x" * 1000)
    outer.__cause__ = store("UNKNOWN: Reading\n  x [os_error_code='5']")
    assert words(outer) == "UNKNOWN: Reading x [os_error_code='5']"
    locations = ValueError("NOT_FOUND: x [source locations='a.cc:1\nb.cc:2']")
    assert words(locations) == "NOT_FOUND: x"
    assert words(PermissionError(13, "Permission denied", "/a/b")) == (
        "[Errno 13] Permission denied: '/a/b'"
    )
    assert words(KeyError("clock")) == "KeyError: 'clock'"
    assert words(MemoryError()) == "MemoryError"


# --- arrays ------------------------------------------------------------------------------------


def by_hand(content: bytes) -> str:
    """Return sums of Python's integers, which have no end."""
    sha, row = hashlib.sha256(), 8 * 1021
    whole = len(content) // row * row
    for block in range(0, whole, 256 * row):
        sums = [0] * 1021
        for at in range(block, min(block + 256 * row, whole), 8):
            column = (at - block) % row // 8
            sums[column] += int.from_bytes(content[at : at + 8], "little")
        sha.update(b"".join((s % 2**64).to_bytes(8, "little") for s in sums))
    sha.update(content[whole:])
    return sha.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 8167, 8168, 8169, 3 * 8168 + 5, 256 * 8168, 257 * 8168 + 9])
def test_a_checksum_is_of_sums_of_columns(size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert checksum(content) == by_hand(content.tobytes())


def test_a_checksum_is_of_the_bytes_whatever_their_dtype_and_order() -> None:
    array = np.random.default_rng(0).normal(size=(300, 41))
    for each in (array, array.astype(jnp.bfloat16), array > 0, np.float32(3), array.T, array[::2]):
        assert checksum(np.asarray(each)) == by_hand(np.asarray(each).tobytes())
    assert checksum(array.T) != checksum(array)


CHANGES: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "a bit": lambda x, rng: x.__setitem__(i := int(rng.integers(len(x))), x[i] ^ 1 << int(rng.integers(8))),
    "a sector of zeros": lambda x, rng: x.__setitem__(
        slice(i := 512 * int(rng.integers(len(x) // 512)), i + 512), bytes(512)
    ),
    "two sectors in each other's place": lambda x, rng: _swap(x, *rng.choice(len(x) // 512, 2, False)),
    "one bit of all words": lambda x, rng: x.__setitem__(slice(7, None, 8), bytes(b ^ 128 for b in x[7::8])),
}  # fmt: skip


def _swap(content: bytearray, one: int, other: int) -> None:
    a, b = slice(512 * one, 512 * one + 512), slice(512 * other, 512 * other + 512)
    content[a], content[b] = content[b], content[a]


@pytest.mark.parametrize("what", CHANGES)
def test_a_checksum_tells_what_goes_wrong_on_disks(what: str) -> None:
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, 50 * 8168 + 100, np.uint8).tobytes()
    before = checksum(np.frombuffer(content, np.uint8))
    for _ in range(20):
        changed = bytearray(content)
        CHANGES[what](changed, rng)
        assert bytes(changed) != content
        assert checksum(np.frombuffer(bytes(changed), np.uint8)) != before


# --- documents ---------------------------------------------------------------------------------

JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_a_sealed_document_comes_back_from_its_text(document: dict[str, Any]) -> None:
    assert unseal(json.loads(json.dumps(seal(document))), "it") == document


def test_no_bit_of_a_sealed_document_can_be_changed_unnoticed() -> None:
    document = {"step": 12, "clock": {"positions": {"one": 96}, "loss": [0.25, -1e-7]}, "text": "é"}
    text = json.dumps(seal(document)).encode()
    for at in range(len(text)):
        for bit in range(8):
            changed = text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]
            try:
                assert unseal(json.loads(changed.decode()), "it") == document
            except ValueError as error:
                assert is_damage(error)


@pytest.mark.parametrize("document", [None, [], 3, {}, {"sha256": 5}, {"step": 1, "sha256": "0"}])
def test_what_has_no_seal_is_a_mismatch(document: Any) -> None:
    with pytest.raises(Mismatch, match="the list"):
        unseal(document, "the list")

"""Distinguish a damaged checkpoint from one that cannot be read now, and find damage: checksums and sealed documents.

Damage is what another try would not cure: bytes that do not decode, a checksum that does not match, a file that is
missing. Only then may a run go back to an older checkpoint. Everything else (permission, a failing disk, no memory,
too many open files, a store that does not answer) is for the user to repair, so it ends the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from mmjax.core.errors import UserError

SEAL = "sha256"
# A block of an array is summed over its rows. 1021 is prime, so that sectors of a disk that changed places do not
# meet the same columns.
_COLUMNS, _ROWS = 1021, 256
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Of the status words of TensorStore, those that concern the bytes and not the access to them.
_DAMAGE = {"DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
# What TensorStore appends to its messages, for its own developers.
_APPENDED = re.compile(r" \[(?:tensorstore_spec|source locations)='.*?'\]", re.DOTALL)
_STATUS = re.compile(r"^([A-Z]+(?:_[A-Z]+)*): ")
# What Orbax raises for documents that are not as it wrote them; they have no checksum before format 2.
DECODING = (ValueError, KeyError, TypeError, AttributeError, IndexError)


class Mismatch(ValueError):
    """The error for bytes that do not match their checksum."""


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written.

    Attributes:
      cause: what is wrong, for a message that names the checkpoint itself.
    """

    def __init__(self, folder: epath.Path, cause: str):
        super().__init__(
            f"Checkpoint '{folder}' is damaged: {cause}. Choose another step, or restore a copy."
        )
        self.cause = cause


class Unreadable(UserError):
    """A checkpoint that may be whole, but cannot be read now."""

    def __init__(self, folder: epath.Path, cause: str):
        super().__init__(
            f"Checkpoint '{folder}' cannot be read: {cause}. It was left as it is. Remove the cause and run again."
        )


@contextmanager
def reading(folder: epath.Path, decoding: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn errors of a block that reads the checkpoint in `folder` into `Damaged` or `Unreadable`.

    Args:
      folder: the checkpoint, for the message.
      decoding: errors that mean damage here unless they quote an error of the system.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = Damaged if is_damage(error, decoding) else Unreadable
        raise kind(folder, words(error)) from error


def is_damage(error: BaseException, decoding: tuple[type[Exception], ...] = ()) -> bool:
    """Return whether an error, or one of its causes, means that bytes are damaged or missing."""
    verdicts = [_verdict(cause, decoding) for cause in _chain(error)]
    return any(v is True for v in verdicts) and not any(v is False for v in verdicts)


def words(error: BaseException) -> str:
    """Return the innermost cause of an error in one line, with its type if that adds information."""
    chain = _chain(error)
    innermost = next((cause for cause in chain if isinstance(cause, Mismatch)), chain[-1])
    text = " ".join(_APPENDED.sub("", str(innermost)).split())
    named = isinstance(innermost, (OSError, Mismatch)) or _STATUS.match(text)
    return text if named else f"{type(innermost).__name__}: {text}".rstrip(": ")


def _verdict(error: BaseException, decoding: tuple[type[Exception], ...]) -> bool | None:
    """Return True for damage, False for a failure, None for an error whose causes decide."""
    if isinstance(error, OSError):
        return error.errno in _MISSING
    if isinstance(error, (Mismatch, json.JSONDecodeError, UnicodeDecodeError, RecursionError)):
        return True
    if isinstance(error, (MemoryError, RuntimeError)):  # XLA's are RuntimeErrors, with status words
        return False
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return int(number[1]) in _MISSING
    status = _STATUS.match(str(error))
    if status:
        return status[1] in _DAMAGE
    return True if isinstance(error, decoding) else None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return chain


# --- arrays ------------------------------------------------------------------------------------


def checksum(array: np.ndarray[Any, Any]) -> str:
    """Return a digest of an array's bytes that is as fast as memory.

    Words of 8 bytes are summed mod 2**64 down the columns of blocks of 256 rows of 1021 words, and the sums are
    hashed by SHA-256, as is what does not fill a row. A changed word changes the sum of its column, unless another
    word of that column in the same block (of 2 MB) changes by just as much: damage within 8168 bytes in a row, as
    flipped bits or a zeroed sector, is always found. CRC-32C in the codec of the arrays, as TensorStore has it, makes
    saving 1.3 times and restoring 1.5 times as slow (benchmarks/checksums.py).
    """
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    rows = len(octets) // (8 * _COLUMNS)
    words = octets[: 8 * _COLUMNS * rows].view("<u8").reshape(rows, _COLUMNS)
    digest = hashlib.sha256()
    for first in range(0, rows, _ROWS):
        digest.update(np.add.reduce(words[first : first + _ROWS], axis=0).data)
    digest.update(octets[8 * _COLUMNS * rows :].data)
    return digest.hexdigest()


# --- documents ---------------------------------------------------------------------------------


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON data with its own SHA-256, over all keys and values."""
    return {**document, SEAL: _digest(document)}


def unseal(document: Any, what: str) -> dict[str, Any]:
    """Return the document that was sealed.

    Raises:
      Mismatch: it is not as it was sealed; the message calls it `what`.
    """
    if not isinstance(document, dict) or not isinstance(document.get(SEAL), str):
        raise Mismatch(f"{what} has no SHA-256")
    content = {key: value for key, value in document.items() if key != SEAL}
    if _digest(content) != document[SEAL]:
        raise Mismatch(f"{what} does not match its SHA-256")
    return content


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

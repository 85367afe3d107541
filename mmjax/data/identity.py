"""Identities of data: by which a run notices that its data have changed since it began.

An identity is the digest of what a format states of the data (names, counts, sizes, digests), and digests of some of
the records, each at its place: the first, the last and some between. Reading those is cheap however many there are,
and shows data whose order or values have changed as a whole. Checkpoints of version 1 hold the first part alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from mmjax.data import order

_RECORDS = " records "
_SAMPLED = 64
_DIGITS = 8
_UNREADABLE = "?"


def identity(facts: str, records: Iterable[str]) -> str:
    """Return the identity of data with the digest `facts`, and digests of sampled records."""
    return f"{facts}{_RECORDS}{' '.join(records)}"


def facts_of(whole: str) -> str:
    """Return the digest of what the format states; the whole of an identity that has no records."""
    return whole.partition(_RECORDS)[0]


def records_of(whole: str) -> list[str]:
    """Return the digests of the sampled records."""
    return whole.partition(_RECORDS)[2].split()


def sample(count: int, read: Callable[[int], bytes]) -> list[str]:
    """Return the digests of some of `count` records, of all where they are few; `?` for one that cannot be read."""
    return [_digest(read, place) for place in places(count)]


def places(count: int) -> list[int]:
    """Return which records are sampled, ascending; a function of their number alone."""
    if count <= _SAMPLED:
        return list(range(count))
    drawn = order.stream(order.fold(0, order.name_key("identity"), count), _SAMPLED - 2)
    return sorted({0, count - 1, *(int(x) % count for x in drawn)})


def _digest(read: Callable[[int], bytes], place: int) -> str:
    try:
        return hashlib.sha256(read(place)).hexdigest()[:_DIGITS]
    except Exception:  # a damaged record is an invalid slot: it ends no run
        return _UNREADABLE


def is_same(saved: str, now: str) -> bool:
    """Return whether data are those of before: the same facts, and the same records where both could be read."""
    if facts_of(saved) != facts_of(now):
        return False
    before, after = records_of(saved), records_of(now)
    if not before or not after:
        return True
    return len(before) == len(after) and all(
        one == other or _UNREADABLE in (one, other)
        for one, other in zip(before, after, strict=True)
    )

"""Attention masks: predicates on the attributes of two tokens, composed with `&` and `|`.

An attribute is one property of each token of a stream, `[B or 1, S]`: as a NumPy array where it is known before the
program is compiled (from the stream's static layout), else as a JAX array; integers always, a name by its `code`. A
kernel evaluates a mask block by block, and may treat its static part better than the rest.

    Causal()                                   text
    Causal() & Same("item")                    packed texts
    Causal() | Same("span", beside=0)          text with pictures in it, each attending to itself (Transfusion)
    Causal() | KeyIs("prefix", 1)              a prefix that all see
    Same("modality") | QueryIs("modality", "fusion")     Zorro
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mmjax.core.errors import UserError, nearest

Attributes = Mapping[str, Any]


def code(name: int | str) -> int:
    """Return the integer that stands for a name in an attribute; an integer stands for itself."""
    return zlib.crc32(name.encode()) >> 1 if isinstance(name, str) else name


@dataclass(frozen=True)
class Mask(abc.ABC):
    """A predicate on pairs of tokens: true where a query may attend to a key."""

    @abc.abstractmethod
    def reads(self) -> frozenset[str]:
        """Return the names of the attributes that it looks at."""

    @abc.abstractmethod
    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        """Return whether query s may attend to key t, boolean `[B or 1, S, T]`; NumPy if all it reads is NumPy."""

    def __and__(self, other: Mask) -> Mask:
        return other if self == FULL else self if other == FULL else And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return FULL if FULL in (self, other) else Or(self, other)


@dataclass(frozen=True)
class Full(Mask):
    """Every key."""

    def reads(self) -> frozenset[str]:
        return frozenset()

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        return np.ones((1, 1, 1), bool)


FULL = Full()


@dataclass(frozen=True)
class Causal(Mask):
    """Keys whose `position` is not after the query's.

    With attribute `index`, keys that do not lie after the query: static even where positions are not, and the same
    mask where the tokens of an item lie in the order of their positions.
    """

    attribute: str = "position"

    def reads(self) -> frozenset[str]:
        return frozenset({self.attribute})

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        query, key = _pair(queries, keys, self.attribute)
        return query >= key


@dataclass(frozen=True)
class Same(Mask):
    """Keys that agree with the query in an attribute, unless its value is `beside`."""

    attribute: str
    beside: int | str | None = None

    def reads(self) -> frozenset[str]:
        return frozenset({self.attribute})

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        query, key = _pair(queries, keys, self.attribute)
        same = query == key
        return same if self.beside is None else same & (query != code(self.beside))


@dataclass(frozen=True)
class QueryIs(Mask):
    """Every key, for queries with this value of an attribute."""

    attribute: str
    value: int | str

    def reads(self) -> frozenset[str]:
        return frozenset({self.attribute})

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        return _pair(queries, keys, self.attribute)[0] == code(self.value)


@dataclass(frozen=True)
class KeyIs(Mask):
    """Keys with this value of an attribute."""

    attribute: str
    value: int | str

    def reads(self) -> frozenset[str]:
        return frozenset({self.attribute})

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        return _pair(queries, keys, self.attribute)[1] == code(self.value)


@dataclass(frozen=True)
class _Two(Mask):
    left: Mask
    right: Mask

    def reads(self) -> frozenset[str]:
        return self.left.reads() | self.right.reads()


@dataclass(frozen=True)
class And(_Two):
    """Keys that both allow."""

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        return self.left.allows(queries, keys) & self.right.allows(queries, keys)


@dataclass(frozen=True)
class Or(_Two):
    """Keys that either allows."""

    def allows(self, queries: Attributes, keys: Attributes) -> Any:
        return self.left.allows(queries, keys) | self.right.allows(queries, keys)


def factors(mask: Mask) -> list[Mask]:
    """Return the masks that make up `mask` by `&`; none for `FULL`."""
    if isinstance(mask, And):
        return factors(mask.left) + factors(mask.right)
    return [] if mask == FULL else [mask]


def is_static(mask: Mask, queries: Attributes, keys: Attributes) -> bool:
    """Return whether all that a mask reads is known before compilation."""
    return not any(isinstance(side[a], jax.Array) for side in (queries, keys) for a in mask.reads())


@dataclass(frozen=True)
class Pairs:
    """The pairs of queries and keys that may attend.

    Attributes:
      mask: the predicate.
      queries, keys: attributes of the tokens on either side, `[B or 1, S]` and `[B or 1, T]`.
      valid_BT: which keys exist; None means all.
    """

    mask: Mask = FULL
    queries: Attributes | None = None
    keys: Attributes | None = None
    valid_BT: jax.Array | None = None

    def allowed(self, queries: Attributes | None = None) -> Any:
        """Return the allowed pairs, bool, broadcast to `[B, S, T]`, of all queries or some; None for all pairs."""
        result = None
        if self.mask != FULL:
            result = self.mask.allows(queries or self.queries or {}, self.keys or {})
        if self.valid_BT is None:
            return result
        valid_B1T = self.valid_BT[:, None, :]
        return valid_B1T if result is None else result & valid_B1T

    @property
    def is_static(self) -> bool:
        return self.valid_BT is None and is_static(self.mask, self.queries or {}, self.keys or {})


def has_key(allowed: Any) -> Any:
    """Return which queries may attend to any key, bool `[B or 1, S or 1]`; None if it is known that all may.

    Args:
      allowed: the allowed pairs, as `Pairs.allowed` returns them.
    """
    if allowed is None:
        return None
    any_BS = allowed.any(axis=-1)
    return None if isinstance(any_BS, np.ndarray) and any_BS.all() else any_BS


def check(mask: Mask, *sides: Attributes) -> None:
    """Raise a `UserError` for an attribute that is read and not there."""
    for attributes in sides:
        for name in sorted(mask.reads()):
            if name not in attributes:
                raise UserError(
                    f"The attention mask {mask} reads attribute '{name}' of the tokens, which have: "
                    f"{', '.join(attributes) or 'none'}.{nearest(name, attributes)}"
                )


def _pair(queries: Attributes, keys: Attributes, name: str) -> tuple[Any, Any]:
    """Return an attribute of the queries `[., S, 1]` and of the keys `[., 1, T]`."""
    return queries[name][:, :, None], keys[name][:, None, :]

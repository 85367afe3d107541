"""Bounds of the numbers in a config: each dataclass states its own, as intervals, in `__post_init__`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmjax.core.errors import UserError, nearest

FRACTION = "[0, 1]"
PART = "[0, 1)"  # a decay, or a share that is dropped
COUNT = "[1, 2147483647]"
SIZE = "[0, 2147483647]"  # a count that may be 0
POSITIVE = "(0, inf)"
AMOUNT = "[0, inf)"


class FieldError(UserError):
    """The error for an invalid value of a field; `configs.build` puts the block's path before `key`.

    Args:
      owner: the dataclass, or its name.
      words: the rest of the sentence, such as `is 3; it must be even.`
    """

    def __init__(self, owner: Any, key: str, words: str):
        self.key, self.words = key, words
        name = owner if isinstance(owner, str) else type(owner).__name__
        super().__init__(f"{name}.{key} {words}")


class OutOfBounds(FieldError):
    """A number outside its bounds."""

    def __init__(self, owner: Any, key: str, value: Any, interval: str):
        super().__init__(owner, key, f"is {value}; it must be {words(interval)}.")


def check(config: Any, **intervals: str) -> None:
    """Raise unless each of these fields is within its interval: `learning_rate="[0, inf)"`.

    A field may be a number, None, or a list or dictionary of numbers, each of which must be.

    Raises:
      OutOfBounds: names the first that is not; NaN is in no interval.
    """
    for key, interval in intervals.items():
        for name, value in _numbers(key, getattr(config, key)):
            if not contains(interval, value):
                raise OutOfBounds(config, name, value, interval)


def check_choices(config: Any, **known: Iterable[str]) -> None:
    """Raise unless each of these fields is one of the names that are known: `norm=("layer", "rms")`.

    A field may be a name, or a list of names or a dictionary by name, each of which must be.

    Raises:
      FieldError: suggests the nearest name.
    """
    for key, names in known.items():
        value, names = getattr(config, key), list(names)
        verb, each_of = ("is", [value]) if isinstance(value, str) else ("names", value)
        for choice in each_of:
            if choice not in names:
                raise FieldError(config, key, f"{verb} '{choice}'.{nearest(choice, names)}")


def contains(interval: str, value: float) -> bool:
    """Return whether a number is in an interval such as `[0, 1)`; infinity is in none."""
    opens, low, high, closes = _parsed(interval)
    above = value >= low if opens == "[" else value > low
    below = value <= high if closes == "]" else value < high
    return above and below


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", item) for name, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"{key}[{index}]", item) for index, item in enumerate(value))
    elif value is not None:
        yield key, value


def _parsed(interval: str) -> tuple[str, float, float, str]:
    match = re.fullmatch(r"([\[(])([^,]+), ([^,]+)([\])])", interval)
    assert match, interval
    opens, low, high, closes = match.groups()
    return opens, float(low), float(high), closes


def words(interval: str) -> str:
    opens, low, high, _ = _parsed(interval)
    if math.isinf(high) or high == 2**31 - 1:
        return f"{'at least' if opens == '[' else 'above'} {low:g}"
    return f"in {interval}"

"""Sources: what a cache keeps is bounded by memory, and integers are integers."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pil

from mmjax.core.errors import RecordError, UserError
from mmjax.sources.base import Cached, Example, Examples, int32, integer, memory_of


class Made(Examples):
    """Examples made at each read, so that what is kept is kept by the cache."""

    description, identity, fields = "made", "made", ("value",)

    def __init__(self, make: Callable[[], Any], count: int = 400):
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return {"value": self._make()}


def objects(*values: Any) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: os.urandom(20_000),
    "array": lambda: np.ones(20_000, np.uint8),
    "view": lambda: np.ones((100, 200), np.uint8)[::50, ::50],
    "view of bytes": lambda: np.frombuffer(os.urandom(20_000), np.uint8)[:7],
    "text": lambda: "\N{GRINNING FACE}" * 5_000,
    "frames": lambda: [os.urandom(2_500) for _ in range(8)],
    "captions": lambda: ["a" * 2_000 + str(i) for i in range(10)],
    "objects": lambda: objects(os.urandom(10_000), os.urandom(10_000)),
    "sound": lambda: (np.ones(5_000, np.float32), 16_000),
    "nested": lambda: {"objects": {"box": [np.ones(2_500, np.float64)], "name": [b"x"]}},
    "numbers": lambda: [float(i) for i in range(600)],
    "set": lambda: {os.urandom(2_000) for _ in range(10)},
    "picture": lambda: Pil.new("RGB", (80, 80)),
    "picture of floats": lambda: Pil.new("F", (70, 70)),
}


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("picture")])
def test_a_cache_keeps_no_more_memory_than_its_limit(kind: str) -> None:
    """By Python's own count of what is allocated: 400 examples of 20 kB, of which 1 MB is kept.

    Only what was allocated below this function counts: threads of earlier tests allocate, too.
    """
    limit = 2**20
    cached = Cached(Made(KINDS[kind]), limit)
    tracemalloc.start(20)
    for index in range(len(cached)):
        cached[index]
    traces = tracemalloc.take_snapshot()
    tracemalloc.stop()
    here = tracemalloc.Filter(True, __file__, all_frames=True)
    kept = sum(trace.size for trace in traces.filter_traces([here]).traces)
    assert 0.5 * limit < kept < 1.05 * limit, kept


@pytest.mark.parametrize("kind", ["picture", "picture of floats"])
def test_pictures_count_with_their_pixels(kind: str) -> None:
    """Which Pillow holds outside of Python."""
    picture = KINDS[kind]()
    pixels = len(picture.tobytes())
    assert pixels <= memory_of({"value": [picture]}, 2**30) < pixels + 2_000


def test_counting_ends_where_the_limit_is_passed() -> None:
    endless: list[Any] = [b"x"]
    endless.append(endless)
    assert 10_000 < memory_of(endless, 10_000) < 11_000


def test_what_is_kept_is_read_once() -> None:
    reads = []
    cached = Cached(Made(lambda: reads.append(0) or b"x" * 100), 2**20)
    assert cached[3] is cached[3] and len(reads) == 1
    small = Cached(Made(lambda: b"x" * 100), 50)
    assert small[3] is not small[3]


# --- integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [7, np.int64(7), np.uint8(7), np.array(7), np.array(7, np.uint64), np.int32(7)],
    ids=repr,
)
def test_an_integer_is_one_in_whatever_type(value: Any) -> None:
    assert integer("label", value) == 7 and type(integer("label", value)) is int
    assert int32("label", value) == 7 and int32("label", value).dtype == np.int32


@pytest.mark.parametrize("value", [True, np.True_, np.array(True)], ids=repr)
def test_a_truth_value_is_0_or_1(value: Any) -> None:
    assert integer("label", value) == 1


@pytest.mark.parametrize(
    "value", [2.5, 2.0, np.float32(2), np.array(2.0), [2], np.array([2]), "2", b"2", None], ids=repr
)
def test_anything_else_is_none(value: Any) -> None:
    with pytest.raises(RecordError, match=f"field 'label' is .*{type(value).__name__}"):
        integer("label", value)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 7 + 2**32, 2**63, 2**64, 2**80])
def test_an_integer_that_does_not_fit_a_batch_is_refused_with_the_range(value: int) -> None:
    kinds = [value] if value >= 2**63 else [value, np.int64(value), np.array(value)]
    for each in kinds:
        with pytest.raises(RecordError, match=rf"is {value}, outside \[-2147483648, 2147483647\]"):
            int32("concept", each)
    assert int32("concept", 2**31 - 1) == 2**31 - 1 and int32("concept", -(2**31)) == -(2**31)


def test_a_column_of_integers_names_the_example_that_has_none() -> None:
    numbers = iter([1, 2, 2.5])
    with pytest.raises(UserError, match=r"Field 'value' is needed of every .* made\[2\]: .*'2.5'"):
        Made(lambda: next(numbers), 3).column("value")
    damaged = Made(lambda: 1 / 0, 3)
    with pytest.raises(UserError, match=r"made\[0\]: division by zero"):
        damaged.column("value")

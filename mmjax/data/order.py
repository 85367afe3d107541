"""The order of examples: a pure function of integers, with nothing to save or restore.

A task counts the examples it has consumed. Example number `g` of a task over `n` examples is

    epoch = g // n,    id = permutation(g mod n; n, seed, task, epoch)

so any range of positions can be asked for alone, by any process, in pieces of any size. The
permutation is our own: a library's shuffle may change between versions, and a run that resumed on
a newer one would then skip some examples and repeat others. The tests pin literal values; changing
anything here that changes an id changes every run in the world that is half done.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmjax.core.errors import UserError

IntOrArray = TypeVar("IntOrArray", int, NDArray[Any])

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of splitmix64
_ROUNDS = 12
_ROUNDS_NARROW = 24  # to 4 bits: a narrow network mixes slowly (at 12, orders of 5 are uneven)
_LIMIT = 2**62  # positions and sizes stay well inside int64
_ORDER, _EXAMPLE = 1, 2  # what a key is for, so that no two uses share one


def mix64(x: IntOrArray) -> IntOrArray:
    """Return the output function of splitmix64: a bijection of 64-bit integers that mixes all bits.

    Args:
      x: a Python integer in [0, 2**64), or a uint64 array of any shape but ().

    Returns:
      The same kind and shape.
    """
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def fold(key: IntOrArray, *values: IntOrArray) -> IntOrArray:
    """Return a key made from `key` and `values`, in order; integers are taken modulo 2**64."""
    for value in values:
        key = mix64(key & _MASK ^ mix64(value + _GAMMA & _MASK))
    return key


def stream(key: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` outputs of splitmix64 (Steele, Lea and Flood 2014) seeded with `key`."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    outputs: NDArray[Any] = steps * np.uint64(_GAMMA) + np.uint64(key & _MASK)
    return mix64(outputs)


@functools.lru_cache(maxsize=1024)
def name_key(name: str) -> int:
    """Return 64 bits that stand for a name, the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def permutation(index: ArrayLike, n: int, seed: int, task: str, epoch: ArrayLike) -> Any:
    """Return the image of `index` under the shuffle of [0, n) of one task in one epoch.

    A Feistel network over the smallest power of two that holds `n` is a bijection whatever its
    round function is; values that fall outside [0, n) go through it again until they fall inside
    (cycle walking), which keeps it one. Fewer than two passes are expected.

    Args:
      index: an integer or an integer array, in [0, n).
      n: how many examples there are, 1 to 2**62.
      seed: the run's seed.
      task: the task's name.
      epoch: an integer, or an array that broadcasts to the shape of `index`.

    Returns:
      An int for an integer `index`, else int64 of the shape of `index`.

    Raises:
      ValueError: an index outside [0, n).
    """
    x = np.asarray(index, dtype=np.int64)
    if x.size and not 0 <= x.min() <= x.max() < _size(n, task):
        raise ValueError(f"An index is outside [0, {n}).")
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), x.shape).reshape(-1)
    base: NDArray[Any] = np.full_like(epochs, fold(seed, _ORDER, name_key(task)), dtype=np.uint64)
    ids = _shuffle(x.reshape(-1).astype(np.uint64), n, fold(base, epochs.astype(np.uint64)))
    return ids.astype(np.int64).reshape(x.shape) if x.ndim else int(ids[0])


def _shuffle(x: NDArray[Any], n: int, keys: NDArray[Any]) -> NDArray[Any]:
    """Shuffle by cycle walking: `_feistel` of x [count] under keys [count], again where it lands past n."""
    bits = (n - 1).bit_length()
    out = _feistel(x, bits, keys)
    (outside,) = np.nonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, keys[outside])
        outside = outside[out[outside] >= n]
    return out


def _feistel(x: NDArray[Any], bits: int, keys: NDArray[Any]) -> NDArray[Any]:
    """Return a keyed bijection of [0, 2**bits), of x [count] under keys [count]."""
    width, other = bits // 2, bits - bits // 2
    left, right = x >> other, x & ((1 << other) - 1)
    for _ in range(_ROUNDS if bits > 4 else _ROUNDS_NARROW):
        keys = keys + np.uint64(_GAMMA)
        left, right = right, left ^ mix64(keys ^ right) & ((1 << width) - 1)
        width, other = other, width
    return left << other | right


def _size(n: int, task: str) -> int:
    if n < 1:
        raise UserError(f"Task '{task}' has no examples. Build its data, or remove the task.")
    if n > _LIMIT:
        raise ValueError(f"Task '{task}': {n} examples are more than 2**62.")
    return n


def _positions(position: int, count: int, n: int, task: str) -> NDArray[np.int64]:
    _size(n, task)
    if position < 0 or count < 0 or position + count > _LIMIT:
        raise ValueError(f"Task '{task}': no positions {position} to {position} + {count}.")
    return position + np.arange(count, dtype=np.int64)


def example_ids(
    seed: int, task: str, position: int, count: int, n: int, *, shuffle: bool = True
) -> NDArray[np.int64]:
    """Return the ids of `count` examples of a task, from its example number `position` on.

    Every run of `n` positions that starts at a multiple of `n` is an epoch, and holds each id
    exactly once. A batch may span epochs. Cutting a range in pieces changes nothing.

    Args:
      seed: the run's seed.
      task: the task's name.
      position: examples that the task consumed before.
      count: how many ids are wanted.
      n: how many examples there are.
      shuffle: False gives the ids in order, 0 to n - 1 and again, for evaluation.

    Returns:
      int64 [count], each in [0, n).

    Raises:
      UserError: the task has no examples.

    Example:
      >>> sorted(example_ids(0, "pairs", position=0, count=5, n=5).tolist())
      [0, 1, 2, 3, 4]
      >>> example_ids(0, "pairs", position=3, count=4, n=5, shuffle=False).tolist()
      [3, 4, 0, 1]
    """
    positions = _positions(position, count, n, task)
    if not shuffle:
        return positions % n
    ids: NDArray[np.int64] = permutation(positions % n, n, seed, task, positions // n)
    return ids


def example_key(seed: int, task: str, position: int) -> NDArray[np.uint64]:
    """Return 128 bits of key for what is random about the example at `position` of a task.

    The key belongs to the position, not to the example's id: an example meets other augmentations
    in its next epoch. Two positions of a task never share a key.

    Returns:
      uint64 [2].
    """
    if position < 0:
        raise ValueError(f"Task '{task}': no position {position}.")
    return np.array([_examples_key(seed, task), position], dtype=np.uint64)


@functools.lru_cache(maxsize=1024)
def _examples_key(seed: int, task: str) -> int:
    return fold(seed, _EXAMPLE, name_key(task))


def rng(seed: int, task: str, position: int) -> np.random.Generator:
    """Return a generator for host augmentation of the example at `position` of a task.

    The raw bits (Philox 4x64 under `example_key`) never change; how NumPy makes a distribution of
    them may change with its version, which is among what a checkpoint records.
    """
    return np.random.Generator(np.random.Philox(key=example_key(seed, task, position)))

"""Transforms of arrays on their way from another model's layout into this one's; each is a key of a rule.

{"match": ".*/attention/query", "rotary": {"to": "halves"}}
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.bounds import COUNT, SIZE, FieldError, check, check_choices
from mmjax.core.errors import UserError
from mmjax.core.parameters import Spec
from mmjax.optim.rules import matches
from mmjax.optim.transforms import layer_shape

Array = np.ndarray
AXIS = "[-8, 8]"
Initial = Callable[[], Array]
Adapter = Callable[[tuple[int, ...], Spec, tuple[int, ...]], Callable[[Array], Array] | None]


@dataclass(frozen=True)
class Split:
    """One part of a kernel that holds several, such as query, key and value, or gate and up.

    Attributes:
      sizes: of the parts along the axis, in order.
      index: which of them, from 0.
      axis: the axis that they share.
      groups: how often the sequence of parts repeats along the axis, such as once per head.
    """

    sizes: tuple[int, ...]
    index: int
    axis: int = -1
    groups: int = 1

    def __post_init__(self) -> None:
        check(self, sizes=COUNT, index=SIZE, groups=COUNT, axis=AXIS)
        if self.index >= len(self.sizes):
            raise FieldError(self, "index", f"is {self.index}; there are {len(self.sizes)} parts.")

    def __call__(self, value: Array, _: Initial) -> Array:
        total = sum(self.sizes)
        grouped = _cut(value, self.axis, (self.groups, total))
        start = sum(self.sizes[: self.index])
        axis = self.axis % value.ndim
        part = np.take(grouped, range(start, start + self.sizes[self.index]), axis=axis + 1)
        return _joined(part, axis)


@dataclass(frozen=True)
class SplitHeads:
    """Heads as an axis of their own: `[D, H * K] -> [D, H, K]`.

    Attributes:
      count: number of heads H.
      axis: the axis that holds them.
    """

    count: int
    axis: int = -1

    def __post_init__(self) -> None:
        check(self, count=COUNT, axis=AXIS)

    def __call__(self, value: Array, _: Initial) -> Array:
        size = _size(value, self.axis)
        return _cut(value, self.axis, (self.count, max(size // self.count, 1)))


@dataclass(frozen=True)
class JoinHeads:
    """Heads joined with their size: `[D, H, K] -> [D, H * K]`.

    Attributes:
      axis: the axis of the heads, before that of their size.
    """

    axis: int = -2

    def __post_init__(self) -> None:
        check(self, axis=AXIS)

    def __call__(self, value: Array, _: Initial) -> Array:
        size, axis = _size(value, self.axis), self.axis % value.ndim
        if axis + 1 == value.ndim:
            raise UserError(f"axis {self.axis} of {list(value.shape)} ({size}) has none after it.")
        return _joined(value, axis)


@dataclass(frozen=True)
class Rotary:
    """The order of a head's numbers under rotary embeddings.

    In `pairs`, the numbers 2i and 2i + 1 turn together (Su et al. 2021); in `halves`, i and i + K / 2 do, as here.

    Attributes:
      to: the order that results, `halves` or `pairs`, from the other one.
      size: size K of a head, where the axis holds several; 0 for the whole axis.
      rotated: how many numbers of a head turn, from its first; 0 for all.
      axis: the axis that holds them.
    """

    to: str = "halves"
    size: int = 0
    rotated: int = 0
    axis: int = -1

    def __post_init__(self) -> None:
        check(self, size=SIZE, rotated=SIZE, axis=AXIS)
        check_choices(self, to=("halves", "pairs"))

    def __call__(self, value: Array, _: Initial) -> Array:
        length = _size(value, self.axis)
        size = self.size or length
        turning = self.rotated or size
        if turning % 2 or turning > size or length % size:
            raise UserError(
                f"{turning} of {size} numbers of a head turn, of {length} on the axis; the first must be even and at "
                "most the second, which must divide the third."
            )
        rows = (-1, 2) if self.to == "halves" else (2, -1)
        head = np.arange(size)
        head[:turning] = np.arange(turning).reshape(rows).T.ravel()
        order = (np.arange(0, length, size)[:, None] + head).ravel()
        return np.take(value, order, axis=self.axis)


@dataclass(frozen=True)
class RepeatHeads:
    """Each key/value head several times, where fewer of them served as many query heads: `[D, G, K] -> [D, nG, K]`.

    Attributes:
      times: copies n of each, next to each other.
      axis: the axis of the heads.
    """

    times: int
    axis: int = -2

    def __post_init__(self) -> None:
        check(self, times=COUNT, axis=AXIS)

    def __call__(self, value: Array, _: Initial) -> Array:
        _size(value, self.axis)
        return np.repeat(value, self.times, axis=self.axis)


@dataclass(frozen=True)
class MeanHeads:
    """The mean of neighbouring key/value heads: `[D, nG, K] -> [D, G, K]` (Ainslie et al. 2023).

    Attributes:
      times: neighbours n that become one.
      axis: the axis of the heads.
    """

    times: int
    axis: int = -2

    def __post_init__(self) -> None:
        check(self, times=COUNT, axis=AXIS)

    def __call__(self, value: Array, _: Initial) -> Array:
        axis, size = self.axis % value.ndim, _size(value, self.axis)
        grouped = _cut(value, self.axis, (size // self.times, self.times))
        return grouped.astype(_wide(value)).mean(axis=axis + 1).astype(value.dtype)


@dataclass(frozen=True)
class NewRows:
    """A vocabulary with new entries after the old ones.

    Attributes:
      count: how many are new.
      fill: their values: the `mean` of the old entries, or `init`, as without a source.
      axis: the axis of the vocabulary.
    """

    count: int
    fill: str = "mean"
    axis: int = 0

    def __post_init__(self) -> None:
        check(self, count=COUNT, axis=AXIS)
        check_choices(self, fill=("mean", "init"))

    def __call__(self, value: Array, initial: Initial) -> Array:
        old = _size(value, self.axis)
        if self.fill == "mean":
            mean = value.astype(_wide(value)).mean(axis=self.axis, keepdims=True)
            new = np.repeat(mean.astype(value.dtype), self.count, axis=self.axis)
        else:
            whole = initial()
            if whole.ndim != value.ndim or _size(whole, self.axis) != old + self.count:
                raise UserError(
                    f"{old} old entries and {self.count} new ones are none of {list(whole.shape)}."
                )
            new = np.take(whole, range(old, old + self.count), axis=self.axis).astype(value.dtype)
        return np.concatenate([value, new], axis=self.axis)


@dataclass(frozen=True)
class ResizeGrid:
    """A table of positions of another grid: `[k + h w, D] -> [k + h' w', D]`, or along one axis.

    Cells stand at their centres; outside the outermost centres the table is constant.

    Attributes:
      old: cells per axis there, `[h, w]` or `[n]`.
      new: cells per axis here.
      method: `linear`, or `cubic` (Keys's kernel with a = -0.75, PyTorch's).
      keep: leading rows k that are no cells and stay, such as that of a class token.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    method: str = "linear"
    keep: int = 0

    def __post_init__(self) -> None:
        check(self, old=COUNT, new=COUNT, keep=SIZE)
        check_choices(self, method=("linear", "cubic"))
        if len(self.old) != len(self.new) or not self.old:
            raise FieldError(self, "new", f"is {list(self.new)}; old is {list(self.old)}.")

    def __call__(self, value: Array, _: Initial) -> Array:
        cells = int(np.prod(self.old))
        if len(value) != self.keep + cells:
            words = f"{self.keep} + {' x '.join(map(str, self.old))}"
            raise UserError(f"{list(value.shape)} has {len(value)} rows, not {words}.")
        grid = value[self.keep :].astype(_wide(value)).reshape(*self.old, *value.shape[1:])
        for axis, (old, new) in enumerate(zip(self.old, self.new, strict=True)):
            weights = _weights(old, new, self.method).astype(grid.dtype)
            grid = np.moveaxis(np.tensordot(weights, grid, axes=(1, axis)), 0, axis)
        table = grid.reshape(-1, *value.shape[1:]).astype(value.dtype)
        return np.concatenate([value[: self.keep], table])


@dataclass(frozen=True)
class TransformConfig:
    """A transform of the arrays of some parameters; exactly one of its keys apart from `match` is set.

    Attributes:
      match: a regular expression of whole names here.
      split: takes one part of a fused kernel.
      split_heads: gives heads an axis.
      join_heads: joins heads and their size.
      rotary: reorders a head's numbers for rotary embeddings.
      repeat_heads: repeats key/value heads.
      mean_heads: averages neighbouring key/value heads.
      new_rows: adds entries to a vocabulary.
      resize_grid: resizes a table of positions.
    """

    match: str
    split: Split | None = None
    split_heads: SplitHeads | None = None
    join_heads: JoinHeads | None = None
    rotary: Rotary | None = None
    repeat_heads: RepeatHeads | None = None
    mean_heads: MeanHeads | None = None
    new_rows: NewRows | None = None
    resize_grid: ResizeGrid | None = None

    def __post_init__(self) -> None:
        keys = [f.name for f in fields(self) if f.name != "match"]
        if len(self._chosen()) != 1:
            chosen = ", ".join(self._chosen()) or "none"
            raise FieldError(
                self, "match", f"has {chosen} beside it; set one of {', '.join(keys)}."
            )

    def _chosen(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "match" and getattr(self, f.name)]

    def __call__(self, value: Array, initial: Initial) -> Array:
        [name] = self._chosen()
        try:
            result: Array = getattr(self, name)(value, initial)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return result


def apply_all(transforms: Iterable[TransformConfig], value: Array, initial: Initial) -> Array:
    """Return the array after all transforms, in order; `initial` returns the parameter's initial value."""
    for transform in transforms:
        value = transform(value, initial)
    return value


def by_name(
    transforms: Sequence[TransformConfig], target: Mapping[str, Spec]
) -> dict[str, list[TransformConfig]]:
    """Return the transforms of each parameter that has any, in order."""
    result: dict[str, list[TransformConfig]] = {}
    for index, transform in enumerate(transforms):
        for name in matches(transform.match, target, f"init_from.transforms[{index}].match"):
            result.setdefault(name, []).append(transform)
    return result


def transformed(
    transforms: Sequence[TransformConfig],
    name: str,
    spec: Spec,
    seed: int,
    adapter: Adapter,
    adapted: list[str],
) -> Callable[[Array], Array]:
    """Return a function that applies the transforms, and then `adapter(size, spec, shape)`; it appends to `adapted`."""

    def adapt(value: Array) -> Array:
        try:
            result = apply_all(transforms, value, lambda: initial_value(name, spec, seed))
        except UserError as error:
            raise UserError(f"init_from.transforms of '{name}': {error}") from error
        shape = layer_shape(spec)[0]
        fit = adapter(result.shape, spec, shape)
        if fit is None:
            raise UserError(
                f"init_from.transforms of '{name}': {list(value.shape)} became {list(result.shape)}; expected "
                f"{list(shape)}."
            )
        adapted.append(f"{name} {list(value.shape)} -> {list(shape)}")
        return fit(result)

    return adapt


def initial_value(name: str, spec: Spec, seed: int) -> Array:
    """Return the initial value of a parameter by its canonical name, float32, as a run of this seed has it."""
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))
    return np.asarray(spec.init(key, layer_shape(spec)[0], jnp.float32))


def _wide(value: Array) -> np.dtype:
    return np.promote_types(value.dtype, np.float32)


def _size(value: Array, axis: int) -> int:
    if not -value.ndim <= axis < value.ndim:
        raise UserError(f"{list(value.shape)} has no axis {axis}.")
    return int(value.shape[axis])


def _cut(value: Array, axis: int, sizes: tuple[int, ...]) -> Array:
    """Return the array with an axis cut into several of these sizes."""
    if _size(value, axis) != np.prod(sizes):
        words = " x ".join(map(str, sizes))
        raise UserError(f"axis {axis} of {list(value.shape)} does not hold {words} numbers.")
    axis %= value.ndim
    return value.reshape(*value.shape[:axis], *sizes, *value.shape[axis + 1 :])


def _joined(value: Array, axis: int) -> Array:
    """Return the array with an axis and the next one as one."""
    size = value.shape[axis] * value.shape[axis + 1]
    return value.reshape(*value.shape[:axis], size, *value.shape[axis + 2 :])


def _weights(old: int, new: int, method: str) -> Array:
    """Return the weights of old cells in new ones, float64 `[new, old]`; rows sum to 1."""
    weights = np.zeros((new, old))
    for row, at in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
        first = int(np.floor(at)) - (method == "cubic")
        for offset in range(4 if method == "cubic" else 2):
            cell = first + offset
            kernel = _cubic(abs(at - cell)) if method == "cubic" else max(1 - abs(at - cell), 0.0)
            weights[row, min(max(cell, 0), old - 1)] += kernel
    return weights


def _cubic(x: float, a: float = -0.75) -> float:
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

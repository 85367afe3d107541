"""The interface of a modality: raw value to arrays (host), arrays to tokens and positions (device).

A modality is one file in `mmjax/modalities/`, whose class is a frozen dataclass:

- its fields are the settings that fix parameters (patch size, vocabulary);
- its inner class `Input` holds the settings that a task chooses (field, resolution, length).
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx

from mmjax.core.bounds import SIZE, check
from mmjax.core.config import FREE
from mmjax.core.errors import UserError

I = TypeVar("I")  # noqa: E741
ArraySpec = dict[str, jax.ShapeDtypeStruct]
PRESENT = "present"  # the array that marks which instances of an example exist
EXISTS = "exists"  # the array that marks which rows of a batch exist, see `mmjax.objectives.base.with_rows`


class Stem(nnx.Module):
    """The device side: `__call__(arrays) -> Stream` for arrays with a leading batch axis.

    A modality of continuous values, which diffusion can noise, also has: `values(arrays, dtype) -> [B, S, P]`, what
    each token is made of, about of size 1; `__call__(arrays, values)`, the stream of other values than those of the
    arrays; and `bound`, which values do not exceed, or None. One of discrete tokens, whose arrays are
    `ids` and `valid`, has `token_ids`, the `mmjax.data.tokenizer.TokenIds` that its modality
    returns by a method of that name. Where its spans end, it also takes `index`, the index of each token in its span,
    of rows that hold several spans.

    Where tokens are dropped (see `dropped`), the arrays are `patches` and `coordinates` instead.
    """


@dataclass(frozen=True)
class Modality(abc.ABC, Generic[I]):
    """One kind of signal.

    Attributes:
      temporal: whether a stretch of time is cut out of a longer value; `preprocess` then also takes `time`, where the
        stretch begins, see `start_of`.
      folder: where files that the modality names lie (a tokenizer); empty for the data folder.
      modality_token: whether a learned vector is added to every token of the modality.
    """

    Input: ClassVar[type]
    temporal: ClassVar[bool] = False
    folder: str = field(default="", metadata=FREE)
    modality_token: bool = False

    def __post_init__(self) -> None:
        """Check the settings; a subclass raises `UserError` for those out of bounds."""

    @abc.abstractmethod
    def stem(self, width: int) -> nnx.Module:
        """Return the module that makes a `Stream` of this modality's arrays."""

    @abc.abstractmethod
    def arrays(self, settings: I) -> ArraySpec:
        """Return the shapes and dtypes of one example's arrays."""

    @abc.abstractmethod
    def preprocess(
        self, settings: I, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Return one example's arrays; augmented with `rng`, deterministic where it is None."""

    def instances(self, value: Any, count: int, rng: np.random.Generator | None) -> list[Any]:
        """Return up to `count` values of an example's one, to be preprocessed apart: here the same, for other views."""
        del rng
        return [value] * count

    def raw(self, value: Any) -> Any:
        """Return the user's value (`model.embed(image=[...])`) as `preprocess` takes it."""
        return value

    def files(self) -> dict[str, epath.Path]:
        """Return the files that a run always needs, by the name that the config has for them; see `asset_name`."""
        return {}


@dataclass(frozen=True)
class Input:
    """A modality as one task sees it: the modality, its settings there, and its name in the config.

    Attributes:
      instances: clips or sentences of an example, each preprocessed apart; 0 for one, without an axis of its own.
    """

    name: str
    modality: Modality
    settings: Any
    instances: int = 0

    def __post_init__(self) -> None:
        check(self, instances=SIZE)

    @property
    def field(self) -> str:
        """The field of an example that holds the raw value."""
        return self.settings.field

    @property
    def drops(self) -> bool:
        """True if some of the tokens are dropped."""
        return bool(getattr(self.settings, "token_drop", 0.0))

    def for_evaluation(self) -> Input:
        """Return the input with the settings of evaluation: all tokens of one instance."""
        settings = replace(self.settings, token_drop=0.0) if self.drops else self.settings
        return replace(self, settings=settings, instances=0)

    def arrays(self) -> ArraySpec:
        """Return the shapes of one example's arrays; with instances, each `[N, ...]`, and `present` bool `[N]`."""
        one = self.modality.arrays(self.settings)
        if not self.instances:
            return one
        n = self.instances
        shapes = {name: jax.ShapeDtypeStruct((n, *s.shape), s.dtype) for name, s in one.items()}
        return {**shapes, PRESENT: jax.ShapeDtypeStruct((n,), np.bool_)}

    @cached_property
    def _specs(self) -> ArraySpec:  # asked of every example
        return self.arrays()

    def preprocess(
        self,
        example: Mapping[str, Any],
        rng: np.random.Generator | None,
        times: Sequence[float] = (),
    ) -> dict[str, np.ndarray]:
        """Return the arrays of this modality for one example, checked against `arrays()`.

        `times` are where the instances of a temporal modality begin; each draws its own where there are none.
        """
        arrays = self._preprocessed(example[self.field], rng, times)
        for name, spec in self._specs.items():
            if arrays[name].shape != spec.shape or arrays[name].dtype != spec.dtype:
                raise UserError(
                    f"modality '{self.name}', array '{name}': expected {spec.dtype}{list(spec.shape)}, "
                    f"made {arrays[name].dtype}{list(arrays[name].shape)} from field '{self.field}'."
                )
        return arrays

    def _preprocessed(
        self, value: Any, rng: np.random.Generator | None, times: Sequence[float]
    ) -> dict[str, np.ndarray]:
        if not self.instances:
            return self._one(value, rng, times, 0)
        values = self.modality.instances(value, self.instances, rng)[: self.instances]
        rows = [self._one(item, rng, times, i) for i, item in enumerate(values)]
        present = np.arange(self.instances) < len(rows)
        specs = self.modality.arrays(self.settings)
        rows += [{n: np.zeros(s.shape, s.dtype) for n, s in specs.items()}] * (self.instances - len(rows))  # fmt: skip
        return {**{n: np.stack([row[n] for row in rows]) for n in specs}, PRESENT: present}

    def _one(
        self, value: Any, rng: np.random.Generator | None, times: Sequence[float], instance: int
    ) -> dict[str, np.ndarray]:
        modality: Any = self.modality
        time = {"time": times[instance]} if len(times) and modality.temporal else {}
        result: dict[str, np.ndarray] = modality.preprocess(self.settings, value, rng, **time)
        return result


def start_of(over: int, rng: np.random.Generator | None, time: float | None = None) -> int:
    """Return where a stretch begins that may begin at 0 to `over`: in the middle without `rng`.

    `time` in [0, 1) is a place relative to those that are possible, so that stretches of several signals of one clip
    begin together; at random where it is None.
    """
    if rng is None:
        return over // 2
    return int(rng.integers(over + 1)) if time is None else min(int(time * (over + 1)), over)


def asset_name(name: str) -> str:
    """Return the name under which a workdir keeps a file that a modality names.

    A path below the folder of data is kept under that path; one elsewhere (absolute, or out of the folder) under
    its last part, in a folder of its own.
    """
    parts = PurePosixPath(name).parts
    inside = not name.startswith(("/", "~")) and ".." not in parts and "://" not in name
    if inside:
        return name
    return f"elsewhere/{hashlib.sha256(name.encode()).hexdigest()[:16]}/{parts[-1]}"


def as_rows(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Return instances as rows, `[B, N, ...] -> [B N, ...]`, and which rows exist, bool `[B]` or `[B N]`.

    An instance exists where it is present and its row exists. None means that all rows exist.
    """
    rows = {name: x for name, x in arrays.items() if name not in (PRESENT, EXISTS)}
    exists_B = arrays.get(EXISTS)
    if PRESENT not in arrays:
        return rows, exists_B
    exists_BN = arrays[PRESENT] if exists_B is None else arrays[PRESENT] & exists_B[:, None]
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}, exists_BN.reshape(-1)


# --- dropping tokens ---------------------------------------------------------------------------


def tokens_left(count: int, drop: float) -> int:
    """Return how many of `count` tokens stay where a part `drop` of them is dropped.

    Raises:
      UserError: a part outside of [0, 1), or so large that none stays.
    """
    left = count - round(count * drop)
    if not 0 <= drop < 1 or left < 1:
        raise UserError(
            f"token_drop is {drop}, of {count} tokens; it must be in [0, 1) and leave one."
        )
    return left


def dropped_arrays(count: int, values: int, axes: int, drop: float, dtype: Any) -> ArraySpec:
    """Return the shapes and dtypes of the arrays of `dropped` for `count` tokens of `values` numbers each."""
    left = tokens_left(count, drop)
    return {
        "patches": jax.ShapeDtypeStruct((left, values), dtype),
        "coordinates": jax.ShapeDtypeStruct((left, axes), np.float32),
    }


def dropped(
    values_SP: np.ndarray, sizes: Sequence[int], drop: float, rng: np.random.Generator | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Drop tokens (DropToken, Akbari et al. 2021) before batching: of the tokens of a grid, those that stay, in order.

    Each example draws its own; by a fixed seed where `rng` is None. What is dropped never comes to a device.

    Args:
      values_SP: what each token is made of, row-major over the grid.
      sizes: of the grid.

    Returns:
      `{"patches": [K, P], "coordinates": float32[K, axes]}`, coordinates as in `mmjax.nn.positions.grid`; and
      the indices, int `[K]`.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    count = len(values_SP)
    index_K = np.sort(rng.choice(count, tokens_left(count, drop), replace=False))
    ranges = [np.arange(n, dtype=np.float32) / np.float32(n) for n in sizes]
    grid_SA = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(count, -1)
    arrays = {"patches": np.ascontiguousarray(values_SP[index_K]), "coordinates": grid_SA[index_K]}
    return arrays, index_K


def by_axis(coordinates_BKA: jax.Array, axes: Sequence[str]) -> dict[str, jax.Array]:
    """Return the coordinates of tokens that stayed, as a stream has them."""
    return {axis: coordinates_BKA[..., i] for i, axis in enumerate(axes)}

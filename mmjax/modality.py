"""What a modality is: raw value to arrays (host), arrays to tokens and positions (device).

A modality is one file in `mmjax/modalities/`, whose class is a frozen dataclass:

- its fields are the settings that fix parameters (patch size, vocabulary);
- its inner class `Input` holds the settings that a task chooses (field, resolution, length).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx

from mmjax.errors import UserError

I = TypeVar("I")  # noqa: E741
ArraySpec = dict[str, jax.ShapeDtypeStruct]


class Stem(nnx.Module):
    """The device side: `__call__(arrays) -> Stream` for arrays with a leading batch axis.

    A modality of continuous values, which diffusion can noise, has besides: `values(arrays, dtype) -> [B, S, P]`, what
    each token is made of, about of size 1; `__call__(arrays, values)`, the stream of other values than those of the
    arrays; and `bound`, which values do not exceed, or None. One of discrete tokens, whose arrays are
    `ids` and `valid`, has `end`, the id that closes a span, or None where all have the whole length.
    """


@dataclass(frozen=True)
class Modality(abc.ABC, Generic[I]):
    """One kind of signal.

    Attributes:
      folder: where files that the modality names lie (a tokenizer); empty for the data folder.
    """

    Input: ClassVar[type]
    folder: str = ""

    @abc.abstractmethod
    def stem(self, width: int) -> nnx.Module:
        """The module that makes a `Stream` of this modality's arrays."""

    @abc.abstractmethod
    def arrays(self, settings: I) -> ArraySpec:
        """Shapes and dtypes of one example's arrays."""

    @abc.abstractmethod
    def preprocess(
        self, settings: I, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """One example's arrays; augmented with `rng`, deterministic where it is None."""

    def raw(self, value: Any) -> Any:
        """What a person gives (`model.embed(image=[...])`) as `preprocess` takes it."""
        return value

    def files(self) -> dict[str, epath.Path]:
        """Files that a run needs for ever, by the name under which the workdir keeps them."""
        return {}


@dataclass(frozen=True)
class Input:
    """A modality as one task sees it: the modality, its settings there, and its name in the config."""

    name: str
    modality: Modality
    settings: Any

    @property
    def field(self) -> str:
        """The field of an example that holds the raw value."""
        return self.settings.field

    def arrays(self) -> ArraySpec:
        return self.modality.arrays(self.settings)

    def preprocess(
        self, example: Mapping[str, Any], rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Arrays of this modality for one example, checked against `arrays()`."""
        made = self.modality.preprocess(self.settings, example[self.field], rng)
        for name, spec in self.arrays().items():
            if made[name].shape != spec.shape or made[name].dtype != spec.dtype:
                raise UserError(
                    f"modality '{self.name}', array '{name}': expected {spec.dtype}{list(spec.shape)}, "
                    f"made {made[name].dtype}{list(made[name].shape)} from field '{self.field}'."
                )
        return made

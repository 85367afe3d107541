"""Tones: a list of samples, one token for every four of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mmjax.core.bounds import COUNT, check
from mmjax.core.errors import UserError
from mmjax.modalities.base import ArraySpec, Modality, Stem
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Stream

PATCH = 4  # samples of a token


@dataclass(frozen=True)
class ToneInput:
    """The settings that a task chooses, `tasks.NAME.inputs.NAME`.

    Attributes:
      field: field of the example.
      length: number of samples; a multiple of four.
    """

    field: str = "samples"
    length: int = 8

    def __post_init__(self) -> None:
        check(self, length=COUNT)


class ToneStem(Stem):
    """Arrays to tokens, on the device."""

    def __init__(self, width: int):
        # The axes of the kernel have logical names; None is an axis that no mesh axis shards.
        self.embed = Dense(PATCH, width, (None, "embed"))

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        samples_BN = arrays["samples"]
        return Stream(self.embed(samples_BN.reshape(samples_BN.shape[0], -1, PATCH)))


@dataclass(frozen=True)
class Tone(Modality[ToneInput]):
    """Tones; the fields of this class are the keys of `modalities.NAME`, and fix shapes of parameters."""

    Input = ToneInput

    def stem(self, width: int) -> ToneStem:
        return ToneStem(width)

    def arrays(self, settings: ToneInput) -> ArraySpec:
        """Return shape and dtype of one example's arrays."""
        return {"samples": jax.ShapeDtypeStruct((settings.length,), np.float32)}

    def preprocess(
        self, settings: ToneInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Return one example's arrays, on the host; `rng` is None in evaluation."""
        if np.ndim(value) != 1:
            raise UserError(f"a tone has shape [N], found {list(np.shape(value))}.")
        return {"samples": np.resize(np.asarray(value, np.float32), settings.length)}

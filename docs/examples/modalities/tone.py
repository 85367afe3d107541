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
from mmjax.nn.positions import Positions, grid, place
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

    def __init__(self, width: int, max_positions: int):
        # The axes of the kernel have logical names; None is an axis that no mesh axis shards.
        self.embed = Dense(PATCH, width, (None, "embed"))
        self.positions = Positions(width, {"t": max_positions}, scale=0.05)

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        samples_BN = arrays["samples"]
        x_BSD = self.embed(samples_BN.reshape(samples_BN.shape[0], -1, PATCH))
        coordinates = grid(t=x_BSD.shape[1])  # of each token, in [0, 1)
        return Stream(place(x_BSD, self.positions, coordinates), coordinates=coordinates)


@dataclass(frozen=True)
class Tone(Modality[ToneInput]):
    """Tones. The fields are the keys of `modalities.NAME`, which fix shapes of parameters.

    Attributes:
      max_positions: tokens of the longest tone of any task.
    """

    Input = ToneInput
    max_positions: int = 8

    def __post_init__(self) -> None:
        check(self, max_positions=COUNT)

    def stem(self, width: int) -> ToneStem:
        return ToneStem(width, self.max_positions)

    def arrays(self, settings: ToneInput) -> ArraySpec:
        """Return shape and dtype of one example's arrays."""
        if settings.length % PATCH or settings.length > PATCH * self.max_positions:
            raise UserError(
                f"length is {settings.length}; it must be a multiple of {PATCH}, at most "
                f"{PATCH * self.max_positions}. Change it, or raise max_positions of the modality."
            )
        return {"samples": jax.ShapeDtypeStruct((settings.length,), np.float32)}

    def preprocess(
        self, settings: ToneInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        """Return one example's arrays, on the host; `rng` is None in evaluation."""
        if np.ndim(value) != 1:
            raise UserError(f"a tone has shape [N], found {list(np.shape(value))}.")
        return {"samples": np.resize(np.asarray(value, np.float32), settings.length)}

"""Rows of numbers; each row is a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.modalities.base import ArraySpec, Modality
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Stream


@dataclass(frozen=True)
class ToyInput:
    """Attributes:
    tokens: rows that are taken.
    noise: standard deviation of what training adds on the host.
    columns: of the array; those beyond the modality's size are zeros, which the stem does not read.
    """

    field: str = "values"
    tokens: int = 2
    noise: float = 0.01
    columns: int = 6


@dataclass(frozen=True)
class Toy(Modality[ToyInput]):
    Input = ToyInput
    size: int = 6

    def stem(self, width: int) -> nnx.Module:
        return ToyStem(self.size, width)

    def arrays(self, settings: ToyInput) -> ArraySpec:
        return {"rows": jax.ShapeDtypeStruct((settings.tokens, settings.columns), np.float32)}

    def preprocess(
        self, settings: ToyInput, value: Any, rng: np.random.Generator | None
    ) -> dict[str, np.ndarray]:
        rows = value[: settings.tokens]
        if rng is not None:
            rows = rows + settings.noise * rng.normal(size=rows.shape)
        rows = np.pad(rows, ((0, 0), (0, settings.columns - self.size)))
        return {"rows": rows.astype(np.float32)}


class ToyStem(nnx.Module):
    def __init__(self, size: int, width: int):
        self.size = size
        self.embed = Dense(size, width, (None, "embed"))

    def __call__(self, arrays: dict[str, jax.Array]) -> Stream:
        rows_BSI = arrays["rows"][..., : self.size]
        x_BSD = self.embed(rows_BSI.astype(self.embed.kernel[...].dtype))
        return Stream(x_BSD, layout=(("toy", x_BSD.shape[1]),))

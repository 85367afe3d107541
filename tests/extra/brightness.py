"""A task whose objective has no parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core.batch import Batch
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.nn.towers import Widths
from mmjax.objectives.base import Embeds, Loss, Objective
from mmjax.task import Task, TaskConfig

SOURCE = {"name": "tfds", "dataset": "emoji", "split": "test_concept"}


@dataclass(frozen=True)
class Brightness(Objective, Embeds):
    """A loss without parameters."""

    def reads(self) -> tuple[str, ...]:
        return ("image",)

    def fields(self) -> tuple[str, ...]:
        return ("group",)

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        return {}

    def embeds(self) -> tuple[str, ...]:
        return ("image",)

    def embed(
        self, model: Any, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        return arrays["pixels"].mean(axis=(1, 2)) * model

    def __call__(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        return Loss(jnp.float32(model * 3), {"baseline": jnp.float32(5)})


def task(evaluators: dict[str, Any] | None = None) -> Task:
    image = Input("image", Image(), ImageInput(size=8))
    other = Input("depth", Image(), ImageInput(field="depth", size=16))
    config = TaskConfig({}, {}, {}, 4, evaluators=evaluators or {})
    return Task("bright", config, {"image": image, "depth": other}, Brightness(), None)  # type: ignore[arg-type]

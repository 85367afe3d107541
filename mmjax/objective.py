"""What an objective is: a loss of (model, batch, key), and the parameters that only it needs.

An objective is one file in `mmjax/objectives/`, whose class is a frozen dataclass; its fields are the
keys of its block in a config.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import struct

from mmjax.errors import UserError
from mmjax.modality import Input
from mmjax.model import Batch, Model
from mmjax.source import Example


@struct.dataclass
class Loss:
    """What a loss returns.

    Attributes:
      value: the loss, a float32 scalar (auxiliary losses added).
      metrics: further scalars to report, float32.
      buffers: proposed new values of buffers.
    """

    value: jax.Array
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    buffers: dict[str, jax.Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective(abc.ABC):
    """A loss over some of a task's inputs.

    Attributes:
      head: name of the parameters it owns; objectives that name the same head share it. Set to the task's
        name where the config gives none.
    """

    head: str = ""

    @abc.abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The modalities that the task must give."""

    def fields(self) -> tuple[str, ...]:
        """Integer fields of the example that it reads besides, each `[B]` int32 in `batch["fields"]`."""
        return ()

    @abc.abstractmethod
    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        """Modules of its own, by part name; they become `model.heads[self.head]`."""

    @abc.abstractmethod
    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        """The loss of a batch: `inputs` (modality -> arrays), `fields`, `valid` `[B]`."""

    def check_example(self, example: Example) -> None:
        """`UserError` for an example whose fields the loss cannot take, such as a label out of range."""
        del example  # any will do

    def embed(self, model: Model, modality: str, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Unit vectors `[B, E]` of one modality's arrays, where the objective makes such."""
        raise UserError(f"objective {type(self).__name__} makes no embeddings of '{modality}'.")

    def embeds(self) -> tuple[str, ...]:
        """Modalities that `embed` takes."""
        return ()

    def predict(self, model: Model, inputs: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """Logits `[B, C]` of the classes, from the arrays of some modalities, where it classifies."""
        raise UserError(f"objective {type(self).__name__} predicts no classes.")

    def predicts(self) -> tuple[str, ...]:
        """Modalities that `predict` takes."""
        return ()

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """What it makes of a batch, for a person to look at: arrays with a leading axis `[B]`, by `shows`.

        Each row is a picture, uint8 `[H, W, C]`, or a clip, uint8 `[T, H, W, C]`.
        """
        raise UserError(f"objective {type(self).__name__} has nothing to show.")

    def shows(self) -> tuple[str, ...]:
        """Names of what `show` gives, in the order to show them and in words of a caption."""
        return ()

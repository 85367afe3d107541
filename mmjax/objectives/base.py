"""The interface of an objective: a loss of (model, batch, key), and the parameters that only it needs.

An objective is one file in `mmjax/objectives/`, whose class is a frozen dataclass; its fields are the
keys of its block in a config.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.generation.spans import Span
from mmjax.modalities.base import EXISTS, Input
from mmjax.model import Model
from mmjax.nn.stream import Aux, add_proposals
from mmjax.sources.base import Example

C = TypeVar("C")
_ROWS = 2**31 - 1  # keeps the keys of rows apart from what objectives fold into a key


@struct.dataclass
class Occupancy:
    """The number of positions of a batch that hold a token.

    Attributes:
      valid: positions with a token of a valid row, an int32 scalar.
      positions: all positions that are computed, padding included.
    """

    valid: jax.Array
    positions: int = struct.field(pytree_node=False)


@struct.dataclass
class Part:
    """A mean that is a part of a loss.

    Attributes:
      weight: its factor in the loss.
      count: how many terms it is a mean of, a scalar.
      compares: whether a term depends on the other rows of the batch, as where they are its negatives. Such a mean is
        of one batch: evaluation takes it of batches with equally many valid rows only.
    """

    weight: jax.Array | float
    count: jax.Array
    compares: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class Loss:
    """The result of a loss.

    Attributes:
      value: the loss, a float32 scalar (auxiliary losses added).
      metrics: further scalars to report, float32.
      proposals: statistics of buffers, those of its `Aux` among them (see `Buffer.propose`).
      count: how many terms `value` is a mean of, a scalar; None for the valid rows. It weights micro-batches and
        batches of an evaluation: a mean over valid tokens gives their number.
      parts: the means that `value` is a sum of, where it is no single mean over `count` terms: by the metric that holds
        it, or by "" for `value` itself. What is in none of them (auxiliary losses) counts by row. For losses that
        derive from `Coupled`; another keeps to `count`.
    """

    value: jax.Array
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    proposals: dict[str, Any] = field(default_factory=dict)
    count: jax.Array | None = None
    parts: dict[str, Part] = field(default_factory=dict)

    def means(self, valid_B: jax.Array) -> dict[str, Part]:
        """Return `parts`, made explicit."""
        return self.parts or {"": Part(1.0, self.terms(valid_B))}

    def is_empty(self, valid_B: jax.Array) -> jax.Array:
        """Return whether the batch holds nothing that the loss is a mean of, a bool scalar."""
        counts = [part.count for part in self.means(valid_B).values()]
        return jnp.stack([jnp.asarray(count) <= 0 for count in counts]).all()

    def terms(self, valid_B: jax.Array) -> jax.Array:
        """Return `count`, made explicit, in the dtype of the value."""
        count = valid_B.sum() if self.count is None else self.count
        return jax.lax.stop_gradient(count).astype(self.value.dtype)


@dataclass(frozen=True)
class Objective(abc.ABC):
    """A loss over some of a task's inputs.

    It implements `reads`, `heads` and `__call__`; further bases declare what else it offers: `Embeds`, `Classifies`,
    `Writes`, `Composes`, `Shows`.

    Attributes:
      head: name of the parameters it owns; objectives that name the same head share it. Set to the task's
        name where the config gives none.
    """

    head: str = ""

    @abc.abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Return the modalities that the task must give."""

    def fields(self) -> tuple[str, ...]:
        """Return the integer fields of an example that it also reads, each `[B]` int32 in `batch.fields`."""
        return ()

    def teachers(self) -> tuple[str, ...]:
        """Return the teachers that the loss reads by `model.teacher`; an average moves with the task's updates."""
        return ()

    @abc.abstractmethod
    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        """Return the objective's modules, by part name; they become `model.heads[self.head]`."""

    @abc.abstractmethod
    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        """Return the loss of a batch: `inputs` (modality -> arrays), `fields`, `valid` `[B]`.

        A mean over rows; draw by `row_keys`, so that it is the same in micro-batches. A loss between rows
        derives from `Coupled`.
        """

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        """Raise `UserError` for an input that the loss cannot take: here, several instances of an example."""
        for input_ in inputs.values():
            if input_.instances:
                raise UserError(
                    f"objective {type(self).__name__} takes one instance of '{input_.name}'; remove 'instances'."
                )

    def for_evaluation(self) -> Objective:
        """Return the objective as evaluation has it, which cuts nothing of an example; here itself."""
        return self

    def rows_together(self) -> int:
        """Return how many consecutive rows of a batch stay consecutive in its micro-batches."""
        return 1

    def window_rows(self, batch: int) -> int:
        """Return how many consecutive rows of a batch the loader brings into the order of `arranged`."""
        return 1

    def arranged(self, rows: Sequence[Batch]) -> Sequence[int]:
        """Return the order in which the rows of a window lie in a batch, a pure function of their arrays (NumPy)."""
        return range(len(rows))

    def occupancy(self, model: Model, batch: Batch, key: jax.Array) -> Occupancy:
        """Count the positions that hold a token: here the tokens of each modality that it reads."""
        valid, positions = jnp.zeros((), jnp.int32), 0
        for name in self.reads():
            token_BS = model.tokens(name, batch.inputs[name]).mask_BS()
            # Instances of an example are rows of their own.
            row_B = jnp.repeat(batch.valid, token_BS.shape[0] // batch.valid.shape[0])
            valid += (token_BS & row_B[:, None]).sum(dtype=jnp.int32)
            positions += token_BS.size
        return Occupancy(valid, positions)

    def check_example(self, example: Example) -> None:
        """Raise `UserError` for an example whose fields the loss cannot take, such as a label out of range."""
        del example  # any will do


# --- what an objective may offer beside its loss -----------------------------------------------


class Embeds(abc.ABC):
    """An objective that makes vectors of its inputs."""

    @abc.abstractmethod
    def embeds(self) -> tuple[str, ...]:
        """Return the modalities that `embed` takes."""

    @abc.abstractmethod
    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        """Return unit vectors `[B, E]` of one modality's arrays.

        Args:
          relative_to: the modality they are compared with, where the space depends on it; the first other one if empty.
        """


class Classifies(abc.ABC):
    """An objective that predicts classes from its inputs."""

    @abc.abstractmethod
    def predicts(self) -> tuple[str, ...]:
        """Return the modalities that `predict` takes."""

    @abc.abstractmethod
    def predict(self, model: Model, inputs: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        """Return logits `[B, C]` of the classes, from the arrays of some modalities."""


class Writes(abc.ABC):
    """An objective that writes texts of another modality."""

    @abc.abstractmethod
    def writes(self) -> tuple[str, ...]:
        """Return the modality that it writes texts of, and that of the texts; empty where its config has none."""

    @abc.abstractmethod
    def write(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return texts of a batch: int32 `[B, S]`, each up to its end token, padding after.

        `written` without a look at the text given, which is `wanted`; `cost` `[B]` is the cross-entropy of the given
        text's tokens, summed, and `tokens` `[B]` their number.
        """

    @abc.abstractmethod
    def captions(
        self, model: Model, arrays: Mapping[str, jax.Array], length: int, keys_B: jax.Array
    ) -> jax.Array:
        """Return texts of one modality's arrays, int32 `[B, length]`, each row drawing by a key of its own."""


class Composes(abc.ABC):
    """An objective that makes spans of a sequence, each after those before it."""

    @abc.abstractmethod
    def composes(self) -> tuple[str, ...]:
        """Return the modalities of the spans that `compose` takes."""

    @abc.abstractmethod
    def compose(self, model: Model, spans: Sequence[Span], keys_B: jax.Array) -> list[jax.Array]:
        """Return the spans of a sequence that are to be made, each after those before it, in the form for viewing.

        A picture is uint8 `[B, H, W, 3]`, a text int32 `[B, L]` as in `write`, anything else its values `[B, S, P]`.
        """

    @abc.abstractmethod
    def beside(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Return the modalities that a sequence of spans of these modalities holds too, as absent spans."""


class Shows(abc.ABC):
    """An objective that has something for the report to show."""

    @abc.abstractmethod
    def shows(self) -> tuple[str, ...]:
        """Return the names of what `show` gives, in the order to show them and in words of a caption."""

    @abc.abstractmethod
    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return what it shows of a batch: arrays with a leading axis `[B]`, by `shows`.

        Each row is a picture, uint8 `[H, W, C]`, a clip, uint8 `[T, H, W, C]`, or a text as in `write`, int32 `[S]`.
        """


def embedded(objective: Objective) -> tuple[str, ...]:
    """Return the modalities that an objective embeds."""
    return objective.embeds() if isinstance(objective, Embeds) else ()


def classified(objective: Objective) -> tuple[str, ...]:
    """Return the modalities from which an objective predicts classes."""
    return objective.predicts() if isinstance(objective, Classifies) else ()


def written(objective: Objective) -> tuple[str, ...]:
    """Return the modality that an objective writes texts of, and that of the texts; empty where it writes none."""
    return objective.writes() if isinstance(objective, Writes) else ()


def composed(objective: Objective) -> tuple[str, ...]:
    """Return the modalities of the spans that an objective composes."""
    return objective.composes() if isinstance(objective, Composes) else ()


def able(objective: Objective, capability: type[C]) -> C:
    """Return the objective as one that offers a capability.

    Raises:
      UserError: it does not.
    """
    if not isinstance(objective, capability):
        raise UserError(
            f"objective {type(objective).__name__} is none that {capability.__name__.lower()}."
        )
    return objective


@struct.dataclass
class Represented:
    """The representations that a coupled loss compares: `rows`, a tree of arrays `[B, ...]`, and the trunk's `aux`."""

    rows: Any
    aux: Aux


@dataclass(frozen=True)
class Coupled(Objective):
    """An objective whose loss couples the rows of a batch: each row is represented alone, then all compared.

    Micro-batches then keep its value: the comparison sees the whole batch always.
    """

    @abc.abstractmethod
    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Return the representations to compare, row by row."""

    @abc.abstractmethod
    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        """Return the loss of the whole batch's `rows`; of `batch` it reads `fields`, `valid` and `present`."""

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        represented = self.represent(model, batch, key)
        loss = self.compare(model, represented.rows, batch)
        proposals = add_proposals([represented.aux.proposals, loss.proposals])
        metrics = {**loss.metrics, **represented.aux.metrics()}
        return replace(
            loss, value=loss.value + represented.aux.loss, metrics=metrics, proposals=proposals
        )


def refuse_drop(objective: Objective, inputs: Mapping[str, Input]) -> None:
    """Raise `UserError` if tokens of an input are dropped, for objectives that need all of them."""
    for input_ in inputs.values():
        if input_.drops:
            raise UserError(
                f"objective {type(objective).__name__} needs all tokens of '{input_.name}'; remove 'token_drop'."
            )


def with_rows(batch: Batch) -> Batch:
    """Return the batch with its `valid` beside the arrays of each modality.

    `Model.tokens` hands it on to the stream, so that every layer knows which rows exist, whatever the objective does
    with them. Whoever calls an objective with a batch calls it with this.
    """
    inputs = {m: {**arrays, EXISTS: batch.valid} for m, arrays in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def row_keys(batch: Batch, key: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """Return a random key for each row, `[B]`: the same for a row whatever part of a batch it comes in.

    Args:
      first: index of the batch's first row, where the rows of several batches draw by one `key`.
    """
    if batch.keys is not None:
        keys: jax.Array = batch.keys
        return keys
    of_rows = jax.random.fold_in(key, _ROWS)
    rows = first + jnp.arange(batch.valid.shape[0])
    return jax.vmap(lambda row: jax.random.fold_in(of_rows, row))(rows)

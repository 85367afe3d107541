"""Evaluators: passes over held-out data on the devices, and a score of their outputs on the host.

An evaluator is one file in `mmjax/evaluators/`, whose class is a frozen dataclass. It runs no program of its own: each
of its passes names a `Computation` of its task's objective, so evaluators that want the same outputs share one program
and one reading of the data. A new kind of output is a new `Computation`, here or in the evaluator's own file.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.errors import CodeError, UserError
from mmjax.core.extensions import check_type, defined_in
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.objectives.base import Classifies, Embeds, Loss, Writes, able, embedded, with_rows
from mmjax.sources.base import Source
from mmjax.task import RowSpec, Task

Outputs = dict[str, np.ndarray]
Record = dict[str, Any]


@dataclass(frozen=True)
class Computation(abc.ABC):
    """A function of a task's batches that an evaluator asks of the devices.

    Its text (`str`) names its program in tables and distinguishes two computations of a task.
    """

    @abc.abstractmethod
    def __str__(self) -> str:
        """Return its name, unique among the computations of a task."""

    def inputs(self, task: Task) -> dict[str, Input]:
        """Return the inputs that it reads of each example, by modality, as evaluation has them."""
        return {name: input_.for_evaluation() for name, input_ in task.inputs.items()}

    def fields(self, task: Task) -> tuple[str, ...]:
        """Return the fields of the examples that it reads on the devices, beside its inputs."""
        del task
        return ()

    @abc.abstractmethod
    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Return arrays with a leading row axis; rows of `batch` may be invalid."""


@dataclass(frozen=True)
class Embed(Computation):
    """The vector [E] of each row's input of a modality (output `vector`).

    Attributes:
      modality: whose input is embedded.
      relative_to: the modality in whose shared space the vector is; empty where the objective has one space.
    """

    modality: str
    relative_to: str = ""

    def __str__(self) -> str:
        return f"embed/{self.modality}" + (f">{self.relative_to}" if self.relative_to else "")

    def inputs(self, task: Task) -> dict[str, Input]:
        return {self.modality: super().inputs(task)[self.modality]}

    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        arrays = batch.inputs[self.modality]
        return {
            "vector": able(task.objective, Embeds).embed(
                model, self.modality, arrays, self.relative_to
            )
        }


@dataclass(frozen=True)
class Predict(Computation):
    """The logits [C] over the classes of each row, from some of its inputs (output `logits`)."""

    modalities: tuple[str, ...]

    def __str__(self) -> str:
        return f"predict/{'+'.join(self.modalities)}"

    def inputs(self, task: Task) -> dict[str, Input]:
        inputs = super().inputs(task)
        return {name: inputs[name] for name in self.modalities}

    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        return {"logits": able(task.objective, Classifies).predict(model, batch.inputs)}


@dataclass(frozen=True)
class Write(Computation):
    """The texts that the objective writes for each row (see `Writes.write`)."""

    def __str__(self) -> str:
        return "write"

    def fields(self, task: Task) -> tuple[str, ...]:
        return tuple(task.objective.fields())

    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        return able(task.objective, Writes).write(model, batch, key)


@dataclass(frozen=True)
class LossOf(Computation):
    """The loss and its scalar metrics, the same for each row of a batch, and what the batch counts (`_shares`).

    The output `loss` holds the auxiliary losses, which are also an output of their own, `auxiliary`.
    """

    def __str__(self) -> str:
        return "loss"

    def fields(self, task: Task) -> tuple[str, ...]:
        return tuple(task.objective.fields())

    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        result, valid_B = task.loss(model, batch, key), batch.valid
        values = {"loss": result.value, **result.metrics, **_shares(result, valid_B)}
        values["auxiliary"] = jnp.asarray(result.auxiliary, jnp.float32)
        values = {name: value for name, value in values.items() if not jnp.ndim(value)}
        return {name: jnp.broadcast_to(value, valid_B.shape) for name, value in values.items()}


@dataclass(frozen=True)
class Pass:
    """All examples of a source through one program.

    Attributes:
      computation: what the program computes.
      block: the source as a config block.
      fields: integer fields of the examples that the score needs, kept beside the outputs.
    """

    computation: Computation
    block: Mapping[str, Any]
    fields: tuple[str, ...]

    @property
    def source(self) -> Source:
        source: Source = configs.component("sources", self.block, "source")
        return source


@dataclass(frozen=True)
class Evaluator(abc.ABC):
    """A measure of one task.

    Attributes:
      source: held-out data, as a config block.
    """

    source: dict[str, Any] = field(default_factory=dict)

    @abc.abstractmethod
    def passes(self, task: Task) -> dict[str, Pass]:
        """Return the passes it needs, by a name of its own."""

    @abc.abstractmethod
    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        """Return the records from the outputs of each pass: valid rows only, with the pass's fields among them."""

    def record(
        self, task: Task, name: str, value: float, chance: float, count: int, **extra: Any
    ) -> Record:
        """Return one line of `results.json`.

        Args:
          task: the task that is measured.
          name: of the measure.
          value: what was measured.
          chance: the value without any knowledge of the inputs.
          count: how many examples it is of.
          **extra: further fields. Tables and the report know `unit` (`fraction`: printed in percent; `loss`: a loss;
            another stands beside the number; a plain number without it), `better` (`higher` or `lower`; without it a
            loss is better lower and everything else higher) and `majority` (the value of always choosing the largest
            class).

        Raises:
          UserError: `better` is neither.
        """
        if extra.get("better", "higher") not in ("higher", "lower"):
            raise UserError(
                f"tasks.{task.name}.evaluators: the record '{name}' has better='{extra['better']}'; "
                "choose 'higher' or 'lower'."
            )
        split = configs.component("sources", self.source, f"tasks.{task.name}.evaluators").label
        return {
            "name": name,
            "task": task.name,
            "split": split,
            "value": float(value),
            "chance": float(chance),
            "count": int(count),
            "unit": "",
            **extra,
        }


def embed(task: Task, modality: str, other: str) -> Embed:
    """Return the computation of vectors of a modality that are compared with another's."""
    has_several_spaces = len(embedded(task.objective)) > 2
    return Embed(modality, other if has_several_spaces else "")


def device_spec(task: Task, computation: Computation) -> RowSpec:
    """Return what a row of the program's batches holds; the fields of a pass stay on the host."""
    return RowSpec(computation.inputs(task), computation.fields(task))


def row_spec(task: Task, pass_: Pass) -> RowSpec:
    """Return what a pass reads of each example: what its program takes, and its own fields.

    An example whose fields the objective cannot take is none, where the pass reads these fields.
    """
    spec = device_spec(task, pass_.computation)
    fields = tuple(dict.fromkeys(spec.fields + pass_.fields))
    if set(task.objective.fields()) <= set(fields):
        spec = replace(spec, check_example=task.objective.check_example)
    return replace(spec, fields=fields)


def passes_of(evaluator: Evaluator, task: Task) -> dict[str, Pass]:
    """Return the passes that an evaluator needs; raise `CodeError` if they are none."""
    passes = evaluator.passes(task)
    check_type(passes, Mapping, "passes", evaluator)
    for name, pass_ in passes.items():
        check_type(pass_, Pass, f"passes['{name}']", evaluator)
        check_type(pass_.computation, Computation, f"computation of passes['{name}']", evaluator)
    return passes


def records_of(evaluator: Evaluator, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
    """Return an evaluator's records; raise `CodeError` if they are none."""
    records = evaluator.score(task, outputs)
    check_type(records, Sequence, "score", evaluator)
    for record in records:
        check_type(record, Mapping, "an entry of the list of score", evaluator)
        missing = {"name", "task", "split", "value", "chance", "count"} - record.keys()
        if missing:
            raise CodeError(
                f"score of {defined_in(evaluator)} returns a record without {', '.join(sorted(missing))}; make it by "
                "self.record."
            )
    return records


def function(
    task: Task, computation: Computation
) -> Callable[[Model, Batch, jax.Array], dict[str, jax.Array]]:
    """Return the function on the devices: outputs with a leading row axis, of batches whose rows may be invalid."""
    whole = task.for_evaluation()

    def outputs_of(model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        outputs = computation.outputs(whole, model, with_rows(batch), key)
        check_type(outputs, Mapping, "outputs", computation)
        for name, value in outputs.items():
            if jnp.shape(value)[:1] != batch.valid.shape:
                raise CodeError(
                    f"outputs of {defined_in(computation)} returns '{name}' with the shape {list(jnp.shape(value))}; "
                    f"its first axis must be the {batch.valid.size} rows of the batch."
                )
        return outputs

    return outputs_of


def _shares(result: Loss, valid_B: jax.Array) -> dict[str, jax.Array]:
    """Return what a score needs to combine the means of several batches, for each part of a loss.

    `terms NAME` is the number of terms each valid row stands for, `weight NAME` the part's weight in the loss, and
    `compared NAME` how many rows are compared with each other, 0 where none are. The whole loss has no NAME.
    """
    rows, columns = valid_B.sum(), dict[str, jax.Array]()
    for name, part in result.means(valid_B).items():
        shares = {
            "terms": part.count / jnp.maximum(rows, 1),
            "weight": jnp.asarray(part.weight, jnp.float32),
            "compared": rows if part.compares else jnp.zeros_like(rows),
        }
        columns |= {f"{what} {name}".strip(): value for what, value in shares.items()}
    return columns


def evaluators_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the blocks of a config's evaluators by task and name."""
    return {
        name: dict(task.get("evaluators", {})) for name, task in config.get("tasks", {}).items()
    }


def make_evaluators(task: Task) -> dict[str, Evaluator]:
    """Return the task's evaluators by name; their source defaults to nothing, so each block gives one."""
    return {
        name: configs.component("evaluators", block, f"tasks.{task.name}.evaluators.{name}")
        for name, block in task.config.evaluators.items()
    }

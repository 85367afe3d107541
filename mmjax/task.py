"""Tasks: a data source, the modalities it reads and their shapes, an objective, evaluators, a share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.bounds import COUNT, SIZE, check
from mmjax.core.config import FREE, SCHEDULE, holds
from mmjax.core.errors import CodeError, RecordError, UserError, nearest
from mmjax.core.extensions import MISTAKES, check_type, defined_in, described
from mmjax.modalities.base import Input, Modality, check_arrays
from mmjax.model import Model
from mmjax.objectives.base import Loss, Objective, with_rows
from mmjax.sources.base import Example, Examples, Source, int32

INSTANCES = "instances"  # a key that an input of any modality has
_PROBED = 16  # examples looked at before data are refused; the first good one ends it


class UnreadableValue(ValueError):
    """The error for a value at which a decoder failed, with the name of its field; its cause is the decoder's error."""


@dataclass(frozen=True)
class Failure:
    """The reason why an example makes no row.

    Attributes:
      text: a line.
      mistake: the type of the error if it is one of `MISTAKES`, which are rarely the data's; else None.
    """

    text: str
    mistake: type[Exception] | None


def failure_of(error: Exception) -> Failure:
    """Return an error of `RowSpec.make`, or of a source, as a failure."""
    if isinstance(error, UserError):
        return Failure(str(error), None)
    text = str(error) if isinstance(error, UnreadableValue) else described(error)
    origin = error.__cause__ if isinstance(error, UnreadableValue) else error
    return Failure(text, next((kind for kind in MISTAKES if isinstance(origin, kind)), None))


def refuse_mistake(failures: Sequence[Failure], where: str) -> None:
    """Raise `CodeError` if all failures have one type of error that is rarely the data's."""
    kinds = {failure.mistake for failure in failures}
    if len(kinds) == 1 and None not in kinds:
        raise CodeError(
            f"{where}: none of {len(failures)} examples makes a row, always for an error that is rarely the data's: "
            f"{failures[0].text}. Fix the code of the source or modality, or name another field."
        )


def _accept(example: Example) -> None:
    """Take any example."""
    del example


@dataclass(frozen=True)
class TaskConfig:
    """One block of `config.tasks`.

    Attributes:
      source: where examples come from.
      inputs: modality name -> the task's settings of it (field, resolution, length); with `instances: N`, so
        many clips or sentences of each example.
      objective: the loss.
      batch: examples per visit, over all devices.
      weight: its weight in the schedule: in the steps, or in the time under the rule `budget`; 0: it does not run.
      interval: under the rule `interval`, the passes from one visit to the next; 0: it does not run.
      evaluators: by names of your choice.
      microbatches: parts in which a batch is done, one after another, to save memory.
      shapes: the shapes that its visits take in turn, by names of your choice, see `mmjax.schedule.shapes`; those of
        `inputs` if empty. Evaluation has those of `inputs`.
      update_scope: how its steps see the optimizer (see `mmjax.optim.views.UpdateScope`);
        `optimizer.update_scope` if empty.
      shared_time: whether the stretches that training cuts out of an example's video and sounds begin at one random
        time (IMP, MBT), relative to the places where each may begin, or each at its own.
    """

    source: dict[str, Any] = field(metadata=holds("sources"))
    inputs: dict[str, dict[str, Any]] = field(metadata=SCHEDULE)
    objective: dict[str, Any] = field(metadata=SCHEDULE)
    batch: int = field(metadata=SCHEDULE)
    weight: int = field(default=1, metadata=SCHEDULE)
    interval: int = field(default=1, metadata=SCHEDULE)
    evaluators: dict[str, dict[str, Any]] = field(default_factory=dict, metadata=FREE)
    microbatches: int = field(default=1, metadata=FREE)
    shapes: dict[str, ShapeConfig] = field(default_factory=dict, metadata=SCHEDULE)
    update_scope: str = field(default="", metadata=SCHEDULE)
    shared_time: bool = field(default=True, metadata=SCHEDULE)

    def __post_init__(self) -> None:
        check(self, batch=COUNT, weight=SIZE, interval=SIZE, microbatches=COUNT)


@dataclass(frozen=True)
class Task:
    """A task as a run uses it; see `TaskConfig`."""

    name: str
    config: TaskConfig
    inputs: Mapping[str, Input]
    objective: Objective
    source: Source

    @property
    def batch(self) -> int:
        return self.config.batch

    def fold(self, seed: int) -> jax.Array:
        """Return the task's random key; visits and purposes are folded into it."""
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.name.encode()))

    def loss(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        """Return the loss of a batch; rows that are not valid reach none of it."""
        loss = self.objective(model, with_rows(batch), key)
        check_type(loss, Loss, "__call__", self.objective)
        if jnp.ndim(loss.value):
            raise CodeError(
                f"the loss of {defined_in(self.objective)} has the shape {list(jnp.shape(loss.value))}; it must be a "
                "scalar, the mean over the valid rows."
            )
        return loss

    def for_evaluation(self) -> Task:
        """Return the task with the settings of evaluation: with all tokens of one instance of each input."""
        inputs = {name: i.for_evaluation() for name, i in self.inputs.items()}
        return replace(self, inputs=inputs, objective=self.objective.for_evaluation())

    def rows(self) -> RowSpec:
        """Return the specification of one row of a training batch."""
        objective, shared_time = self.objective, self.config.shared_time
        return RowSpec(self.inputs, objective.fields(), objective.check_example, shared_time)


@dataclass(frozen=True)
class RowSpec:
    """One row of a batch: `inputs` by modality, integer `fields`, and whether the row is `valid`.

    `check_example` raises a `UserError` for an example whose fields cannot be used; `shared_time` is that of the task.
    """

    inputs: Mapping[str, Input]
    fields: tuple[str, ...]
    check_example: Callable[[Example], None] = _accept
    shared_time: bool = False

    def shapes(self) -> Batch:
        """Return the tree of `jax.ShapeDtypeStruct`s of one row."""
        return Batch(
            inputs={name: input_.arrays() for name, input_ in self.inputs.items()},
            fields={name: jax.ShapeDtypeStruct((), np.int32) for name in self.fields},
            valid=jax.ShapeDtypeStruct((), np.bool_),
        )

    def batch(self, size: int) -> Batch:
        """Return the tree of `jax.ShapeDtypeStruct`s of a batch."""
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((size, *s.shape), s.dtype), self.shapes()
        )

    def make(self, example: Example, rng: np.random.Generator | None) -> Batch:
        """Return the arrays of one example.

        Raises:
          RecordError: which field has a value that cannot be used, and why.
        """
        fields = {name: int32(name, _value(example, name)) for name in self.fields}
        try:
            self.check_example(example)
        except UserError as error:
            raise RecordError(str(error)) from error
        times = () if rng is None or not self._sharing else tuple(rng.random(self._sharing))
        inputs = {n: _arrays(input_, example, rng, times) for n, input_ in self.inputs.items()}
        return Batch(inputs=inputs, fields=fields, valid=np.True_)

    @cached_property
    def _sharing(self) -> int:
        """Return how many times the inputs share: one for each instance, and none where one input alone has time."""
        temporal = [input_ for input_ in self.inputs.values() if input_.modality.temporal]
        is_shared = self.shared_time and len(temporal) > 1
        return max(max(input_.instances, 1) for input_ in temporal) if is_shared else 0

    def blank(self) -> Batch:
        """Return an invalid row: zeros."""
        return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self.shapes())

    def check(self, examples: Examples, where: str) -> None:
        """Refuse data whose examples lack a field that the rows read, or hold nothing that they can use.

        One odd example is left to the loader, which counts it, as are examples that cannot be read at all.
        """
        names = [input_.field for input_ in self.inputs.values()] + list(self.fields)
        for name in names:
            if name not in examples.fields:
                raise UserError(
                    f"{where} reads field '{name}', which {examples.description} lacks. "
                    f"It has: {', '.join(examples.fields)}.{nearest(name, examples.fields)}"
                )
        odd: list[tuple[int, UserError]] = []
        failures: list[Failure] = []
        for index in _probes(len(examples)):
            try:
                self.make(examples[index], None)
                return
            except CodeError as error:
                raise CodeError(f"{where}: {error}") from error
            except UserError as error:
                odd.append((index, error))
            except Exception as error:  # damaged, or a mistake in the code
                text = f"{examples.description}[{index}]: "
                failures.append(replace(failure_of(error), text=text + failure_of(error).text))
        if odd:
            index, first = odd[0]
            raise UserError(f"{where}: {examples.description}[{index}]: {first}") from first
        refuse_mistake(failures, where)


def _probes(count: int) -> Iterator[int]:
    """Yield the first of `count` examples and others spread evenly."""
    yield from dict.fromkeys(i * count // _PROBED for i in range(_PROBED)) if count else ()


def _value(example: Example, name: str) -> Any:
    if name not in example:
        raise RecordError(f"it has no field '{name}'")
    return example[name]


def _arrays(
    input_: Input, example: Example, rng: np.random.Generator | None, times: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """Return the arrays of one input; any error of a decoder becomes one that names the field."""
    _value(example, input_.field)
    where = f"field '{input_.field}' as modality '{input_.name}'"
    try:
        return input_.preprocess(example, rng, times)
    except CodeError:
        raise
    except UserError as error:
        raise RecordError(f"{where}: {error}") from error
    except Exception as error:
        raise UnreadableValue(f"{where}: {described(error)}") from error


def make_task(
    name: str, block: Mapping[str, Any], modalities: Mapping[str, Modality], where: str = ""
) -> Task:
    """Build a task from its block, checking every key; `where` is the block's place, if not in `tasks`."""
    where = where or f"tasks.{name}"
    config = configs.build(TaskConfig, block, where)
    configs.check_names(config.evaluators, f"{where}.evaluators")
    configs.check_names(config.shapes, f"{where}.shapes")
    if config.batch < 1:
        raise UserError(f"{where}.batch is {config.batch}; it must be at least 1.")
    if config.microbatches < 1 or config.batch % config.microbatches:
        raise UserError(
            f"{where}.microbatches is {config.microbatches}; it must divide the batch of {config.batch}."
        )
    inputs = {
        m: make_input(m, b, modalities, f"{where}.inputs.{m}") for m, b in config.inputs.items()
    }
    objective = configs.component("objectives", config.objective, f"{where}.objective")
    if objective.head:
        configs.check_names([objective.head], f"{where}.objective.head")
    else:
        objective = replace(objective, head=name)
    for modality in objective.reads():
        if modality not in inputs:
            raise UserError(
                f"{where}.objective reads modality '{modality}'; {where}.inputs has no such block."
            )
    try:
        objective.check_inputs(inputs)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    check_batch(config, objective, where)
    source = configs.component("sources", config.source, f"{where}.source")
    return Task(name, config, inputs, objective, source)


def check_batch(config: TaskConfig, objective: Objective, where: str) -> None:
    """Raise `UserError` unless a batch holds whole windows, and its micro-batches whole sequences."""
    window = objective.window_rows(config.batch)
    if config.batch % window:
        raise UserError(
            f"{where}.batch is {config.batch}; the objective's window of {window} rows must divide it."
        )
    if config.batch % (config.microbatches * objective.rows_together()):
        raise UserError(
            f"{where}.batch is {config.batch}; {config.microbatches} microbatches of sequences with "
            f"{objective.rows_together()} items each must divide it."
        )


def make_input(
    name: str, block: Mapping[str, Any], modalities: Mapping[str, Modality], where: str
) -> Input:
    """Return a modality with a task's settings."""
    if name not in modalities:
        raise UserError(
            f"{where}: no modality '{name}' in config.modalities.{nearest(name, modalities)}"
        )
    modality, instances = modalities[name], block.get(INSTANCES, 0)
    if not isinstance(instances, int) or instances < 0:
        raise UserError(f"{where}.{INSTANCES} is {instances!r}; expected a number.")
    settings = {key: value for key, value in block.items() if key != INSTANCES}
    schema = getattr(type(modality), "Input", None)
    if not (isinstance(schema, type) and is_dataclass(schema)):
        raise CodeError(f"{defined_in(modality)} lacks Input, the dataclass of a task's settings.")
    result = Input(name, modality, configs.build(schema, settings, where), instances)
    try:
        check_arrays(modality, result.settings)
        shapes = {array: spec.shape for array, spec in result.arrays().items()}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for array, shape in shapes.items():
        if any(n < 1 for n in shape):
            raise UserError(f"{where}: array '{array}' would have the shape {list(shape)}.")
    return result


@dataclass(frozen=True)
class ShapeConfig:
    """One of a task's `shapes`.

    Attributes:
      inputs: modality -> the settings that differ from those of the task's `inputs`.
      weight: its weight among the task's visits.
    """

    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    weight: int = 1

    def __post_init__(self) -> None:
        if self.weight < 1:
            raise UserError(f"A shape's weight is {self.weight}; it must be at least 1.")

"""What an evaluator is: passes over held-out data on the devices, and a score of their outputs on the host.

An evaluator is one file in `mmjax/evaluators/`, whose class is a frozen dataclass. It runs no program of
its own: a pass names one of the things that its task's objective can compute (`embed/MODALITY`,
`predict/MODALITY`, `write`, `loss`), so evaluators that want the same outputs share one program and one reading of the
data.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import config as configs
from mmjax.model import Batch, Model
from mmjax.objectives.base import Loss, with_rows
from mmjax.sources.base import Source
from mmjax.task import RowSpec, Task

Outputs = dict[str, np.ndarray]
Record = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """All examples of a source through one program.

    Attributes:
      what: `embed/MODALITY` (output `vector` [E] of each row), or `embed/MODALITY>OTHER` in the space that it shares
        with the other, `predict/MODALITY` or `predict/ONE+OTHER`
        (`logits` [C]), `write` (texts, see `Objective.write`), or `loss` (the loss and its metrics, per batch, and what
        the batch counts, see `_shares`).
      block: the source as a config block.
      fields: integer fields of the examples that the score needs, kept beside the outputs.
    """

    what: str
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
        """The passes it needs, by a name of its own."""

    @abc.abstractmethod
    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        """Records from the outputs of each pass: valid rows only, with the pass's fields among them."""

    def record(
        self, task: Task, name: str, value: float, chance: float, count: int, **more: Any
    ) -> Record:
        """One line of `results.json`."""
        split = configs.component("sources", self.source, f"tasks.{task.name}.evaluators").label
        return {
            "name": name,
            "task": task.name,
            "split": split,
            "value": float(value),
            "chance": float(chance),
            "count": int(count),
            **more,
        }


def embedding(task: Task, modality: str, other: str) -> str:
    """What a pass says for vectors of a modality that are compared with another's."""
    several = len(task.objective.embeds()) > 2
    return f"embed/{modality}>{other}" if several else f"embed/{modality}"


def row_spec(task: Task, each: Pass) -> RowSpec:
    """What a pass reads of each example: what its program takes, and its own fields.

    An example whose fields the objective cannot take is none, where the pass reads these fields.
    """
    spec = device_spec(task, each.what)
    fields = tuple(dict.fromkeys(spec.fields + each.fields))
    if set(task.objective.fields()) <= set(fields):
        spec = replace(spec, check_example=task.objective.check_example)
    return replace(spec, fields=fields)


def device_spec(task: Task, what: str) -> RowSpec:
    """What a row of the program's batches holds. The fields of a pass stay on the host."""
    whole = {name: each.whole() for name, each in task.inputs.items()}
    if what.startswith("embed/"):
        modality = what.removeprefix("embed/").partition(">")[0]
        return RowSpec({modality: whole[modality]}, ())
    if what.startswith("predict/"):
        modalities = what.removeprefix("predict/").split("+")
        return RowSpec({m: whole[m] for m in modalities}, ())
    return RowSpec(whole, task.objective.fields())


def function(task: Task, what: str) -> Callable[[Model, Batch, jax.Array], dict[str, jax.Array]]:
    """Return the function on the devices: outputs with a leading row axis, of batches whose rows may be invalid."""
    of_marked = _function(task, what)
    return lambda model, batch, key: of_marked(model, with_rows(batch), key)


def _function(task: Task, what: str) -> Callable[[Model, Batch, jax.Array], dict[str, jax.Array]]:
    task = task.whole()
    if what.startswith("embed/"):
        modality, _, toward = what.removeprefix("embed/").partition(">")
        return lambda model, batch, key: {
            "vector": task.objective.embed(model, modality, batch["inputs"][modality], toward)
        }
    if what.startswith("predict/"):
        return lambda model, batch, key: {"logits": task.objective.predict(model, batch["inputs"])}
    if what == "write":
        return task.objective.write

    def loss(model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        result, valid_B = task.loss(model, batch, key), batch["valid"]
        values = {"loss": result.value, **result.metrics, **_shares(result, valid_B)}
        values = {name: value for name, value in values.items() if not jnp.ndim(value)}
        return {name: jnp.broadcast_to(value, valid_B.shape) for name, value in values.items()}

    return loss


def _shares(result: Loss, valid_B: jax.Array) -> dict[str, jax.Array]:
    """What a score needs to put the means of several batches together, for each part of a loss.

    `terms NAME` says how many terms each valid row stands for, `weight NAME` the part's weight in the loss, and
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
    """The task's evaluators by name; their source defaults to nothing, so each block gives one."""
    return {
        name: configs.component("evaluators", block, f"tasks.{task.name}.evaluators.{name}")
        for name, block in task.config.evaluators.items()
    }

"""The mean loss of a split, beside that of always predicting the mean pitch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmjax.evaluators.base import Evaluator, LossOf, Outputs, Pass, Record
from mmjax.task import Task


@dataclass(frozen=True)
class MeanError(Evaluator):
    """The keys of the evaluator, beside the `source` of every evaluator.

    Attributes:
      unit: unit of the error, for tables.
    """

    unit: str = "semitones^2"

    def passes(self, task: Task) -> dict[str, Pass]:
        """Return the passes over data that the devices make, each with what it computes."""
        return {"all": Pass(LossOf(), self.source, ("pitch",))}

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        """Return records from the outputs of all passes, on the host."""
        loss, pitch = outputs["all"]["loss"], outputs["all"]["pitch"]
        extra = {"unit": self.unit, "better": "lower"}
        return [self.record(task, "error", loss.mean(), pitch.var(), len(pitch), **extra)]

"""The objective's own loss on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmjax.errors import UserError
from mmjax.evaluator import Evaluator, Outputs, Pass, Record
from mmjax.task import Task


@dataclass(frozen=True)
class HeldOutLoss(Evaluator):
    """Mean loss over the rows of a split, beside the objective's `baseline` (what knows nothing of the input).

    And each part NAME of the loss for which there is a `baseline NAME`. What a loss draws in training (masks, times,
    a router's noise) it draws here too, by a key of the evaluation's own; of the inputs it sees all tokens.
    """

    def passes(self, task: Task) -> dict[str, Pass]:
        return {"all": Pass("loss", self.source, ())}

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        rows = outputs["all"]
        if "baseline" not in rows:
            raise UserError(
                f"tasks.{task.name}: objective {type(task.objective).__name__} reports no 'baseline'."
            )
        parts = [""] + [n.removeprefix("baseline ") for n in rows if n.startswith("baseline ")]
        return [self._record(task, rows, part) for part in parts]

    def _record(self, task: Task, rows: Outputs, part: str) -> Record:
        values, baselines = rows[part or "loss"], rows[f"baseline {part}".strip()]
        name = f"held-out loss {part}".strip()
        return self.record(task, name, values.mean(), baselines.mean(), len(values), unit="loss")

"""The objective's own loss on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmjax.errors import UserError
from mmjax.evaluator import Evaluator, Outputs, Pass, Record
from mmjax.task import Task


@dataclass(frozen=True)
class HeldOutLoss(Evaluator):
    """Mean loss over the rows of a split, beside the objective's `baseline` (what knows nothing of the input)."""

    def passes(self, task: Task) -> dict[str, Pass]:
        return {"all": Pass("loss", self.source, ())}

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        rows = outputs["all"]
        if "baseline" not in rows:
            raise UserError(
                f"tasks.{task.name}: objective {type(task.objective).__name__} reports no 'baseline'."
            )
        value, baseline = rows["loss"].mean(), rows["baseline"].mean()
        return [self.record(task, "held-out loss", value, baseline, len(rows["loss"]), unit="loss")]

"""The objective's own loss on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.evaluators.base import Evaluator, LossOf, Outputs, Pass, Record
from mmjax.model import Model
from mmjax.task import Task


@dataclass(frozen=True)
class LossAndBaseline(LossOf):
    """The loss of an objective that reports a baseline.

    Raises:
      UserError: the loss has no metric `baseline`; raised when the program is traced, before step 0.
    """

    def outputs(
        self, task: Task, model: Model, batch: Batch, key: jax.Array
    ) -> dict[str, jax.Array]:
        outputs = super().outputs(task, model, batch, key)
        _check_baseline(task, outputs)
        return outputs


@dataclass(frozen=True)
class HeldOutLoss(Evaluator):
    """The loss of a split, beside the objective's `baseline` (a prediction independent of the input).

    Neither holds the auxiliary losses of layers, such as a router's, which training adds. Where a loss has some, their
    mean is `auxiliary` in the record.

    Also scores each part NAME of the loss that has a metric `baseline NAME`. A loss that is a mean over tokens is the
    mean over those of the whole split, and so on: it does not depend on `evaluation.batch`, unless the rows of a batch
    compete for experts.

    A loss that compares the rows of a batch with each other does, since it gets harder with more of them. It is taken
    of the batches with the most valid rows only, so that a smaller last one does not mix in an easier loss; `compared`
    in the record is the number of rows that these have, and `count` how many rows they are in all.

    What a loss draws in training (masks, times) it draws here too, for each example by a key of the evaluation's own;
    of the inputs it sees all tokens.
    """

    def passes(self, task: Task) -> dict[str, Pass]:
        return {"all": Pass(LossAndBaseline(), self.source, ())}

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        rows = outputs["all"]
        _check_baseline(task, rows)  # the program may be that of another evaluator of this loss
        named = [n.removeprefix("baseline ") for n in rows if n.startswith("baseline ")]
        whole = self._whole(task, _without_auxiliary(rows))
        if rows.get("auxiliary", np.zeros(1)).any():
            whole["auxiliary"] = mean(rows, "auxiliary", "")
        return [whole, *(self._part(task, rows, part) for part in named)]

    def _part(self, task: Task, rows: Outputs, part: str) -> Record:
        value, baseline = (mean(rows, name, part) for name in (part, f"baseline {part}"))
        return self._record(task, rows, f"held-out loss {part}", value, baseline, [part])

    def _whole(self, task: Task, rows: Outputs) -> Record:
        parts = [n.removeprefix("terms ") for n in rows if n.startswith("terms ")]
        if not parts:
            value, baseline = (mean(rows, name, "") for name in ("loss", "baseline"))
            return self._record(task, rows, "held-out loss", value, baseline, [""])
        weights = {part: float(rows[f"weight {part}"][0]) for part in parts}
        with_terms = {part: w for part, w in weights.items() if rows[f"terms {part}"].any()}
        value, baseline = (
            sum(w * mean(rows, prefix + part, part) for part, w in with_terms.items())
            for prefix in ("", "baseline ")
        )
        # Terms that are in no part.
        rest_N = rows["loss"] - sum(w * rows[part] for part, w in weights.items())
        value += float(rest_N.mean(dtype=np.float64))
        return self._record(task, rows, "held-out loss", value, baseline, parts)

    def _record(
        self,
        task: Task,
        rows: Outputs,
        name: str,
        value: float,
        baseline: float,
        parts: Sequence[str],
    ) -> Record:
        count = np.logical_and.reduce([used(rows, part) for part in parts]).sum()
        compared = max(int(_compared(rows, part).max(initial=0)) for part in parts)
        extra = {"compared": compared} if compared else {}
        return self.record(task, name, value, baseline, count, unit="loss", **extra)


def _check_baseline(task: Task, outputs: Mapping[str, Any]) -> None:
    if "baseline" not in outputs:
        raise UserError(
            f"tasks.{task.name}.evaluators: objective {type(task.objective).__name__} reports no 'baseline', "
            "which held_out_loss sets beside the loss. Add it to the metrics of its Loss, or remove the evaluator."
        )


def _without_auxiliary(rows: Outputs) -> Outputs:
    """Return the outputs with the loss as a baseline is compared with it."""
    auxiliary_N = rows.get("auxiliary", np.zeros(1)).astype(np.float64)
    return {**rows, "loss": rows["loss"].astype(np.float64) - auxiliary_N}


def _compared(rows: Outputs, part: str) -> np.ndarray:
    return rows.get(f"compared {part}".strip(), np.zeros(len(rows["loss"]), int))


def used(rows: Outputs, part: str) -> np.ndarray:
    """Return the rows that a part of the loss is taken of: all, or the fullest batches' where it compares rows."""
    compared_N = _compared(rows, part)
    chosen_N: np.ndarray = compared_N == compared_N.max(initial=0)
    return chosen_N


def mean(rows: Outputs, name: str, part: str) -> float:
    """Return the mean of a column over all terms of a part of the loss; NaN where it has none."""
    chosen_N = used(rows, part)
    values_N = rows[name][chosen_N].astype(np.float64)
    terms_N = rows.get(f"terms {part}".strip(), np.ones(len(chosen_N)))[chosen_N].astype(np.float64)
    total = terms_N.sum()
    return float((values_N * terms_N).sum() / total) if total > 0 else float("nan")

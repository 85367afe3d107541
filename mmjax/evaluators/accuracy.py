"""Accuracy of a task that predicts classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmjax.core.errors import UserError, nearest
from mmjax.evaluators.base import Evaluator, Outputs, Pass, Predict, Record
from mmjax.objectives.base import classified
from mmjax.task import Task

MANY = 10
"""With more classes than this, top-5 accuracy is given beside top-1."""


@dataclass(frozen=True)
class Accuracy(Evaluator):
    """Fraction of a split whose class has the largest logit (top-1), or is among the five largest (top-5).

    `chance` is k / classes; `majority` is what always naming the split's k largest classes would give.

    Attributes:
      label: integer field with the class; the objective's own if empty.
      modalities: those that the model is given; all that the objective predicts from if empty.
    """

    label: str = ""
    modalities: tuple[str, ...] = ()

    def passes(self, task: Task) -> dict[str, Pass]:
        modalities = classified(task.objective)
        if not modalities:
            raise UserError(
                f"tasks.{task.name}: accuracy needs an objective that predicts classes, "
                f"such as classification; {type(task.objective).__name__} does not."
            )
        for name in self.modalities:
            if name not in modalities:
                raise UserError(
                    f"tasks.{task.name}: accuracy of '{name}', from which the objective predicts nothing."
                    f"{nearest(name, modalities)}"
                )
        logits = Predict(self.modalities or tuple(modalities))
        return {"all": Pass(logits, self.source, (self._label(task),))}

    def _label(self, task: Task) -> str:
        known = task.objective.fields()
        if not self.label and len(known) != 1:
            raise UserError(
                f"tasks.{task.name}: the objective reads the fields {', '.join(known) or 'none'}; "
                "name the class by the evaluator's 'label'."
            )
        return self.label or known[0]

    def _of_modalities(self) -> str:
        return f" of {'+'.join(self.modalities)}" if self.modalities else ""

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        label = self._label(task)
        logits_NC, label_N = outputs["all"]["logits"], outputs["all"][label]
        count, classes = logits_NC.shape
        split = self.passes(task)["all"].source.label
        where = f"tasks.{task.name}: accuracy on '{split}'"
        if not count:
            raise UserError(f"{where} found no example that could be read.")
        outside = label_N[(label_N < 0) | (label_N >= classes)]
        if outside.size:
            raise UserError(
                f"{where}: field '{label}' has the value {outside[0]}, outside [0, {classes}): the "
                f"objective has classes = {classes} ({outside.size} of {count} examples)."
            )
        largest = np.sort(np.bincount(label_N))[::-1]
        return [
            self.record(
                task, f"top-{k} accuracy{self._of_modalities()}", (rank(logits_NC, label_N) < k).mean(), k / classes,
                count, unit="fraction", majority=float(largest[:k].sum() / count),
            )
            for k in ((1, 5) if classes > MANY else (1,))
        ]  # fmt: skip


def rank(logits_NC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Return how many other classes have a logit that is not below that of the label: 0 where it is the largest.

    Ties count against us, and so does NaN: a model with equal logits for every class is never right.
    """
    own_N1 = np.take_along_axis(logits_NC, label_N[:, None], axis=1)
    return (~(logits_NC < own_N1)).sum(axis=1) - 1

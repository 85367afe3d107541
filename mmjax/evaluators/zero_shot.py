"""Zero-shot classification: a class is the mean text vector of names that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmjax.evaluator import Evaluator, Outputs, Pass, Record, embedding
from mmjax.task import Task


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Accuracy of the nearest class vector (Radford et al. 2021, with names as prompts).

    Attributes:
      label: integer field with the class.
      classify: the modality that is classified.
      describe: the modality that describes the classes.
      names: where the describing examples come from, as a config block; each adds its vector to the mean
        of its class.
    """

    label: str = "group"
    classify: str = "image"
    describe: str = "text"
    names: dict[str, Any] = field(default_factory=dict)

    def passes(self, task: Task) -> dict[str, Pass]:
        return {
            "names": Pass(embedding(task, self.describe, self.classify), self.names, (self.label,)),
            "examples": Pass(
                embedding(task, self.classify, self.describe), self.source, (self.label,)
            ),
        }

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        examples, truth = outputs["examples"]["vector"], outputs["examples"][self.label]
        classes, means = class_means(outputs["names"]["vector"], outputs["names"][self.label])
        guess = classes[(examples @ means.T).argmax(axis=1)]
        majority = np.unique(truth, return_counts=True)[1].max() / len(truth)
        name = f"zero-shot {self.label}"
        return [
            self.record(
                task,
                name,
                (guess == truth).mean(),
                1 / len(classes),
                len(truth),
                majority=float(majority),
            )
        ]


def class_means(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes, sorted, and the unit mean vector of each."""
    classes = np.unique(labels)
    means = np.stack([vectors[labels == c].mean(axis=0) for c in classes])
    return classes, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

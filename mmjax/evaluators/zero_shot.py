"""Zero-shot classification: a class is the mean text vector of names that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmjax.evaluators.accuracy import rank
from mmjax.evaluators.base import Evaluator, Outputs, Pass, Record, embed
from mmjax.task import Task


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Accuracy of the nearest class vector (Radford et al. 2021, with names as prompts).

    Ties count against the model, and so does NaN: one that maps everything to one point is never right.

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
            "names": Pass(embed(task, self.describe, self.classify), self.names, (self.label,)),
            "examples": Pass(embed(task, self.classify, self.describe), self.source, (self.label,)),
        }

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        examples, truth = outputs["examples"]["vector"], outputs["examples"][self.label]
        classes, means = class_means(outputs["names"]["vector"], outputs["names"][self.label])
        # By way of float64, so that what is equal stays equal whatever the order in which a product is summed.
        similarity_NC = (examples.astype(np.float64) @ means.T).astype(np.float32)
        place = np.minimum(np.searchsorted(classes, truth), len(classes) - 1)
        right = (classes[place] == truth) & (rank(similarity_NC, place) < 1)
        majority = np.unique(truth, return_counts=True)[1].max() / len(truth)
        name = f"zero-shot {self.label}"
        return [
            self.record(
                task,
                name,
                right.mean(),
                1 / len(classes),
                len(truth),
                unit="fraction",
                majority=float(majority),
            )
        ]


def class_means(vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes, sorted, and the unit mean vector of each, in float64."""
    classes, wide = np.unique(labels), vectors.astype(np.float64)
    means = np.stack([wide[labels == c].mean(axis=0) for c in classes])
    return classes, means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

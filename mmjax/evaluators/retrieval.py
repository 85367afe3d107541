"""Retrieval between two modalities of a contrastive task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from mmjax.core.bounds import COUNT, check
from mmjax.core.errors import UserError
from mmjax.evaluators.base import Evaluator, Outputs, Pass, Record, embed
from mmjax.objectives.base import embedded
from mmjax.task import Task

_PAIRS = 2**24  # of a query and a candidate, at a time


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """Recall at k in both directions; any candidate of the query's concept counts as found.

    Attributes:
      positive_key: integer field that is equal for examples that belong together.
      unique: the modality of which only one example per concept is a candidate (texts that repeat).
      at: the values of k.
      modalities: the two modalities, of a task that compares more.
    """

    positive_key: str = "concept"
    unique: str = "text"
    at: tuple[int, ...] = (1, 5, 10)
    modalities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, at=COUNT)

    def passes(self, task: Task) -> dict[str, Pass]:
        one, two = self._pair(task)
        return {
            m: Pass(embed(task, m, other), self.source, (self.positive_key,))
            for m, other in ((one, two), (two, one))
        }

    def _pair(self, task: Task) -> tuple[str, str]:
        known = embedded(task.objective)
        pair = self.modalities or known
        if len(pair) != 2 or not set(pair) <= set(known):
            raise UserError(
                f"tasks.{task.name}: retrieval needs an objective that embeds two modalities, or two of them; "
                f"'modalities' is {list(self.modalities)}, the objective embeds {list(known)}."
            )
        return pair[0], pair[1]

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        one, two = self._pair(task)
        sides = {m: self._side(m, outputs[m]) for m in (one, two)}
        return self._direction(task, one, two, sides) + self._direction(task, two, one, sides)

    def _side(self, modality: str, output: Outputs) -> tuple[np.ndarray, np.ndarray]:
        vectors, concepts = output["vector"], output[self.positive_key]
        if modality != self.unique:
            return vectors, concepts
        first = np.sort(np.unique(concepts, return_index=True)[1])
        return vectors[first], concepts[first]

    def _direction(
        self,
        task: Task,
        query: str,
        candidate: str,
        sides: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ) -> list[Record]:
        (queries, query_concepts), (candidates, concepts) = sides[query], sides[candidate]
        # Some queries at a time: the similarities of all would be the square of the split.
        size = max(1, _PAIRS // max(len(concepts), 1))
        places, positives = [], []
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            positive_QC = query_concepts[part, None] == concepts[None, :]
            places.append(place(queries[part] @ candidates.T, positive_QC))
            positives.append(positive_QC.sum(axis=1))
        recalls = [float((np.concatenate(places) < k).mean()) for k in self.at]
        by_chance = chance(np.concatenate(positives), len(concepts), self.at)
        return [
            self.record(
                task,
                f"{query} to {candidate} R@{k}",
                value,
                luck,
                len(query_concepts),
                unit="fraction",
            )
            for k, value, luck in zip(self.at, recalls, by_chance, strict=True)
        ]


def recall(similarity_QC: np.ndarray, positive_QC: np.ndarray, at: tuple[int, ...]) -> list[float]:
    """Return the fraction of queries with a positive among the k most similar candidates.

    Ties count against us: a negative as similar as the best positive ranks before it, so that a model
    which maps everything to one point, or to NaN, has recall 0.
    """
    place_Q = place(similarity_QC, positive_QC)
    return [float((place_Q < k).mean()) for k in at]


def place(similarity_QC: np.ndarray, positive_QC: np.ndarray) -> np.ndarray:
    """Return how many candidates stand before each query's best positive, int64 `[Q]`; without one, a huge number."""
    best_Q = np.where(positive_QC, similarity_QC, -np.inf).max(axis=1)
    before_Q = (~(similarity_QC < best_Q[:, None]) & ~positive_QC).sum(axis=1)
    return np.where(positive_QC.any(axis=1), before_Q, np.iinfo(np.int64).max)


def chance(positives_Q: np.ndarray, candidates: int, at: tuple[int, ...]) -> list[float]:
    """Return the recall of a random order: `1 - C(n - p, k) / C(n, k)` for p positives among n, mean over queries."""
    values = []
    for k in at:
        p, n = np.asarray(positives_Q, float), float(candidates)
        certain = n - p < k
        safe = np.where(certain, 0.0, p)
        log_miss = (
            gammaln(n - safe + 1)
            - gammaln(n - safe - min(k, n) + 1)
            - gammaln(n + 1)
            + gammaln(n - min(k, n) + 1)
        )
        values.append(
            float(
                np.where(certain & (p > 0), 1.0, np.where(p > 0, 1 - np.exp(log_miss), 0.0)).mean()
            )
        )
    return values

"""Texts that a model writes of held-out examples, and what the given texts cost it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.core.errors import UserError
from mmjax.data.tokenizer import TokenIds
from mmjax.evaluators.base import Evaluator, Outputs, Pass, Record, Write
from mmjax.objectives.base import written
from mmjax.task import Task


@dataclass(frozen=True)
class Captions(Evaluator):
    """Cross-entropy per token of the given texts; and how often, or how far, the model writes just these.

    Tokens are compared, up to the end of each text: a match is of all of them in order, and F1 is of the two bags of
    tokens, mean over the examples (Rajpurkar et al. 2016). Chance of the loss is the entropy of the split's own token
    frequencies (the best guess that looks at nothing); of the others, what texts of other examples, drawn at random,
    score.
    """

    def passes(self, task: Task) -> dict[str, Pass]:
        if not written(task.objective):
            raise UserError(
                f"tasks.{task.name}: captions needs an objective that writes texts, such as coca; "
                f"{type(task.objective).__name__} does not."
            )
        return {"all": Pass(Write(), self.source, ())}

    def score(self, task: Task, outputs: Mapping[str, Outputs]) -> list[Record]:
        rows, end = outputs["all"], _end(task)
        references_ids = [
            row[:n] for row, n in zip(rows["wanted"], rows["tokens"].astype(int), strict=True)
        ]
        references, captions = texts(references_ids, end), texts(rows["written"], end)
        others = [references[i] for i in np.random.default_rng(0).permutation(len(references))]
        tokens = int(rows["tokens"].sum())
        return [
            self.record(
                task, "caption loss", rows["cost"].sum() / max(tokens, 1),
                entropy(np.concatenate(references_ids)), tokens, unit="loss",
            ),
            self.record(
                task, "caption match", match(captions, references), match(others, references),
                len(references), unit="fraction",
            ),
            self.record(
                task, "caption F1", f1(captions, references), f1(others, references),
                len(references), unit="fraction",
            ),
        ]  # fmt: skip


def _end(task: Task) -> int | None:
    """Return the token that closes a text of the task; None where all have the whole length, as colours do."""
    modality: Any = task.inputs[written(task.objective)[1]].modality
    special: TokenIds = modality.token_ids()
    return special.end


def texts(rows: Iterable[np.ndarray], end: int | None) -> list[tuple[int, ...]]:
    """Return the tokens of each row before its end token, or all of them.

    What else a row holds is a token, whatever its id: padding comes only after an end.
    """
    result = []
    for row in rows:
        ids = row.tolist()
        result.append(tuple(ids[: ids.index(end)] if end in ids else ids))
    return result


def match(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> float:
    """Return the share of pairs that agree."""
    return float(np.mean([a == b for a, b in zip(one, other, strict=True)]))


def f1(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> float:
    """Return the mean over pairs of `2 |a & b| / (|a| + |b|)`, of bags of tokens; two empty texts agree."""
    scores = []
    for a, b in zip(one, other, strict=True):
        common = (Counter(a) & Counter(b)).total()
        scores.append(2 * common / (len(a) + len(b)) if a or b else 1.0)
    return float(np.mean(scores))


def entropy(tokens_N: np.ndarray) -> float:
    """Return the entropy in nats of the frequencies of these tokens."""
    share = np.unique(tokens_N, return_counts=True)[1] / max(len(tokens_N), 1)
    return float(-(share * np.log(share)).sum())

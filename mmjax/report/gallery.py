"""Retrieval in held-out data by a trained model: examples of one modality, and what they retrieve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.core import config as configs
from mmjax.core.errors import RecordError, UserError
from mmjax.evaluators.base import Embed, Evaluator, make_evaluators
from mmjax.loading import TrainedModel
from mmjax.objectives.base import embedded
from mmjax.report.html import Html, join, tag
from mmjax.report.panel import (
    BATCH,
    FOUND,
    MOST_READ,
    Panel,
    first_of_each,
    fit_to_budget,
    read_of,
    right_mark,
    spread,
)
from mmjax.report.preview import as_given, is_sound, preview, shown, strip
from mmjax.sources.base import Examples
from mmjax.task import RowSpec, Task


@dataclass(frozen=True)
class Candidates:
    """Held-out examples of one task that could be read.

    Attributes:
      values: by modality, each example's value as a user would give it, `[N]`.
      concept: which examples belong together, `[N]`.
      unreadable: how many could not be read.
      total: examples of the split.
      credits: those whom the data's licences require to be named.
    """

    values: Mapping[str, list[Any]]
    concept: np.ndarray
    unreadable: int
    total: int
    credits: tuple[str, ...]


@dataclass(frozen=True)
class Retrieved:
    """The candidates that one query retrieves.

    Attributes:
      query: its example.
      ranking: the examples it retrieves, the most similar first.
      right: whether each is of the query's concept.
      place: that of the first right one among all candidates, from 1; as in the recall, a wrong
        one that is as similar ranks before it.
    """

    query: int
    ranking: list[int]
    right: list[bool]
    place: int | None


def retrieved(model: TrainedModel, task: Task, count: int) -> Iterator[Panel]:
    """Yield a panel for each split on which an evaluator of the task retrieves between two modalities.

    Args:
      model: a trained run.
      task: of it.
      count: queries of each direction.

    Raises:
      UserError: held-out data is not there.
    """
    for name, evaluator in retrievals(task).items():
        where = f"tasks.{task.name}.evaluators.{name}.source"
        source = configs.component("sources", evaluator.source, where)
        candidates = read_candidates(source.open(), task, getattr(evaluator, "positive_key"))  # noqa: B009
        yield gallery(
            model, task, candidates, source.label, getattr(evaluator, "unique", ""), count
        )


def gallery(
    model: TrainedModel, task: Task, candidates: Candidates, split: str, unique: str, count: int
) -> Panel:
    """Return a panel with both directions of one task on one split.

    Args:
      model: gives vectors, as `TrainedModel.embed` does.
      task: embeds two modalities.
      candidates: held-out examples, perhaps none.
      split: their name.
      unique: the modality of which only the first example of each concept is a candidate.
      count: queries of each direction.
    """
    title = f"{split}: {read_of(candidates.total, len(candidates.concept), candidates.unreadable)}"
    if not len(candidates.concept):
        return Panel(title, Html(""))
    vectors = {m: _embedded(model, task.name, m, values) for m, values in candidates.values.items()}
    one, two = embedded(task.objective)
    sides = (
        _direction(task, candidates, vectors, q, c, unique, count)
        for q, c in ((one, two), (two, one))
    )
    return Panel(title, join(sides), candidates.credits)


def retrievals(task: Task) -> dict[str, Evaluator]:
    """Return the task's evaluators that embed two modalities of the same examples, joined by a concept."""
    programs = {Embed(modality) for modality in embedded(task.objective)}
    result = {}
    for name, evaluator in make_evaluators(task).items():
        passes = list(evaluator.passes(task).values())
        is_of_pairs = len(programs) == 2 and {pass_.computation for pass_ in passes} == programs
        if is_of_pairs and all(pass_.block == evaluator.source for pass_ in passes):
            result[name] = evaluator
    return {name: pass_ for name, pass_ in result.items() if hasattr(pass_, "positive_key")}


def read_candidates(examples: Examples, task: Task, concept: str) -> Candidates:
    """Read up to 2048 examples, spread over the split; count what cannot be read or decoded."""
    pair = embedded(task.objective)
    values: dict[str, list[Any]] = {modality: [] for modality in pair}
    rows = RowSpec({modality: task.inputs[modality] for modality in pair}, (concept,))
    concepts, unreadable = [], 0
    for index in spread(len(examples), MOST_READ):
        try:
            example = examples[index]
            row = rows.make(example, None)
        except (
            Exception
        ) as error:  # whatever a corrupt or odd record makes a reader or a decoder raise
            if isinstance(error, UserError) and not isinstance(error, RecordError):
                raise
            unreadable += 1
            continue
        concepts.append(int(row.fields[concept]))
        for modality in pair:
            input_ = task.inputs[modality]
            values[modality].append(as_given(input_, example[input_.field]))
    credits = tuple(getattr(examples, "credits", ()))
    return Candidates(values, np.array(concepts, np.int64), unreadable, len(examples), credits)


def answers(
    queries_QE: np.ndarray,
    candidates_CE: np.ndarray,
    query_ids: Sequence[int],
    candidate_ids: Sequence[int],
    concept: np.ndarray,
) -> list[Retrieved]:
    """Return the nearest candidates of each query by inner product; rows belong to the examples `*_ids`."""
    result = []
    concepts_C = concept[np.asarray(candidate_ids)]
    for query, similarity_C in zip(query_ids, queries_QE @ candidates_CE.T, strict=True):
        positive_C = concepts_C == concept[query]
        order = np.argsort(-similarity_C, kind="stable")[:FOUND]
        place = None
        if positive_C.any():
            best = similarity_C[positive_C].max()
            place = int((~(similarity_C < best) & ~positive_C).sum()) + 1
        nearest = [int(candidate_ids[i]) for i in order]
        result.append(Retrieved(query, nearest, positive_C[order].tolist(), place))
    return result


def _embedded(model: TrainedModel, task: str, modality: str, values: list[Any]) -> np.ndarray:
    """Return vectors `[N, E]`, in batches of one size: one program, and little memory."""
    vectors = []
    for start in range(0, len(values), BATCH):
        part = values[start : start + BATCH]
        padded = part + part[:1] * (BATCH - len(part))
        vectors.append(model.embed(task=task, **{modality: padded})[: len(part)])
    return np.concatenate(vectors)


def _direction(
    task: Task,
    candidates: Candidates,
    vectors: Mapping[str, np.ndarray],
    query: str,
    candidate: str,
    unique: str,
    count: int,
) -> Html:
    """Return one direction: the queries, one of each concept, each with what it retrieves."""
    firsts = first_of_each(candidates.concept)
    queries = [firsts[i] for i in spread(len(firsts), count)]
    indices = firsts if candidate == unique else list(range(len(candidates.concept)))
    retrieved_ones = answers(
        vectors[query][queries], vectors[candidate][indices], queries, indices, candidates.concept
    )
    hits = sum(any(answer.right) for answer in retrieved_ones)
    caption = f"{hits} of {len(retrieved_ones)} have a right one among the {FOUND} nearest of {len(indices):,}."
    cards = fit_to_budget(
        retrieved_ones, lambda answer: _card(task, candidates, query, candidate, answer)
    )
    head = tag("h4", f"{query} to {candidate}")
    style = _style(shown(task.inputs[candidate], candidates.values[candidate][0]))
    return tag("div", head, tag("p", caption), tag("ul", *cards, class_=f"cards {style}"))


def _style(value: Any) -> str:
    """Return the class of a list of such values."""
    return "of-words" if isinstance(value, str) else "of-sounds" if is_sound(value) else "of-tiles"


def _card(
    task: Task, candidates: Candidates, query: str, candidate: str, answer: Retrieved
) -> Html:
    """Return a query and what it retrieves."""
    items = []
    for i, right in zip(answer.ranking, answer.right, strict=True):
        value = shown(task.inputs[candidate], candidates.values[candidate][i])
        # A sound cannot be seen.
        caption = _words(task, candidates, candidate, i) if is_sound(value) else None
        caption = tag("span", caption, dir="auto", class_="note") if caption else None
        mark = right_mark() if right else None
        parts = (_show(task, candidates, candidate, i), caption, mark)
        items.append(tag("li", *parts, class_="right" if right else None))
    asked = tag(
        "div",
        _show(task, candidates, query, answer.query),
        strip(shown(task.inputs[query], candidates.values[query][answer.query])),
        class_="query",
    )
    late = None if any(answer.right) else _late(task, candidates, candidate, answer)
    return tag("li", asked, tag("ol", *items, class_="found"), late)


def _late(task: Task, candidates: Candidates, candidate: str, answer: Retrieved) -> Html | None:
    """Return a note on the rank of the first right answer that is not among those shown."""
    if answer.place is None:
        return None
    right_one = shown(task.inputs[candidate], candidates.values[candidate][answer.query])
    words = preview(right_one, "") if isinstance(right_one, str) else "The first right one"
    return tag("p", words, f" comes at place {answer.place}", class_="late")


def _show(task: Task, candidates: Candidates, modality: str, index: int) -> Html:
    """Return an example's preview; the other modality's text describes it."""
    words = _words(task, candidates, modality, index)
    label = f"{modality}: {words}" if words else f"{modality} {index}"
    return preview(shown(task.inputs[modality], candidates.values[modality][index]), label)


def _words(task: Task, candidates: Candidates, modality: str, index: int) -> str | None:
    """Return the text of an example in its other modality, if that is text."""
    for other, values in candidates.values.items():
        if other != modality:
            value = shown(task.inputs[other], values[index])
            return value if isinstance(value, str) else None
    return None

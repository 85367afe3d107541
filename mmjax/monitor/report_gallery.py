"""What a trained model finds in held-out data: examples of one modality, and what they retrieve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.evaluator import Evaluator, make_evaluators
from mmjax.loading import Embedder
from mmjax.monitor.report_html import Html, tag
from mmjax.monitor.report_preview import as_given, preview, shown
from mmjax.source import Examples
from mmjax.task import Task

EXAMPLES = 12  # of a panel
FOUND = 5  # answers to each
_MOST_READ = 2048  # examples of a split that are candidates
_PANEL_BYTES = 2_000_000  # a panel of heavy examples (sounds) shows fewer
_BATCH = 256


@dataclass(frozen=True)
class Shelf:
    """Held-out examples of one task that could be read.

    Attributes:
      values: by modality, each example's value as a person would give it, `[N]`.
      concept: which examples belong together, `[N]`.
      unreadable: how many could not be read.
      total: examples of the split.
      credits: whom the data asks to name.
    """

    values: Mapping[str, list[Any]]
    concept: np.ndarray
    unreadable: int
    total: int
    credits: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What one query retrieves.

    Attributes:
      query: its example.
      found: the examples it retrieves, the most similar first.
      right: whether each is of the query's concept.
      place: that of the first right one among all candidates, from 1; as in the recall, a wrong
        one that is as similar stands before it.
    """

    query: int
    found: list[int]
    right: list[bool]
    place: int | None


def galleries(model: Embedder, count: int) -> Iterator[Html]:
    """The panels of each task whose evaluators retrieve between two modalities, by split.

    Args:
      model: a trained run.
      count: queries of a panel.

    Raises:
      UserError: held-out data is not there.
    """
    for task in model.tasks.values():
        for name, evaluator in retrievals(task).items():
            where = f"tasks.{task.name}.evaluators.{name}.source"
            source = configs.component("sources", evaluator.source, where)
            shelf = read_shelf(source.open(), task, getattr(evaluator, "concept"))  # noqa: B009
            unique = getattr(evaluator, "unique", "")
            yield gallery(model, task, shelf, f"{task.name}, {source.label}", unique, count)


def gallery(model: Embedder, task: Task, shelf: Shelf, title: str, unique: str, count: int) -> Html:
    """Both directions of one task on one split.

    Args:
      model: gives vectors, as `Embedder.embed` does.
      task: embeds two modalities.
      shelf: held-out examples, perhaps none.
      title: the heading.
      unique: the modality of which only the first example of each concept is a candidate.
      count: queries of each direction.
    """
    head = (tag("h3", title), tag("p", _remark(shelf), class_="remark"))
    if not len(shelf.concept):
        return tag("div", *head, class_="gallery")
    vectors = {m: _embedded(model, task.name, m, values) for m, values in shelf.values.items()}
    one, two = task.objective.embeds()
    panels = (
        _panel(task, shelf, vectors, q, c, unique, count) for q, c in ((one, two), (two, one))
    )
    said = tag("p", "Shown here: " + " ".join(shelf.credits), class_="remark")
    return tag("div", *head, *panels, said if shelf.credits else None, class_="gallery")


def retrievals(task: Task) -> dict[str, Evaluator]:
    """Its evaluators that embed two modalities of the same examples, which a concept joins."""
    wanted = {f"embed/{modality}" for modality in task.objective.embeds()}
    found = {}
    for name, evaluator in make_evaluators(task).items():
        passes = list(evaluator.passes(task).values())
        is_of_pairs = len(wanted) == 2 and {each.what for each in passes} == wanted
        if is_of_pairs and all(each.block == evaluator.source for each in passes):
            found[name] = evaluator
    return {name: each for name, each in found.items() if hasattr(each, "concept")}


def read_shelf(examples: Examples, task: Task, concept: str) -> Shelf:
    """Up to 2048 examples, spread over the split; what cannot be read or decoded is counted."""
    pair = task.objective.embeds()
    values: dict[str, list[Any]] = {modality: [] for modality in pair}
    concepts, unreadable = [], 0
    for index in spread(len(examples), _MOST_READ):
        try:
            example = examples[index]
            for modality in pair:
                task.inputs[modality].preprocess(example, None)
        except UserError:
            raise
        except Exception:  # whatever a corrupt record makes a reader or a decoder raise
            unreadable += 1
            continue
        concepts.append(int(example[concept]))
        for modality in pair:
            each = task.inputs[modality]
            values[modality].append(as_given(each, example[each.field]))
    credits = tuple(getattr(examples, "credits", ()))
    return Shelf(values, np.array(concepts, np.int64), unreadable, len(examples), credits)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def answers(
    queries_QE: np.ndarray,
    candidates_CE: np.ndarray,
    query_ids: Sequence[int],
    candidate_ids: Sequence[int],
    concept: np.ndarray,
) -> list[Answer]:
    """The nearest candidates of each query by inner product; rows belong to the examples `*_ids`."""
    made = []
    concepts_C = concept[np.asarray(candidate_ids)]
    for query, similarity_C in zip(query_ids, queries_QE @ candidates_CE.T, strict=True):
        positive_C = concepts_C == concept[query]
        order = np.argsort(-similarity_C, kind="stable")[:FOUND]
        place = None
        if positive_C.any():
            best = similarity_C[positive_C].max()
            place = int((~(similarity_C < best) & ~positive_C).sum()) + 1
        found = [int(candidate_ids[i]) for i in order]
        made.append(Answer(query, found, positive_C[order].tolist(), place))
    return made


def first_of_each(concept: np.ndarray) -> list[int]:
    """The first example of each concept."""
    return sorted(np.unique(concept, return_index=True)[1].tolist())


def _embedded(model: Embedder, task: str, modality: str, values: list[Any]) -> np.ndarray:
    """Vectors `[N, E]`, in batches of one size: one program, and little memory."""
    found = []
    for start in range(0, len(values), _BATCH):
        part = values[start : start + _BATCH]
        padded = part + part[:1] * (_BATCH - len(part))
        found.append(model.embed(task=task, **{modality: padded})[: len(part)])
    return np.concatenate(found)


def _remark(shelf: Shelf) -> str:
    read = len(shelf.concept)
    parts = [f"{shelf.total} held-out examples"]
    if read + shelf.unreadable < shelf.total:
        parts.append(f"{read + shelf.unreadable} of them, evenly spread, are candidates here")
    if shelf.unreadable:
        parts.append(f"{shelf.unreadable} could not be read")
    return "; ".join(parts) + "."


def _panel(
    task: Task,
    shelf: Shelf,
    vectors: Mapping[str, np.ndarray],
    query: str,
    candidate: str,
    unique: str,
    count: int,
) -> Html:
    """One direction: the queries, one of each concept, each with what it retrieves."""
    firsts = first_of_each(shelf.concept)
    queries = [firsts[i] for i in spread(len(firsts), count)]
    candidates = firsts if candidate == unique else list(range(len(shelf.concept)))
    found = answers(
        vectors[query][queries], vectors[candidate][candidates], queries, candidates, shelf.concept
    )
    hits = sum(any(answer.right) for answer in found)
    said = (
        f"{hits} of {len(found)} have a right one among the {FOUND} nearest of {len(candidates)}."
    )
    cards = _within(found, lambda answer: _card(task, shelf, query, candidate, answer))
    head = tag("h4", f"{query} to {candidate}")
    return tag("div", head, tag("p", said), tag("ul", *cards, class_="cards"))


def _within(found: Sequence[Answer], card: Callable[[Answer], Html]) -> list[Html]:
    """Cards of all answers, or of fewer, evenly spread, where they would make the page too heavy."""
    cards = [card(answer) for answer in found]
    for count in (len(cards), 6, 4, 2, 1):
        chosen = [cards[i] for i in spread(len(cards), count)]
        if sum(len(each) for each in chosen) <= _PANEL_BYTES:
            return chosen
    return chosen


def _card(task: Task, shelf: Shelf, query: str, candidate: str, answer: Answer) -> Html:
    items = []
    for i, right in zip(answer.found, answer.right, strict=True):
        mark = tag("span", tag("span", "right"), class_="mark") if right else None
        picture = _show(task, shelf, candidate, i)
        # A sound says nothing to the eye.
        said = _words(task, shelf, candidate, i) if picture.startswith("<audio") else None
        said = tag("span", said, dir="auto", class_="said") if said else None
        items.append(tag("li", picture, said, mark, class_="right" if right else None))
    late = None
    if answer.place and not any(answer.right):
        wanted = shown(task.inputs[candidate], shelf.values[candidate][answer.query])
        words = preview(wanted, "") if isinstance(wanted, str) else "the first right one"
        late = tag("p", words, f" comes at place {answer.place}", class_="late")
    asked = tag("div", _show(task, shelf, query, answer.query), class_="query")
    return tag("li", asked, tag("ol", *items, class_="found"), late)


def _show(task: Task, shelf: Shelf, modality: str, index: int) -> Html:
    """An example's preview; what the other modality says in words describes it."""
    words = _words(task, shelf, modality, index)
    label = f"{modality}: {words}" if words else f"{modality} {index}"
    return preview(shown(task.inputs[modality], shelf.values[modality][index]), label)


def _words(task: Task, shelf: Shelf, modality: str, index: int) -> str | None:
    """The text of an example in its other modality, if that is text."""
    for other, values in shelf.values.items():
        if other != modality:
            value = shown(task.inputs[other], values[index])
            return value if isinstance(value, str) else None
    return None

"""Predictions of a trained model on held-out examples: the likeliest classes of each, and its usual mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mmjax.engine.loader import make_batch
from mmjax.evaluators.accuracy import rank
from mmjax.evaluators.base import Pass, Predict, make_evaluators, row_spec
from mmjax.loading import TrainedModel
from mmjax.monitor.tables import percent
from mmjax.objectives.base import Classifies, able, with_rows
from mmjax.report.html import Html, bar, join, table, tag
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
from mmjax.report.preview import as_given, preview, shown
from mmjax.sources.base import Examples
from mmjax.task import Task

_MISTAKES = 6  # shown of a split


@dataclass(frozen=True)
class Guesses:
    """Predictions for the readable examples of a split.

    Attributes:
      index: their places in the split, `[N]`.
      label: their classes, `[N]`.
      logits: float32 `[N, C]`.
      unreadable: how many could not be read.
    """

    index: np.ndarray
    label: np.ndarray
    logits: np.ndarray
    unreadable: int


def classified(model: TrainedModel, task: Task, count: int) -> Iterator[Panel]:
    """Yield a panel for each split on which an evaluator compares predicted classes with a label.

    Args:
      model: a trained run.
      task: of it.
      count: examples of a panel, of as many classes.

    Raises:
      UserError: held-out data is not there.
    """
    for evaluator in make_evaluators(task).values():
        for pass_ in evaluator.passes(task).values():
            if isinstance(pass_.computation, Predict) and len(pass_.fields) == 1:
                examples = pass_.source.open()
                guessed = guesses(model, task, pass_, examples)
                yield panel(task, pass_, examples, guessed, count)


def guesses(model: TrainedModel, task: Task, pass_: Pass, examples: Examples) -> Guesses:
    """Read up to 2048 examples, spread over the split, and return their logits; unreadable ones are counted."""
    spec = row_spec(task, pass_)
    predict = model.compiled(able(task.objective, Classifies).predict)
    ids = np.array(spread(len(examples), MOST_READ))
    logits, labels, valid = [], [], []
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        rows, _ = make_batch(spec, examples, part.tolist(), lambda _: None, BATCH)
        logits.append(jax.device_get(predict(with_rows(rows).inputs))[: len(part)])
        labels.append(rows.fields[pass_.fields[0]][: len(part)])
        valid.append(rows.valid[: len(part)])
    is_valid = np.concatenate(valid)
    return Guesses(
        ids[is_valid],
        np.concatenate(labels)[is_valid],
        np.concatenate(logits)[is_valid],
        int((~is_valid).sum()),
    )


def panel(task: Task, pass_: Pass, examples: Examples, guessed: Guesses, count: int) -> Panel:
    """Return a panel of examples of different classes, each with its likeliest classes; then the usual mistakes."""
    names = examples.labels.get(pass_.fields[0], ())
    read = read_of(len(examples), len(guessed.index), guessed.unreadable)
    title = f"{pass_.source.label}: {read}"
    if not len(guessed.index):
        return Panel(title, Html(""))
    firsts = first_of_each(guessed.label)
    chosen = [firsts[i] for i in spread(len(firsts), count)]
    place_N = rank(guessed.logits, guessed.label) + 1
    hits = int((place_N[chosen] <= FOUND).sum())
    classes = guessed.logits.shape[1]
    caption = f"{hits} of {len(chosen)} have the right one among the {FOUND} likeliest of {classes} classes."
    cards = fit_to_budget(
        chosen, lambda i: _card(task, examples, guessed, i, int(place_N[i]), names)
    )
    body = (
        tag("p", caption),
        tag("ul", *cards, class_="cards of-words"),
        mistakes(guessed, names),
    )
    return Panel(title, join(body), examples.credits)


def mistakes(guessed: Guesses, names: Sequence[str]) -> Html | None:
    """Return the classes that are most often taken for one other class; None where none is so twice."""
    guess_N = guessed.logits.argmax(axis=1)
    wrong_N = guess_N != guessed.label
    pairs = Counter(zip(guessed.label[wrong_N].tolist(), guess_N[wrong_N].tolist(), strict=True))
    sizes = Counter(guessed.label.tolist())
    rows = [
        (_name(names, label), _name(names, guess), f"{times}", f"{sizes[label]}")
        for (label, guess), times in pairs.most_common(_MISTAKES)
        if times > 1
    ]
    heads = ("class", "taken for", "#times", "#of")
    return table("Most often taken for another class", heads, rows) if rows else None


def _card(
    task: Task, examples: Examples, guessed: Guesses, row: int, place: int, names: Sequence[str]
) -> Html:
    """Return an example, its class, and the classes that the model finds likeliest."""
    label, logits_C = int(guessed.label[row]), guessed.logits[row].astype(np.float64)
    share_C = np.exp(logits_C - logits_C.max())
    share_C /= share_C.sum()
    items = []
    for guess in np.argsort(-logits_C, kind="stable")[:FOUND].tolist():
        mark = right_mark() if guess == label else None
        words = tag("span", _name(names, guess), class_="words")
        share = tag("span", percent(share_C[guess]), class_="share")
        line = (words, mark, share, bar(share_C[guess], "c7"))
        items.append(tag("li", *line, class_="right" if mark else None))
    late = tag("p", f"The right one comes at place {place}", class_="late")
    asked = tag("div", _example(task, examples, int(guessed.index[row]), _name(names, label)),
                tag("span", _name(names, label), class_="words"), class_="query")  # fmt: skip
    return tag(
        "li", asked, tag("ol", *items, class_="found guesses"), late if place > FOUND else None
    )


def _example(task: Task, examples: Examples, index: int, words: str) -> Html:
    """Return the inputs that the objective reads of an example; two views of one field are shown once."""
    by_field = {
        task.inputs[m].field: task.inputs[m]
        for m in reversed(able(task.objective, Classifies).predicts())
    }
    example = examples[index]
    return join(
        preview(shown(input_, as_given(input_, example[field])), f"{input_.name}: {words}")
        for field, input_ in reversed(by_field.items())
    )


def _name(names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number where the data has none."""
    return names[label] if 0 <= label < len(names) else f"class {label}"

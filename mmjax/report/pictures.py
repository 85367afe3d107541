"""Pictures that an objective draws from held-out examples, such as masked ones filled in again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.engine.loader import make_batch
from mmjax.evaluators.base import LossOf, Write, make_evaluators
from mmjax.loading import TrainedModel
from mmjax.objectives.base import Shows, able, with_rows, written
from mmjax.report.html import Html, tag
from mmjax.report.panel import Panel, read_of, spread
from mmjax.report.preview import preview
from mmjax.sources.base import Examples
from mmjax.task import Task

_MOST = 8  # examples side by side


def pictured(model: TrainedModel, task: Task, count: int) -> Iterator[Panel]:
    """Yield a panel for each held-out split on which an objective that shows something takes its loss or writes.

    Args:
      model: a trained run.
      task: of it.
      count: examples of a panel, of which there are at most 8.

    Raises:
      UserError: held-out data is not there.
    """
    if not isinstance(task.objective, Shows) or not task.objective.shows():
        return
    for evaluator in make_evaluators(task).values():
        for pass_ in evaluator.passes(task).values():
            if isinstance(pass_.computation, LossOf | Write):
                examples = pass_.source.open()
                yield panel(model, task, examples, pass_.source.label, min(count, _MOST))


def panel(model: TrainedModel, task: Task, examples: Examples, split: str, count: int) -> Panel:
    """Return a row for each thing that the objective shows, a column for each example."""
    ids = spread(len(examples), count)
    batch, failed = make_batch(task.rows(), examples, ids, lambda _: None, len(ids))
    title = f"{split}: {read_of(len(examples), len(ids) - len(failed), len(failed))}"
    objective = able(task.objective, Shows)
    show = model.compiled(lambda m, rows: objective.show(m, with_rows(rows), jax.random.key(0)))
    outputs: Mapping[str, np.ndarray] = jax.device_get(show(batch))
    valid_rows = np.flatnonzero(batch.valid).tolist()
    names = [name for name in objective.shows() if name in outputs]
    rows = [_row(name, _readable(task, outputs[name]), valid_rows) for name in names]
    caption = tag("caption", f"{len(valid_rows)} held-out examples side by side")
    frame = tag("table", caption, tag("tbody", *rows), class_="pictures")
    return Panel(title, tag("div", frame, class_="scroll", tabindex="0"), examples.credits)


def _readable(task: Task, values: np.ndarray) -> Sequence[Any]:
    """Return token ids as words, pictures and clips as they are."""
    if values.ndim > 2:
        return list(values)
    text: Any = task.inputs[written(task.objective)[1]].modality
    return [text.words(ids) for ids in values]


def _row(name: str, values: Sequence[Any], columns: list[int]) -> Html:
    cells = (tag("td", preview(values[i], f"{name}, example {i + 1}")) for i in columns)
    return tag("tr", tag("th", name, scope="row"), *cells)

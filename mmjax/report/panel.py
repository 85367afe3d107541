"""Common parts of the panels of held-out examples: which examples, how many, and their frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmjax.report.html import Html, tag

EXAMPLES = 12  # of a panel
FOUND = 5  # answers to each
MOST_READ = 2048  # examples of a split that are candidates
BATCH = 256
_BYTES = 2_000_000  # a panel of heavy examples (sounds) shows fewer

T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    """One task's panel on one held-out split.

    Attributes:
      title: the split, and what is shown of it.
      body: the examples.
      credits: those whom the data's licences require to be named.
    """

    title: str
    body: Html
    credits: tuple[str, ...] = ()


def task_section(heading: Html, panels: Sequence[Panel]) -> Html:
    """Return a task's panels under its heading: each can be folded, and only the first is unfolded."""
    folded = (
        tag("details", tag("summary", panel.title), panel.body, open=None if i else "")
        for i, panel in enumerate(panels)
    )
    return tag("div", tag("h3", heading), *folded, class_="gallery") if panels else Html("")


def credit_line(panels: Iterable[Panel]) -> Html | None:
    """Return the credits that the panels' data asks for, each once."""
    named = list(dict.fromkeys(credit for panel in panels for credit in panel.credits))
    return tag("p", "Shown here: " + " ".join(named), class_="remark") if named else None


def read_of(total: int, read: int, unreadable: int) -> str:
    """Return a note on how much of a split was read."""
    parts = [f"{total:,} held-out examples"]
    if read + unreadable < total:
        parts.append(f"{read + unreadable:,} of them, evenly spread, are read here")
    if unreadable:
        parts.append(f"{unreadable:,} could not be read")
    return "; ".join(parts)


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


def first_of_each(kind: np.ndarray) -> list[int]:
    """Return the first example of each kind."""
    return sorted(np.unique(kind, return_index=True)[1].tolist())


def fit_to_budget(items: Sequence[T], card: Callable[[T], Html]) -> list[Html]:
    """Return the cards of all, or of fewer, evenly spread, if they would make the page too heavy."""
    cards = [card(item) for item in items]
    for count in (len(cards), 6, 4, 2, 1):
        chosen = [cards[i] for i in spread(len(cards), count)]
        if sum(len(item) for item in chosen) <= _BYTES:
            return chosen
    return chosen


def right_mark() -> Html:
    """Return the mark of an answer that is right, with the word for those who do not see it."""
    return tag("span", tag("span", "right"), class_="mark")

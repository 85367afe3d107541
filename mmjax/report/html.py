"""HTML that is safe by construction: what is not `Html` already is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mmjax.monitor.tables import without_control_codes

_VOID = ("br", "img", "link", "meta", "source")


class Html(str):
    """Text that is HTML. All that comes from data becomes such by `text` and `tag` only."""

    __slots__ = ()


Child = str | None


def text(value: str) -> Html:
    """Return `value` escaped for elements and attributes, without control codes and lone surrogates."""
    clean = without_control_codes(value).encode("utf-8", "replace").decode()
    return Html(escape(clean, quote=True))


def join(children: Iterable[Child]) -> Html:
    """Return the children one after another; those that are not `Html` are escaped, None is skipped."""
    return Html("".join(c if isinstance(c, Html) else text(c) for c in children if c is not None))


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """Return an element.

    Args:
      name: of the element.
      *children: `Html` as it is, other text escaped, None skipped.
      **attributes: `class_` is `class` and `aria_label` is `aria-label`; None is skipped, and
        the empty text gives an attribute without value.
    """
    attributes_text = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + (f'="{text(str(value))}"' if value != "" else "")
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _VOID else f"</{name}>"
    return Html(f"<{name}{attributes_text}>{join(children)}{end}")


def number(shown: str, value: float | None) -> Html:
    """Return a number as people read it, with the exact one beside it for machines."""
    return tag("data", shown, value="" if value is None else repr(value))


def bar(fraction: float, colour: str = "", ticks: Mapping[str, float] | None = None) -> Html:
    """Return a bar of `fraction` of its track, for the eye only: the number is beside it.

    Args:
      fraction: cut to [0, 1]; nothing where it is not finite.
      colour: a class.
      ticks: marks on the track, by their class.
    """
    fill = tag("span", class_=f"fill {colour}".strip(), style=f"width:{_percent(fraction)}")
    marks = (
        tag("span", class_=f"tick {name}", style=f"left:{_percent(at)}")
        for name, at in (ticks or {}).items()
    )
    return tag("span", fill, *marks, class_="bar", aria_hidden="true")


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0:.2f}%"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]]) -> Html:
    """Return a table whose first column names the rows; wide ones scroll within their own frame.

    A head that begins with `#` is that of a column of numbers, which stand to the right.
    """
    return grouped_table(caption, heads, {"": rows})


def grouped_table(
    caption: str, heads: Sequence[str], groups: Mapping[str, Iterable[Sequence[Child]]]
) -> Html:
    """Return a table with its rows in groups, see `table`; a group with an empty name has no line for it."""
    kinds = ["n" if head.startswith("#") else None for head in heads]
    head = (
        tag("th", head.removeprefix("#"), scope="col", class_=kind)
        for head, kind in zip(heads, kinds, strict=True)
    )
    bodies = []
    for name, rows in groups.items():
        line = tag("tr", tag("th", name, scope="rowgroup", colspan=len(heads))) if name else None
        bodies.append(tag("tbody", line, *(_row(row, kinds) for row in rows)))
    element = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), *bodies)
    return tag("div", element, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _row(cells: Sequence[Child], kinds: Sequence[str | None]) -> Html:
    first = tag("th", cells[0], scope="row")
    others = zip(cells[1:], kinds[1:], strict=True)
    return tag("tr", first, *(tag("td", cell, class_=kind) for cell, kind in others))


def section(title: str, *children: Child) -> Html:
    """Return a section under a heading; nothing where it has no content."""
    body = join(children)
    return tag("section", tag("h2", title), body) if body else Html("")

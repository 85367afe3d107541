"""Routing of tokens to experts: heat maps of each layer and modality over a run, for its report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from mmjax.monitor.metrics import in_use
from mmjax.monitor.tables import percent
from mmjax.report.data import Run, Visits
from mmjax.report.html import Child, Html, join, table, tag
from mmjax.report.parts import named
from mmjax.report.preview import data_uri, encoded

_BINS = 48  # columns of a heat map at most
_CELL = 5  # pixels of the side of a cell
_INK = (42, 111, 201)
_LATE = 0.1  # the part of the visits that counts as the end


def routing(run: Run) -> Iterator[Html]:
    """Yield, for each task with experts, a table of their final use, and heat maps of how it developed."""
    for name, visits in run.tasks.items():
        if visits.usage:
            yield tag("h3", named(run, name))
            yield _table(visits)
            yield tag("div", *_maps(visits), class_="grid maps")
    if any(visits.usage for visits in run.tasks.values()):
        yield tag(
            "p",
            "A heat map has a row for each expert, the first on top, and time from left to right; darker means a "
            "larger fraction of the modality's tokens. A uniform distribution is half dark. Experts in use: exp of the "
            "entropy of these fractions.",
            class_="remark",
        )


def _table(visits: Visits) -> Html:
    rows: list[Sequence[Child]] = []
    for (layer, modality), shares_VE in _of(visits).items():
        late_E = _late(shares_VE)
        rows.append(
            (
                f"layer {layer}", modality, f"{in_use(late_E):.1f} of {len(late_E)}",
                percent(float(late_E.max())), str(int(late_E.argmax())),
            )
        )  # fmt: skip
    heads = ("", "modality", "#experts in use", "#share of the most used", "#its index")
    result = table("At the end", heads, rows)
    left = {
        key.removeprefix("dropped "): values
        for key, values in visits.values.items()
        if key.startswith("dropped ")
    }
    if not left:
        return result
    shares = (f"{percent(_mean(values))} of {modality}" for modality, values in left.items())
    words = f"Tokens without an expert at the end, over all layers: {', '.join(shares)}."
    return join([result, tag("p", words, class_="remark")])


def _maps(visits: Visits) -> Iterator[Html]:
    for (layer, modality), shares_VE in _of(visits).items():
        label = f"Layer {layer}, {modality}: each expert's part of the tokens over {len(shares_VE)} visits"
        picture = tag(
            "img", src=data_uri("image/png", heat_map(shares_VE)), alt=label, class_="map"
        )
        caption = tag("figcaption", tag("p", f"layer {layer}, {modality}"))
        yield tag("figure", caption, picture)


def heat_map(shares_VE: np.ndarray) -> bytes:
    """Return a PNG: a row of cells for each expert, time from left to right; half dark at 1 / E, dark from 2 / E on."""
    bins = np.array_split(shares_VE, min(_BINS, len(shares_VE)))
    shares_EC = np.stack([part.mean(axis=0) for part in bins], axis=1)
    dark = np.clip(shares_EC * len(shares_EC) / 2, 0, 1)
    pixels = np.empty((*dark.shape, 4), np.uint8)
    pixels[..., :3] = _INK
    pixels[..., 3] = np.round(255 * dark)
    return encoded(Image.fromarray(np.kron(pixels, np.ones((_CELL, _CELL, 1), np.uint8))))


def _of(visits: Visits) -> Mapping[tuple[int, str], np.ndarray]:
    """Return shares `[V, E]` by layer and modality, of the visits that logged them."""
    usage: dict[tuple[int, str], np.ndarray] = defaultdict(lambda: np.zeros((0, 0)))
    for key, shares_VE in visits.usage.items():
        layer, _, modality = key.partition(" ")
        usage[int(layer), modality] = shares_VE
    return dict(sorted(usage.items()))


def _late(shares_VE: np.ndarray) -> np.ndarray:
    late_E: np.ndarray = shares_VE[-max(1, round(_LATE * len(shares_VE))) :].mean(axis=0)
    return late_E


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(_late(finite[:, None])[0])

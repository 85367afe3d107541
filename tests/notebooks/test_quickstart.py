"""The notebook, executed as a user would on a small run, and what it shows."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from etils import epath
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

import mmjax
from mmjax.core import config as configs
from mmjax.datasets.speech import speak
from mmjax.loading import TrainedModel
from mmjax.sources.tfds import Tfds

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "notebooks" / "quickstart.ipynb"
CONFIG = ROOT / "tests" / "configs" / "quickstart_tiny.py"
TASK, STEPS, BATCH = "masked_image", 20, 8
LIMIT = 600  # seconds of a cell, after which it is stuck

Environment = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def run(quickstart_run: epath.Path) -> Path:
    """Return a finished run of all six tasks, which other tests read too."""
    return Path(quickstart_run)


def execute(notebook: NotebookNode, environment: Mapping[str, str]) -> NotebookNode:
    """Execute every cell in turn, where the notebook lies; the first that raises raises here."""
    resources = {"metadata": {"path": str(PATH.parent)}}
    # Its own limits for a kernel to start and to answer are those of an idle machine.
    client = NotebookClient(
        notebook, timeout=LIMIT, startup_timeout=LIMIT, iopub_timeout=60, kernel_name="python3",
        resources=resources,
    )  # fmt: skip
    return client.execute(env=dict(environment))


@pytest.fixture(scope="module")
def before(run: Path) -> dict[str, bytes]:
    """Return the files of the run as training left them."""
    return contents(run)


@pytest.fixture(scope="module")
def executed(run: Path, before: Any, environment_of: Environment) -> NotebookNode:
    return execute(read(), environment_of(1, {"MMJAX_RUN": str(run)}))


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return mmjax.load(str(run))


def read() -> NotebookNode:
    return nbformat.read(PATH, nbformat.NO_CONVERT)


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- what a notebook shows ---------------------------------------------------------------------


def cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(notebook: NotebookNode, words: str) -> NotebookNode:
    [cell] = [cell for cell in cells(notebook) if words in cell.source]
    return cell


def data(cell: NotebookNode, kind: str) -> list[str]:
    """Return the outputs of a cell that have a representation of this MIME type."""
    return [o.data[kind] for o in cell.outputs if "data" in o and kind in o.data]


def said(cell: NotebookNode) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def table(cell: NotebookNode) -> list[list[str]]:
    """Return the rows of its Markdown table, without the head."""
    [markdown] = data(cell, "text/markdown")
    rows = [line.strip("| ").split(" | ") for line in markdown.strip().splitlines()]
    assert set(rows[1][0]) <= set(":-|"), markdown
    return rows[2:]


def unpacked(html: str) -> str:
    """Return what treescope shows: the page holds it compressed, and a browser unpacks it."""
    packed = re.findall(r'<script type="application/octet-stream"\s*>([\w+/=\s]+)</script>', html)
    return "".join(zlib.decompress(base64.b64decode(each)).decode() for each in packed)


def colours(picture: str) -> int:
    """Return how many colours a PNG has."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    return len(np.unique(np.asarray(image).reshape(-1, 3), axis=0))


def faults(notebook: NotebookNode) -> list[str]:
    """Return what an executed notebook lacks, or shows and should not."""
    found = []
    for cell in cells(notebook):
        first = cell.source.splitlines()[0]
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{first}: {output.get('text') or output.get('evalue')}")
        found += [f"{first}: a blank figure" for p in data(cell, "image/png") if colours(p) < 3]
    figures = sum(len(data(cell, "image/png")) for cell in cells(notebook))
    return found + ([f"{figures} figures"] if figures != 5 else [])


# --- the notebook as it is kept ----------------------------------------------------------------


def test_it_is_kept_without_outputs():
    nbformat.validate(read())
    assert [(c.outputs, c.execution_count) for c in cells(read())] == [([], None)] * len(
        cells(read())
    )


def test_it_loads_a_run_in_three_lines():
    lines = [line for line in cell_with(read(), "mmjax.load(RUN)").source.splitlines() if line]
    assert len(lines) == 3 and "model.embed" in lines[2]


def test_the_run_is_the_quickstart_but_for_sizes():
    tiny, whole = (
        configs.read_file(str(CONFIG)),
        configs.read_file(str(ROOT / "configs" / "quickstart.py")),
    )
    assert list(tiny["tasks"]) == list(whole["tasks"]) and tiny["modalities"] == whole["modalities"]
    for name, task in whole["tasks"].items():
        assert tiny["tasks"][name]["objective"]["name"] == task["objective"]["name"]
        assert tiny["tasks"][name]["weight"] == task["weight"]


# --- the notebook, executed --------------------------------------------------------------------


def test_every_cell_runs_quietly_and_shows_its_figures(executed):
    assert faults(executed) == []


def test_a_fault_would_be_seen(executed):
    """Positive control: of the test above."""
    spoilt = copy.deepcopy(executed)
    with_figure = [c for c in cells(spoilt) if data(c, "image/png")]
    with_figure[0].outputs = (
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        *with_figure[0].outputs,
    )
    blank = io.BytesIO()
    Image.new("RGB", (4, 4), "white").save(blank, "PNG")
    shown = next(o for o in with_figure[1].outputs if "image/png" in o.get("data", {}))
    shown.data["image/png"] = base64.b64encode(blank.getvalue()).decode()
    with_figure[2].outputs = []
    found = [fault for fault in faults(spoilt) if fault not in faults(executed)]
    assert len(found) == 3 and "a warning" in found[0], found
    assert "blank" in found[1] and found[2] == "4 figures"


def assert_nearest(shown: list[list[str]], query: np.ndarray, model: TrainedModel) -> None:
    """Check that the rows shown are the captions nearest to the query, in order."""
    captions = [example["caption"] for example in Tfds("emoji", "test_drawing").open()]
    similarity = dict(zip(captions, model.embed(text=captions) @ query, strict=True))
    numbers = [float(number) for _, number in shown]
    assert len(shown) == 5 and numbers == sorted(numbers, reverse=True)
    best = sorted(similarity.values())[-5]
    for (caption, _), number in zip(shown, numbers, strict=True):
        assert similarity[caption] == pytest.approx(number, abs=0.006)
        assert similarity[caption] > best - 1e-4


def test_the_captions_of_the_picture_are_the_nearest(executed, model):
    [png] = data(cell_with(executed, "ImageDraw.Draw"), "image/png")
    [query] = model.embed(image=[base64.b64decode(png)])
    assert_nearest(table(cell_with(executed, "embed(image=[picture])")), query, model)


def test_the_captions_of_the_sound_are_the_nearest(executed, model):
    [query] = model.embed(spectrogram=[speak("grinning face")])
    shown = table(cell_with(executed, "embed(spectrogram=[(samples, rate)])"))
    assert_nearest(shown, query, model)
    with pytest.raises(AssertionError):
        assert_nearest(shown[::-1], query, model)


def test_the_sound_can_be_played(executed):
    [html] = data(cell_with(executed, "Audio("), "text/html")
    encoded = re.search(r'src="data:audio/wav;base64,([^"]+)"', html)
    assert encoded and base64.b64decode(encoded[1])[:4] == b"RIFF"


def test_the_tree_shows_the_parts_of_the_model(executed, model):
    [html] = data(cell_with(executed, "treescope.show"), "text/html")
    shown = unpacked(html)
    total = sum(p.size for p in model.parameters.values())
    for words in ("ImageStem", "WaveformStem", "Trunk", "Decoder", f"{total:,}"):
        assert words in shown, words


def test_one_task_goes_on_where_it_stood(executed, run, model):
    positions = model.positions[TASK]
    [was, now] = table(cell_with(executed, "held-out loss"))
    assert was[:3] == ["before", f"{model.step}", f"{positions}"]
    assert now[:3] == ["after", f"{model.step + STEPS}", f"{positions + STEPS * BATCH}"]
    [before] = [r for r in json.loads((run / "results.json").read_text()) if r["task"] == TASK]
    assert float(was[3]) == pytest.approx(before["value"], abs=6e-5)
    assert float(now[3]) < float(was[3])
    words = said(cell_with(executed, "train(config"))
    assert f"Resuming from step {model.step}" in words
    assert re.search(rf"^ *{model.step + STEPS} +\d", words, re.MULTILINE), words


def test_the_run_itself_is_left_alone(executed, before, run):
    assert contents(run) == before


def test_a_run_that_is_not_there_stops_it(run, environment_of):
    """Positive control: a cell that fails does fail the execution, and the error is the user's."""
    with pytest.raises(CellExecutionError, match="No checkpoint in '.*nowhere'. Train first"):
        execute(read(), environment_of(1, {"MMJAX_RUN": str(run.parent / "nowhere")}))


def test_a_broken_cell_stops_it(environment_of):
    """Positive control: the rest does not run, nor pass for whole."""
    notebook = read()
    notebook.cells = [nbformat.v4.new_code_cell("vectors = model.embed(")]
    with pytest.raises(CellExecutionError, match="SyntaxError"):
        execute(notebook, environment_of(1))

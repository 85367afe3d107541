"""The report of a run of the quickstart's six tasks: each has its panel, and the page looks right."""

import base64
import io
import re
import shutil
import wave
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mmjax.report.page import write_report
from mmjax.sources.tfds import Tfds

Parse = Callable[[str], Any]
TASKS = ("image_text", "video_text", "speech_text", "image_classes", "instruments", "masked_image")
MOST_BYTES = 6_000_000  # with the usual number of examples
EXAMPLES = 4


@pytest.fixture(scope="module")
def written(quickstart_run: epath.Path, tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    copy = tmp_path_factory.mktemp("report") / "six tasks"
    shutil.copytree(quickstart_run, copy)
    return write_report(epath.Path(copy), EXAMPLES)


@pytest.fixture(scope="module")
def page(parse: Parse, written: epath.Path) -> Any:
    return parse(written.read_text())


@pytest.fixture(scope="module")
def panels(parse: Parse, written: epath.Path) -> dict[str, Any]:
    """Return the part of the page with each task's held-out examples."""
    parts = written.read_text().split('<div class="gallery">')[1:]
    result = {}
    for part in parts:
        name = re.search(r"<span>(\w+)</span>", part)
        assert name
        # To the end of the part that can be parsed alone: what follows belongs to the page.
        result[name[1]] = part.partition('<p class="remark">Shown here')[0]
    return result


def test_every_task_has_losses_results_and_held_out_examples(
    page: Any, panels: dict[str, Any]
) -> None:
    page.assert_is_harmless()
    assert set(panels) == set(TASKS)
    assert not [p for p in page.all("p") if p.get("class") == "none"], "something is missing"
    for task in TASKS:
        assert len(page.points(f"Loss of {task} ", "line raw")) >= 2
        assert len(page.points(f"Loss of {task} ", "line flat")) >= 2
    tiles = [d for d in page.all("div") if d.get("class") == "tile"]
    assert len(tiles) == len(TASKS)


def test_it_is_one_file_of_bearable_size(written: epath.Path) -> None:
    assert written.stat().length < MOST_BYTES * EXAMPLES / 12


def _images(part: str, pattern: str) -> list[Image.Image]:
    found = re.findall(rf'<img src="data:image/\w+;base64,([^"]+)"{pattern}', part)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_clips_move_and_the_asked_ones_lie_on_a_film_strip(panels: dict[str, Any]) -> None:
    clips = _images(panels["video_text"], ' alt="video: ')
    strips = _images(panels["video_text"], ' alt class="strip"')
    assert len(clips) == EXAMPLES * (1 + 5) and len(strips) == EXAMPLES
    assert all(getattr(clip, "n_frames", 1) == 8 for clip in clips)
    assert all(strip.size == (4 * 32 + 3 * 2, 32) for strip in strips)
    assert "moving" in panels["video_text"]


def test_speech_can_be_heard_and_seen(panels: dict[str, Any]) -> None:
    part = panels["speech_text"]
    players = re.findall(r'<audio src="data:audio/wav;base64,([^"]+)"', part)
    assert len(players) == EXAMPLES * (1 + 5)
    assert len(_images(part, ' alt class="spectrum"')) == len(players)
    with wave.open(io.BytesIO(base64.b64decode(players[0]))) as file:
        assert file.getframerate() == 11025 and file.getnframes() > 2000


@pytest.mark.parametrize(
    ("task", "dataset", "split", "field", "kind"),
    [
        ("image_classes", "emoji", "test_concept", "subgroup", "img"),
        ("instruments", "notes", "test_pitch", "program", "audio"),
    ],
)
def test_classes_are_named_and_five_guessed(
    panels: dict[str, Any], task: str, dataset: str, split: str, field: str, kind: str
) -> None:
    first = panels[task].split("<details")[1]
    names = set(Tfds(dataset, split).open().labels[field])
    cards = first.split('<div class="query">')[1:]
    assert len(cards) == EXAMPLES
    for card in cards:
        asked, *guesses = [
            re.sub("&#x27;", "'", found).replace("&amp;", "&")
            for found in re.findall(r'<span class="words">([^<]+)</span>', card)
        ]
        assert asked in names and f"<{kind} " in card
        assert len(set(guesses[:5])) == 5 and names.issuperset(guesses[:5])
        shares = [float(x) for x in re.findall(r'class="share">([\d.]+) %', card)]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
        assert (asked in guesses[:5]) == ('<li class="right">' in card)


def test_masked_pictures_stand_beside_what_is_seen_and_predicted(panels: dict[str, Any]) -> None:
    rows = panels["masked_image"].split('<th scope="row">')[1:]
    assert [row.partition("<")[0].split(",")[0] for row in rows] == [
        "picture", "what it sees", "what it predicts", "the means alone",
    ]  # fmt: skip
    pictures = [np.stack([np.asarray(p) for p in _images(row, " alt=")]) for row in rows]
    whole, seen, predicted, means = (rows.astype(float) for rows in pictures)
    assert whole.shape == (EXAMPLES, 32, 32, 3)
    hidden = (seen == 153).all(axis=3)
    assert hidden.reshape(EXAMPLES, -1).mean(axis=1) == pytest.approx(0.75, abs=0.05)
    for filled in (seen, predicted, means):
        assert (filled[~hidden] == whole[~hidden]).all()
        assert (filled[hidden] != whole[hidden]).any()
    assert (predicted[hidden] != means[hidden]).any()


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (400, "dark")])
def test_six_tasks_look_right_in_a_browser(
    browser: Any, written: epath.Path, width: int, scheme: str
) -> None:
    browser.assert_looks_right(written, width, scheme)
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") == width

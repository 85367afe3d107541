"""Check how the report shows which experts take which tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from harness import deterministic
from PIL import Image
from toyrun import run

from mmjax.monitor import metrics
from mmjax.report.data import read_run
from mmjax.report.html import Html
from mmjax.report.page import page
from mmjax.report.routing import heat_map

EXPERTS = (
    "model.layers=[{'repeat': 2, 'blocks': [{'name': 'transformer', 'num_heads': 2, 'mlp_dim': 8, 'experts': "
    "{'count': 3, 'router': {'name': 'expert_choice'}}}]}]"
)
CLASSES = "{'name': 'classification', 'modalities': ['toy'], 'classes': 5}"
WORDS = (
    EXPERTS, f"tasks.one.objective={CLASSES}", f"tasks.two.objective={CLASSES}", "tasks.one.evaluators={}",
    "tasks.two.evaluators={}", "checkpoint.every=4", "log.report=False",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("routing") / "run"
    run(workdir, *WORDS, "steps=8")
    return workdir


def test_lines_hold_each_layers_shares(finished: Path, tmp_path: Path) -> None:
    lines = [x for x in deterministic(finished) if x["kind"] == "train"]
    for line in lines:
        for layer in ("000", "001"):
            shares = line[f"usage {layer} toy"]
            assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=2e-4)
        assert 0 <= line["dropped toy"] <= 1
    # Interrupted and resumed, the same lines.
    run(tmp_path, *WORDS, "steps=4")
    run(tmp_path, *WORDS, "steps=8")
    assert [x for x in deterministic(tmp_path) if x["kind"] == "train"] == lines


def test_other_places_get_how_many_are_in_use() -> None:
    assert metrics.in_use(np.array([0.25] * 4)) == pytest.approx(4)
    assert metrics.in_use(np.array([1.0, 0.0])) == pytest.approx(1)
    assert metrics.in_use(np.zeros(3)) == 0
    p = np.array([0.5, 0.3, 0.2])
    assert metrics.in_use(p) == pytest.approx(np.prod(p**-p))


class Kept:
    """A sink that keeps what comes."""

    def __init__(self) -> None:
        self.scalars: dict[str, Any] = {}

    def add(self, step: int, scalars: Any) -> None:
        del step
        self.scalars |= scalars

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_a_list_is_one_number_elsewhere(tmp_path: Path) -> None:
    kept = Kept()
    writer = metrics.MetricWriter(epath.Path(tmp_path), 0, [kept])
    shares = np.array([0.5, 0.5, 0.0], np.float32)
    writer.write(0, "one", {"loss": 1.0, "usage 003 toy": shares, "bucket": "b"}, {})
    writer.close()
    assert kept.scalars == {"one/loss": 1.0, "one/experts in use 003 toy": pytest.approx(2)}
    [line] = metrics.read(epath.Path(tmp_path))
    assert line["usage 003 toy"] == [0.5, 0.5, 0.0] and line["bucket"] == "b"


def test_the_page_shows_every_layer(finished: Path) -> None:
    found = read_run(epath.Path(finished))
    shown = str(page(found, Html("")))
    section = shown.split("Routing")[1].split("</section>")[0]
    assert section.count('class="map"') == 2 * len(found.tasks)
    for layer in ("layer 0", "layer 1"):
        assert section.count(f"{layer}, toy") >= len(found.tasks)
    visits = found.tasks["one"]
    late = visits.usage["000 toy"][-1:].mean(axis=0)
    assert f"{metrics.in_use(late):.1f} of 3" in section


def test_a_run_without_experts_has_no_such_section(tmp_path: Path) -> None:
    run(tmp_path, "steps=2", "log.report=False")
    assert "Routing" not in str(page(read_run(epath.Path(tmp_path)), Html("")))
    assert not any("usage" in line for line in map(str, deterministic(tmp_path)))


def test_a_heat_map_is_dark_where_an_expert_has_much() -> None:
    shares = np.zeros((96, 4))
    shares[:48, 1], shares[48:] = 1.0, 0.25
    picture = np.asarray(Image.open(io.BytesIO(heat_map(shares))))
    dark = picture[2::5, 2::5, 3]  # one of each cell
    assert dark.shape == (4, 48)
    assert (dark[1, :24] == 255).all() and not dark[[0, 2, 3], :24].any()
    assert (dark[:, 24:] == 128).all()

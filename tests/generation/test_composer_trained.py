"""A run of Transfusion's recipe, made tiny: what it reports, and sequences that its loaded model makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toyrun

import mmjax
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.loading import TrainedModel
from mmjax.modalities.base import Input
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import ImageInput
from mmjax.objectives.transfusion import Transfusion

CONFIG = Path(__file__).parents[1] / "configs" / "transfusion_tiny.py"


@pytest.fixture(scope="module")
def trained(emoji_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("transfusion") / "run"
    toyrun.run(workdir, config=configs.read_file(str(CONFIG)))
    return workdir


def test_a_run_reports_each_part_of_its_loss_and_shows_what_it_draws(trained: Path) -> None:
    records = {r["name"]: r for r in json.loads((trained / "results.json").read_text())}
    assert set(records) == {
        "held-out loss", "held-out loss text", "held-out loss image",
        "caption loss", "caption match", "caption F1",
    }  # fmt: skip
    parts = [records[f"held-out loss{n}"]["value"] for n in ("", " text", " image")]
    assert parts[0] == pytest.approx(parts[1] + 5 * parts[2], rel=0.02)
    assert records["held-out loss image"]["chance"] == pytest.approx(1, rel=0.05)
    page = (trained / "report.html").read_text()
    table = page[page.index('class="pictures"') :]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>', table[: table.index("</table>")])
    assert rows == ["the text&#x27;s image", "drawn from the text"]


def test_a_loaded_run_writes_and_draws_in_turn(trained: Path) -> None:
    model = mmjax.load(str(trained))
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    drawn, text, more = model.compose(
        [("text", "red apple"), ("image", None), ("text", None), ("image", None)]
    )
    assert drawn.shape == more.shape == (16, 16, 3) and drawn.dtype == np.uint8
    assert isinstance(text, str) and (drawn != more).any()
    [again] = model.compose([("text", "red apple"), ("image", None)])
    # One level of 256 apart at most: another program sums in another order.
    assert np.abs(again.astype(int) - drawn.astype(int)).max() <= 1
    [other] = model.compose([("text", "red apple"), ("image", None)], seed=1)
    assert (other != drawn).any()
    assert model.compose([("image", picture), ("text", None)]) == model.caption(image=[picture])
    assert model.compose([("text", "red apple")]) == []


def test_a_guidance_of_ones_own(trained: Path) -> None:
    model = mmjax.load(str(trained))
    strong, plain = (
        model.compose([("text", "red apple"), ("image", None)], guidance=g)[0] for g in (1e5, 1.0)
    )
    assert (strong != plain).any()
    [alone] = model.compose([("image", None)], guidance=1)
    assert alone.shape == (16, 16, 3)
    with pytest.raises(
        UserError, match="guidance is 5, and nothing guides the generation of image"
    ):
        model.compose([("image", None)])


def test_a_caption_of_colours_is_no_text() -> None:
    """An objective that writes colours after texts: what it writes are no words."""
    colours = Input("colours", Colours(), ImageInput(size=4))
    objective = Transfusion(modalities=("text", "colours"), discrete=("colours", "text"))
    task = SimpleNamespace(name="draw", inputs={"colours": colours}, objective=objective)
    run: Any = SimpleNamespace(_inputs_of=lambda *_: (task, "text", []))
    with pytest.raises(UserError, match="Task 'draw' writes 'colours' of 'text', .* Use compose"):
        TrainedModel.caption(run, text=["red apple"])


def test_sequences_that_cannot_be(trained: Path) -> None:
    model = mmjax.load(str(trained))
    with pytest.raises(UserError, match="The run composes no sequence of: sound, text"):
        model.compose([("text", "dog"), ("sound", None)])
    with pytest.raises(UserError, match="no task 'caption'. Did you mean 'captions'"):
        model.compose([("text", None)], task="caption")
    with pytest.raises(UserError, match=r"image\[1\]"):
        model.compose([("text", "dog"), ("image", "dog")])

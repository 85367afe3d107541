"""Captions: tokens compared by hand, and what chance would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from hypothesis import given
from hypothesis import strategies as st

import mmjax
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.data.tokenizer import TokenIds
from mmjax.evaluators.base import Write
from mmjax.evaluators.captions import Captions, entropy, f1, match, texts
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.objectives.base import Writes, able
from mmjax.task import Task, make_task

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "coca_tiny.py"
SOURCE = {"name": "tfds", "dataset": "emoji", "split": "test_drawing"}
LAYER = {"num_heads": 1, "mlp_dim": 4}
OBJECTIVE = {
    "name": "coca",
    "unimodal": [{"repeat": 1, "blocks": [{"name": "transformer", **LAYER}]}],
    "multimodal": [{"repeat": 1, "blocks": [{"name": "cross_transformer", **LAYER}]}],
}


def task(**objective: Any) -> Task:
    block = {
        "source": SOURCE,
        "inputs": {"image": {"size": 16}, "text": {"length": 4}},
        "objective": objective or OBJECTIVE,
        "batch": 4,
    }
    return make_task("captions", block, {"image": Image(), "text": Text()})


def test_by_hand() -> None:
    rows = {
        "wanted": np.array([[5, 6, 3, 0], [7, 3, 0, 0], [5, 8, 8, 3]]),
        # As wanted; longer than wanted and never ended; one of three tokens, once.
        "written": np.array([[5, 6, 3, 0], [7, 7, 7, 7], [8, 3, 0, 0]]),
        "cost": np.array([3.0, 1.0, 5.0]),
        "tokens": np.array([3.0, 2.0, 4.0]),
    }
    loss, exact, bags = Captions(source=SOURCE).score(task(), {"all": rows})
    assert (
        loss["name"] == "caption loss"
        and loss["unit"] == "loss"
        and loss["split"] == "test_drawing"
    )
    assert (loss["value"], loss["count"]) == (9 / 9, 9)
    shares = np.array([2, 1, 1, 2, 3]) / 9  # of 5, 6, 7, 8 and the end
    assert loss["chance"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert (exact["name"], exact["value"], exact["count"]) == ("caption match", 1 / 3, 3)
    assert bags["name"] == "caption F1"
    assert bags["value"] == pytest.approx((1 + 2 * 1 / 5 + 2 * 1 / 4) / 3)


def test_chance_is_what_other_texts_score() -> None:
    rng = np.random.default_rng(0)
    wanted = np.column_stack([rng.integers(4, 6, 4000), np.full(4000, 3)])
    rows = {
        "wanted": wanted,
        "written": wanted,
        "cost": np.zeros(4000),
        "tokens": np.full(4000, 2.0),
    }
    _, exact, bags = Captions(source=SOURCE).score(task(), {"all": rows})
    assert exact["value"] == bags["value"] == 1
    assert exact["chance"] == pytest.approx(0.5, abs=0.04)
    assert bags["chance"] == pytest.approx(0.5, abs=0.04)


def test_texts_end_where_they_end() -> None:
    rows = np.array([[4, 5, 3, 9], [3, 4, 4, 4], [4, 0, 5, 6]])
    assert texts(rows, 3) == [(4, 5), (), (4, 0, 5, 6)]
    assert texts(rows, None) == [(4, 5, 3, 9), (3, 4, 4, 4), (4, 0, 5, 6)]


def test_colours_are_compared_to_the_last_whatever_their_ids() -> None:
    """Ids 0 and 3, which are padding and the end of texts, are colours like others."""
    modalities = {"text": Text(), "colours": Colours(levels=5, max_positions=4)}
    block = {
        "source": SOURCE,
        "inputs": {"text": {"length": 4}, "colours": {"size": 2}},
        "objective": {
            "name": "transfusion", "modalities": ["text", "colours"], "discrete": ["colours", "text"],
        },
        "batch": 4,
    }  # fmt: skip
    rows = {
        "wanted": np.array([[3, 10, 20, 30], [0, 0, 7, 0], [3, 3, 3, 3]]),
        "written": np.array([[3, 99, 98, 97], [0, 0, 7, 0], [3, 3, 0, 0]]),
        "cost": np.zeros(3),
        "tokens": np.full(3, 4.0),
    }
    chosen = make_task("pictures", block, modalities)
    assert chosen.objective.writes() == ("text", "colours")
    loss, exact, bags = Captions(source=SOURCE).score(chosen, {"all": rows})
    assert exact["value"] == pytest.approx(1 / 3)
    assert bags["value"] == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)
    shares = np.array([5, 3, 1, 1, 1, 1]) / 12  # of 3, 0, 7, 10, 20, 30
    assert loss["chance"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_a_text_that_holds_padding_before_its_end_is_not_the_one_without() -> None:
    rows = {
        "wanted": np.array([[5, 6, 3, 0]]), "written": np.array([[5, 0, 6, 3]]),
        "cost": np.zeros(1), "tokens": np.array([3.0]),
    }  # fmt: skip
    _, exact, bags = Captions(source=SOURCE).score(task(), {"all": rows})
    assert exact["value"] == 0 and bags["value"] == pytest.approx(2 * 2 / 5)


def test_ids_are_those_of_the_tasks_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's: the end is 2, and fills up; nothing is lost of a text that holds 0 and 3."""
    monkeypatch.setattr(Text, "token_ids", lambda text: TokenIds(16, pad=2, begin=1, end=2))
    rows = {
        "wanted": np.array([[0, 3, 2, 2], [3, 2, 2, 2]]),
        "written": np.array([[0, 3, 2, 2], [0, 2, 2, 2]]),
        "cost": np.array([3.0, 2.0]),
        "tokens": np.array([3.0, 2.0]),
    }
    loss, exact, bags = Captions(source=SOURCE).score(task(), {"all": rows})
    shares = np.array([1, 2, 2]) / 5  # of 0, 3 and the end
    assert loss["chance"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert exact["value"] == bags["value"] == 1 / 2


tokens = st.lists(st.integers(4, 7), max_size=4).map(tuple)


@given(a=tokens, b=tokens)
def test_f1_is_symmetric_and_one_for_the_same_bag(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    value = f1([a], [b])
    assert value == f1([b], [a]) and 0 <= value <= 1
    assert (value == 1) == (sorted(a) == sorted(b))
    assert match([a], [b]) == (a == b)
    # By precision and recall.
    common = sum(min(a.count(t), b.count(t)) for t in set(a))
    if common:
        precision, recall = common / len(a), common / len(b)
        assert value == pytest.approx(2 * precision * recall / (precision + recall))


def test_entropy_of_equal_shares() -> None:
    assert entropy(np.repeat(np.arange(8), 5)) == pytest.approx(np.log(8))
    assert entropy(np.zeros(0, int)) == 0


def test_an_objective_that_writes_nothing() -> None:
    other = task(name="masked_image")
    with pytest.raises(UserError, match="tasks.captions: captions needs an objective that writes"):
        Captions(source=SOURCE).passes(other)
    with pytest.raises(UserError, match="MaskedImage is none that writes"):
        able(other.objective, Writes)
    assert Captions(source=SOURCE).passes(task())["all"].computation == Write()


@pytest.fixture(scope="module")
def trained(emoji_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of CoCa, made tiny."""
    workdir = tmp_path_factory.mktemp("coca") / "run"
    toyrun.run(workdir, config=configs.read_file(str(CONFIG)))
    return workdir


def test_a_run_writes_captions_and_shows_them(trained: Path) -> None:
    records = json.loads((trained / "results.json").read_text())
    assert [r["name"] for r in records] == ["caption loss", "caption match", "caption F1"]
    loss = records[0]
    assert loss["split"] == "test_drawing" and 4 < loss["chance"] < loss["value"] < 12
    page = (trained / "report.html").read_text()
    table = page[page.index('class="pictures"') :]
    table = table[: table.index("</table>")]
    rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table, re.DOTALL))
    assert list(rows) == ["image", "its text", "the text it writes"]
    assert rows["image"].count("<img") == rows["its text"].count('class="words"') == 8
    names = re.findall(r'class="words"[^>]*>([^<]*)<', rows["its text"])
    assert len(set(names)) > 5 and all(re.search("[a-z]", name) for name in names)


def test_captions_of_a_loaded_run(trained: Path) -> None:
    model = mmjax.load(str(trained))
    task = model.tasks["captions"]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    made = model.caption(image=list(pixels))
    keys = jax.random.split(jax.random.key(9), 5)
    captions = model.compiled(lambda m, x: task.objective.captions(m, x, 8, keys))
    ids = captions({"pixels": pixels})
    text: Any = task.inputs["text"].modality
    assert made == [text.words(row) for row in np.asarray(ids)] and any(made)
    assert model.caption(image=[]) == []
    with pytest.raises(UserError, match="The run does not caption 'text'. Known: image"):
        model.caption(text=["dog"])
    with pytest.raises(UserError, match=r"caption takes a list: image=\[...\]"):
        model.caption(image=b"")
    with pytest.raises(UserError, match=r"image\[1\]"):
        model.caption(image=[pixels[0], "dog"])

"""IMP's recipes: sizes as published, the same recipe small, and each through training on real data."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest
from etils import epath
from recipes import block, experiment, without_sizes

from mmjax import train
from mmjax.core import config as configs
from mmjax.engine.steps import positions

NAMES = ("imp:s", "imp:b", "imp:l", "imp:moe-s", "imp:moe-b", "imp:moe-l")


def millions(name: str, *prefixes: str) -> float:
    specs = experiment(name).declaration.specs
    return sum(math.prod(s.shape) for n, s in specs.items() if n.startswith(prefixes)) / 1e6


def test_parameters_per_token_are_those_published() -> None:
    """IMP-B 86, IMP-MoE-B 90, IMP-MoE-L 350 million (the release's table 1), within 3 %.

    What is counted is not stated. The trunk alone gives 86; with the stems of patches, which a token of a picture
    meets, 88.4 are within 3 % of 90. The large trunk has 302 (306 in the release's code), and comes near 350 only
    with all its stems, the 33 of the text's vectors among them.
    """
    assert millions("imp:b", "trunk/") == pytest.approx(86, rel=0.03)
    assert millions("imp:s", "trunk/") == pytest.approx(21, rel=0.03)
    assert millions("imp:l", "trunk/") == pytest.approx(306, rel=0.03)
    stems = ("trunk/", "stems/vision", "stems/spectrogram")
    assert millions("imp:b", *stems) == pytest.approx(90, rel=0.03)
    assert millions("imp:l", "trunk/", "stems/") == pytest.approx(350, rel=0.03)
    # A token of the sparse models meets as many, and the router in addition; in all they are 510 and 1,060.
    assert millions("imp:moe-b", "trunk/") == pytest.approx(510, rel=0.01)
    assert millions("imp:moe-l", "trunk/") == pytest.approx(1060, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_batches_and_intervals_are_those_released(name: str) -> None:
    made = experiment(name)
    found = {
        n: positions(task, made.declaration, task.rows().batch(1)) for n, task in made.tasks.items()
    }
    assert found == {
        "image_text": 256 + 5 * 16, "images": 256, "video_text": 256 + 16, "videos": 256,
        "video_audio_text": 256 + 64 + 16, "sounds": 64,
    }  # fmt: skip
    assert {n: (t.config.interval, t.batch) for n, t in made.tasks.items()} == {
        "image_text": (1, 8192), "images": (1, 8192), "video_text": (12, 8192), "videos": (5, 2048),
        "video_audio_text": (12, 8192), "sounds": (8, 2048),
    }  # fmt: skip
    shares = made.planned.schedule().between(0, 2 * 302)
    # Every task runs, as in the released loop it would not: for example one in twelve passes.
    assert {n: round(100 * s / 604, 1) for n, s in shares.items()} == pytest.approx(
        {"image_text": 40.1, "images": 40.1, "video_text": 3.3, "videos": 8.0, "video_audio_text": 3.3, "sounds": 5.0},
        abs=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["imp:b", "imp:moe-b"])
def test_videos_come_in_shapes_of_as_many_tokens(name: str) -> None:
    made = experiment(f"{name}-mixed")
    shapes = {
        program: positions(task, made.declaration, task.rows().batch(1))
        for program, (task, _) in made.phases.programs.items()
        if task.name in ("videos", "video_text")
    }
    assert shapes == {
        f"{task}.{bucket}": size
        for task, size in (("videos", 256), ("video_text", 256 + 16))
        for bucket in ("released", "long", "large")
    }


@pytest.mark.parametrize(
    ("large", "small"),
    [("imp:b", "imp:small"), ("imp:b-mixed", "imp:small-mixed"), ("imp:moe-b-mixed", "imp:moe-small-mixed")],
)  # fmt: skip
def test_the_small_recipe_is_the_same_with_other_numbers_and_data(large: str, small: str) -> None:
    one, two = without_sizes(block(large)), without_sizes(block(small))
    for made in (one, two):
        del made["mesh"]
        for task in made["tasks"].values():
            del task["source"], task["evaluators"]["test"]["source"]
            for key in ("positive_key", "label"):
                task["objective"].pop(key, None)
            for view in task["inputs"].values():
                view.pop("gain_db", None), view.pop("flip", None)
            for bucket in task.get("shapes", {}).values():
                bucket["inputs"]["vision"].pop("stride", None)
                bucket.pop("weight", None)
    assert one == two


@pytest.mark.parametrize("setting", ["small", "moe-small-mixed"])
def test_it_trains_on_real_data(tmp_path: Path, setting: str, emoji_dir: epath.Path) -> None:
    """Every task once, by the code of the large ones; then their evaluation."""
    from mmjax.datasets import build

    for name in ("speech", "notes"):
        build.build(name)
    made = configs.override(
        block(f"imp:{setting}"),
        (
            "steps=7", "model.width=32", "tasks.image_text.batch=8", "tasks.images.batch=8",
            "tasks.video_text.batch=8", "tasks.videos.batch=8", "tasks.video_audio_text.batch=8",
            "tasks.sounds.batch=8", "tasks.video_audio_text.evaluators={}", "checkpoint.every=0",
            "tasks.video_text.evaluators={}", "tasks.videos.evaluators={}", "log.report=False",
        ),
    )  # fmt: skip
    records = train.train(made, epath.Path(tmp_path), False, jax.devices()[:1])
    assert records is not None and {r["task"] for r in records} == {"image_text", "images", "sounds"}  # fmt: skip
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert all(f'"task": "{name}"' in lines for name in made["tasks"])
    assert ("usage 003 vision" in lines) == ("moe" in setting)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_setting_is_refused(name: str) -> None:
    from mmjax.core.errors import UserError

    with pytest.raises(UserError, match="no setting '.*-mixt'. Did you mean '.*-mixed'"):
        block(f"{name}-mixt")

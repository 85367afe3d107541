"""The shipped configs: each is whole, says how to run it, and has the shape that it is shipped for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mmjax import config as configs
from mmjax.experiment import Experiment, make_experiment

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def experiment(name: str, argument: str = "") -> Experiment:
    path = ROOT / "configs" / f"{name}.py"
    return make_experiment(configs.read_file(f"{path}:{argument}" if argument else str(path)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_whole_and_says_how_to_run_it(path: Path) -> None:
    made = experiment(path.stem)
    assert all(made.evaluators[task] for task in made.tasks)
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m mmjax.train --config=configs/{path.name} --workdir=" in words
    assert "Hardware:" in words and "Result" in words


def test_the_quickstart_has_six_tasks_and_five_modalities() -> None:
    made = experiment("quickstart")
    assert set(made.tasks) == {
        "image_text", "video_text", "speech_text", "image_classes", "instruments", "masked_image",
    }  # fmt: skip
    read = {modality for task in made.tasks.values() for modality in task.objective.reads()}
    assert read == set(made.modalities) == {"image", "video", "spectrogram", "waveform", "text"}


def test_the_trunk_holds_most_of_the_parameters() -> None:
    """70 % of those outside the token embeddings, counted from the shapes."""
    specs = experiment("quickstart").declaration.specs

    def count(prefix: str) -> int:
        total = 0
        for name, spec in specs.items():
            size = 1
            for side in spec.shape:
                size *= side
            total += size * name.startswith(prefix)
        return total

    trunk, tokens = count("trunk/"), count("stems/text/embedding")
    assert tokens == 2048 * 128
    assert trunk / (count("") - tokens) >= 0.7


def test_the_longer_quickstart_is_the_same_model_and_tasks() -> None:
    short, long = (
        configs.read_file(str(ROOT / "configs" / f"{name}.py"))
        for name in ("quickstart", "quickstart_30min")
    )
    assert {d.key for d in configs.compare(short, long)} == {"steps", "checkpoint.every"}


def test_one_more_vendor_is_only_evaluated() -> None:
    plain, vendor = (
        configs.read_file(str(ROOT / "configs" / f"quickstart_30min.py{argument}"))
        for argument in ("", ":noto")
    )
    differences = configs.compare(plain, vendor)
    assert differences and {d.kind for d in differences} == {"free"}
    sources = [e["source"] for e in vendor["tasks"]["image_text"]["evaluators"].values()]
    assert {"name": "tfds", "dataset": "emoji_noto", "split": "test_vendor"} in sources

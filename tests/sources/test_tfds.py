"""Any TFDS data set by its name in a config: made here by TFDS itself, without TensorFlow."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.sources.base import Cached
from mmjax.sources.tfds import Tfds

COUNTS = {"train": 24, "test": 8}


class Grey(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey pictures, each with a text and a class."""

    VERSION = tfds.core.Version("1.2.0")
    name = "grey"
    url_infos: dict[str, Any] = {}

    def _info(self):
        features = {
            "picture": tfds.features.Image(
                shape=(16, 16, 3), dtype=np.uint8, encoding_format="png"
            ),
            "words": tfds.features.Text(),
            "kind": tfds.features.ClassLabel(num_classes=4),
            "side": tfds.features.ClassLabel(names=["left", "right"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(n) for split, n in COUNTS.items()}

    def _generate_examples(self, count):
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 10 * i, np.uint8)).save(png, "PNG")
            png.seek(0)
            yield i, {"picture": png, "words": f"grün {i}", "kind": i % 4, "side": "right"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    tfds.disable_progress_bar()
    Grey(data_dir=path, file_format="array_record").download_and_prepare()
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """Return a copy to break."""
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data"


def opened(folder: Path, dataset: str = "grey", split: str = "train"):
    return Tfds(dataset, split, str(folder)).open()


def test_examples_come_decoded(folder):
    examples = opened(folder)
    assert len(examples) == COUNTS["train"]
    assert set(examples.fields) == {"picture", "words", "kind", "side"}
    seen = set()
    for example in examples:
        number = int(example["words"].removeprefix("grün "))
        np.testing.assert_array_equal(example["picture"], np.full((16, 16, 3), 10 * number))
        assert example["picture"].dtype == np.uint8 and example["kind"] == number % 4
        seen.add(number)
    assert seen == set(range(COUNTS["train"]))
    assert "tensorflow" not in sys.modules


def test_classes_have_names_where_the_data_set_gives_them(folder):
    examples = opened(folder)
    assert {name: list(names) for name, names in examples.labels.items()} == {
        "side": ["left", "right"]
    }
    assert examples.labels["side"][examples[0]["side"]] == "right"
    assert Cached(examples, 0).labels == examples.labels


@pytest.mark.parametrize(
    ("split", "count"),
    [("train[:5]", 5), ("train[50%:]", 12), ("train+test", 32), ("test[2:4]", 2)],
)
def test_slices_and_sums(folder, split, count):
    examples = opened(folder, split=split)
    assert len(examples) == count == len([e for e in examples])
    assert Tfds("grey", split, str(folder)).label == split


def test_a_config_names_it(folder):
    block = {"name": "tfds", "dataset": "grey", "split": "test", "folder": str(folder)}
    assert len(configs.component("sources", block, "tasks.a.source").open()) == COUNTS["test"]


def test_the_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(opened(Path("~") / folder.name)) == COUNTS["train"]


def test_the_data_folder_of_the_environment_is_the_default(folder, monkeypatch):
    monkeypatch.setenv("MMJAX_DATA_DIR", str(folder))
    assert len(Tfds("grey", "test").open()) == COUNTS["test"]


def test_the_newest_version_is_taken_unless_one_is_named(broken):
    shutil.copytree(broken / "grey" / "1.2.0", broken / "grey" / "1.10.0")
    info = broken / "grey" / "1.10.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("1.2.0", "1.10.0"))
    assert opened(broken).description == "grey/1.10.0:train"
    assert opened(broken, "grey/1.2.0").description == "grey/1.2.0:train"


def test_identity_is_of_the_content_asked_for(folder, broken):
    assert opened(folder).identity == opened(broken).identity, "not of the place"
    others = {opened(folder, split=s).identity for s in ("train", "test", "train[:5]")}
    assert len(others) == 3
    info = broken / "grey" / "1.2.0" / "dataset_info.json"
    info.write_text(re.sub(r'"numBytes": "\d+"', '"numBytes": "7"', info.read_text()))
    assert opened(folder).identity != opened(broken).identity


HOW = "Run: tfds build grey --file_format=array_record --data_dir="


@pytest.mark.parametrize("dataset", ["grey", "grey/1.2.0"])
def test_a_data_set_that_is_not_there_says_what_to_run(tmp_path, dataset):
    with pytest.raises(UserError, match=re.escape(f"{HOW}{tmp_path}")):
        opened(tmp_path, dataset)


def test_a_version_that_is_not_there_says_which_are(folder):
    with pytest.raises(UserError, match="'grey/3.0.0' is not built.*There is grey/1.2.0"):
        opened(folder, "grey/3.0.0")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("trian", "no split 'trian'. Did you mean 'train'?"),
        ("", "no split ''. Known: test, train."),
        ("train+tset", "no split 'tset'. Did you mean 'test'?"),
        ("tran[:5]", "no split 'tran'. Did you mean 'train'?"),
        ("train[:0]", "split 'train[:0]' has no examples"),
        ("train[:x]", "split 'train[:x]'"),
        ("train[90:]", "split 'train[90:]'"),
    ],
)
def test_a_split_that_is_not_there(folder, split, words):
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        opened(folder, split=split)
    assert "'grey'" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", ["shard", "features", "info", "cut"])
def test_a_half_built_data_set_says_what_to_run(broken, fault):
    home = broken / "grey" / "1.2.0"
    files = {
        "shard": next(home.glob("grey-train*")),
        "features": home / "features.json",
        "info": home / "dataset_info.json",
        "cut": home / "dataset_info.json",
    }
    if fault == "cut":
        files[fault].write_text(files[fault].read_text()[:80])
    else:
        files[fault].unlink()
    with pytest.raises(UserError, match=re.escape(f"{HOW}{broken}")) as raised:
        opened(broken)
    if fault == "shard":
        assert files["shard"].name in str(raised.value)


def test_the_other_split_of_a_half_built_data_set_reads(broken):
    next((broken / "grey" / "1.2.0").glob("grey-train*")).unlink()
    assert len(list(opened(broken, split="test"))) == COUNTS["test"]


def test_another_file_format_says_which_to_build(broken):
    info = broken / "grey" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="built as tfrecord; mmjax reads array_record.*Run: tfds"):
        opened(broken)


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
HOSTILE = (
    lambda f: {**f, "pythonClassName": "evil.Image"},
    lambda f: {"python_class_name": "evil.Image"},
    lambda f: {"type": "evil.Image", "content": {}},
    lambda f: _deep(f, "pythonClassName", "evil.Image"),
    lambda f: _deep(f, "pythonClassName", "tensorflow_datasets_evil.Image"),
    lambda f: {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "jsonFeature": {"json": json.dumps({"feature": {"type": "evil.Image", "content": {}}})},
    },
    lambda f: {"jsonFeature": {"json": "{"}, "type": "evil.Image", "content": {}},
)


def _deep(features: Any, key: str, value: str) -> Any:
    """Return the first feature of a dict of features under another class."""
    first = next(iter(features["featuresDict"]["features"].values()))
    first[key] = value
    return features


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_a_data_set_names_no_code_to_run(broken, monkeypatch, index):
    """TFDS imports the module of a feature's class, also from the current folder."""
    for name in ("evil", "tensorflow_datasets_evil"):
        (broken / f"{name}.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(broken))
    file = broken / "grey" / "1.2.0" / "features.json"
    file.write_text(json.dumps(HOSTILE[index](json.loads(file.read_text()))))
    with pytest.raises(
        UserError, match=r"features.json names the class '(tensorflow_datasets_)?evil"
    ):
        opened(broken)
    assert not (broken / "ran").exists()


def test_a_built_in_name_is_held_to_it_too(emoji_dir, tmp_path):
    shutil.copytree(emoji_dir / "emoji", tmp_path / "emoji")
    file = tmp_path / "emoji" / "1.0.0" / "features.json"
    text = file.read_text().replace("tensorflow_datasets.core.", "tensorflow_dataset_.core.")
    file.write_text(text)
    with pytest.raises(UserError, match="names the class 'tensorflow_dataset_.core"):
        Tfds("emoji", "test_drawing", str(tmp_path)).open()


def test_our_own_data_sets_are_held_to_their_manifest(emoji_dir, tmp_path):
    shutil.copytree(emoji_dir / "emoji", tmp_path / "emoji")
    assert len(Tfds("emoji", "test_drawing", str(tmp_path)).open()) > 100
    (tmp_path / "emoji" / "1.0.0" / "manifest.json").unlink()
    with pytest.raises(UserError, match="half-built.*mmjax build emoji"):
        Tfds("emoji", "test_drawing", str(tmp_path)).open()

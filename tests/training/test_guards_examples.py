"""Odd examples among good ones: named, skipped, counted once, in training and in evaluation."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from harness import deterministic, log
from toyrun import run

from mmjax.core.errors import UserError
from mmjax.engine.loader import make_batch
from mmjax.engine.state import Clock
from mmjax.evaluators.base import Embed, LossOf, Pass, Predict, row_spec
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.modalities.video import Video
from mmjax.modalities.waveform import Waveform
from mmjax.objectives.classification import Classification
from mmjax.schedule.phase_specs import from_config
from mmjax.sources.base import Examples
from mmjax.task import RowSpec, make_input, make_task


class Odd(Examples):
    """Good examples of each modality, and after them the odd ones of `odd`, whose other fields are good."""

    description, identity = "odd", "odd"

    def __init__(self, *odd: Mapping[str, Any], good: int = 1):
        self._good, self._odd = good, odd
        self.fields = tuple(GOOD)

    def __len__(self) -> int:
        return self._good + len(self._odd)

    def __getitem__(self, index: int) -> Any:
        return GOOD if index < self._good else {**GOOD, **self._odd[index - self._good]}


GOOD: Mapping[str, Any] = {
    "image": np.zeros((8, 8, 3), np.uint8),
    "caption": ["a cat"],
    "audio": np.zeros(800, np.int16),
    "video": np.zeros((2, 8, 8, 3), np.uint8),
    "label": 1,
}
MODALITIES = {
    "image": Image(patch=8),
    "text": Text(tokenizer="emoji/1.0.0/tokenizer.model"),
    "waveform": Waveform(patch=100),
    "video": Video(tube=2, patch=8),
}
INPUTS = {
    "image": {"size": 8},
    "text": {"length": 4},
    "waveform": {"samples": 800},
    "video": {"frames": 2, "size": 8},
}
ODD = [  # one value of one field, and the message about it
    ({"image": np.zeros((8, 8, 2), np.uint8)}, "image", r"found \[8, 8, 2\]"),
    ({"image": np.zeros((8, 8), bool)}, "image", "found bool"),
    ({"image": np.full((8, 8), 7, np.int64)}, "image", "found int64"),
    ({"image": b"no picture"}, "image", "no picture of a known format"),
    ({"image": None}, "image", r"found \[\]"),
    ({"caption": []}, "caption", "found none"),
    ({"caption": None}, "caption", "found NoneType"),
    ({"caption": [None]}, "caption", "found NoneType"),
    ({"caption": [7]}, "caption", "found int"),
    ({"audio": np.zeros((800, 9), np.float32)}, "audio", r"found \[800, 9\]"),
    ({"audio": np.full(800, 2.5, np.float32)}, "audio", "2.5 times full scale"),
    ({"audio": b"fLaC"}, "audio", "a sound is FLAC"),
    ({"audio": b"RIFF"}, "audio", "a WAV file that cannot be read"),
    ({"audio": None}, "audio", "found object"),
    ({"video": []}, "video", "found no frame"),
    ({"video": np.zeros((0, 8, 8, 3), np.uint8)}, "video", r"found \[0, 8, 8, 3\]"),
    ({"label": -1}, "label", r"has the value -1, outside \[0, 5\)"),
    ({"label": 5}, "label", r"has the value 5, outside \[0, 5\)"),
    ({"label": 2.5}, "label", r"is '2.5' \(float\); expected an integer"),
    ({"label": np.float32(2)}, "label", r"is '2.0' \(float32\); expected an integer"),
    ({"label": np.array([1, 2])}, "label", r"is '\[1 2\]' \(ndarray\); expected an integer"),
    ({"label": [1]}, "label", r"is '\[1\]' \(list\); expected an integer"),
    ({"label": "1"}, "label", r"is '1' \(str\); expected an integer"),
    ({"label": None}, "label", r"is 'None' \(NoneType\); expected an integer"),
    ({"label": 2**31}, "label", r"is 2147483648, outside \[-2147483648, 2147483647\]"),
    ({"label": np.int64(2**32 + 1)}, "label", "is 4294967297, outside"),
    ({"label": 2**70}, "label", "is 1180591620717411303424, outside"),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd_spec(emoji_dir: Any) -> RowSpec:
    inputs = {name: make_input(name, b, MODALITIES, "here") for name, b in INPUTS.items()}
    labels = Classification(classes=5)
    return RowSpec(inputs, labels.fields(), labels.check_example)


@pytest.mark.parametrize(("change", "name", "words"), ODD, ids=lambda x: str(x)[:30])
def test_an_odd_example_among_good_ones_is_an_invalid_slot_that_is_named(
    odd_spec: RowSpec, change: Mapping[str, Any], name: str, words: str
) -> None:
    examples = Odd(change, good=2)
    odd_spec.check(examples, "tasks.a")
    for rng in (None, np.random.default_rng(0)):
        rows, failed = make_batch(odd_spec, examples, [2, 0], lambda _, r=rng: r, 3)
        assert rows.valid.tolist() == [False, True, False]
        [(row, message)] = failed
        assert row == 0 and re.search(rf"^odd\[2\]: field '{name}'.*{words}", message), message
        assert not any(leaf[0].any() for leaf in jax.tree.leaves(rows))


@pytest.mark.parametrize(("change", "name", "words"), ODD, ids=lambda x: str(x)[:30])
def test_what_is_odd_in_all_examples_is_refused_at_the_start(
    odd_spec: RowSpec, change: Mapping[str, Any], name: str, words: str
) -> None:
    """What a decoder finds damaged is left to the loader: the next one may be whole."""
    examples = Odd(*[change] * 40, good=0)
    damaged = isinstance(change[name], bytes) and change[name] != b"fLaC"
    with (
        contextlib.nullcontext()
        if damaged
        else pytest.raises(UserError, match=rf"^tasks.a: odd\[0\]: field '{name}'.*{words}")
    ):
        odd_spec.check(examples, "tasks.a")


def test_an_odd_first_example_does_not_refuse_the_data(odd_spec: RowSpec) -> None:
    class Backwards(Odd):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(len(self) - 1 - index)

    odd_spec.check(Backwards({"label": -1}, good=9), "tasks.a")


def test_a_label_outside_the_classes_never_reaches_a_loss(tmp_path: Path) -> None:
    """40 examples, of which one has the label 4 of classes 0 to 3; the others train."""
    words = (
        "objective={'name': 'classification', 'modalities': ('toy',), 'classes': 4}",
        "evaluators={}",
    )
    overrides = [f"tasks.one.{word}" for word in words]
    run(
        tmp_path / "run",
        *overrides,
        "limits.max_invalid_examples=8",
        "limits.max_non_finite_steps=2",
    )
    clock = toyrun.meta(tmp_path / "run")["clock"]
    assert clock["invalid_ids"]["one"] == [
        4,
        9,
        14,
        19,
        24,
        29,
        34,
        39,
    ]  # the toy's labels are id mod 5
    lines = [x for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    assert clock["skipped"]["one"] == 0 and np.isfinite([x["loss"] for x in lines]).all()


def test_evaluation_has_no_row_for_an_odd_example(odd_spec: RowSpec, emoji_dir: Any) -> None:
    """The pass that predicts reads the label, and the one that takes the loss."""
    block = {
        "source": {"name": "toy"},
        "inputs": {"image": INPUTS["image"]},
        "objective": {"name": "classification", "classes": 5},
        "batch": 8,
    }
    block_ = make_task("labels", block, MODALITIES)
    for computation in (Predict(("image",)), LossOf()):
        spec = row_spec(block_, Pass(computation, {}, ("label",)))
        rows, failed = make_batch(spec, Odd({"label": 5}), [0, 1], lambda _: None, 2)
        assert rows.valid.tolist() == [True, False] and "outside [0, 5)" in failed[0][1]
    spec = row_spec(block_, Pass(Embed("image"), {}, ()))
    assert not make_batch(spec, Odd({"label": 5}), [0, 1], lambda _: None, 2)[1]


def test_an_example_counts_once_in_all_epochs(tmp_path: Path) -> None:
    """Also after a restart, for which the checkpoint knows the ids; a first sight of another one still counts."""
    corrupt = (
        "tasks.one.source.corrupt=(3,17)",
        "limits.max_invalid_examples=2",
        "loader.threads=1",
    )
    run(tmp_path / "run", *corrupt, "steps=40")
    run(tmp_path / "run", *corrupt, "steps=80")
    clock = toyrun.meta(tmp_path / "run")["clock"]
    assert clock["positions"]["one"] > 8 * 40 and clock["invalid"]["one"] == 2
    events = [x["text"] for x in log(tmp_path / "run") if x["line"] == "event"]
    assert len([text for text in events if "is garbage" in text]) == 2
    with pytest.raises(
        UserError, match="3 examples could not be read, over limits.max_invalid_examples = 2"
    ):
        run(
            tmp_path / "more", "tasks.one.source.corrupt=(3,17,20)", "limits.max_invalid_examples=2"
        )


def test_the_count_of_an_older_checkpoint_is_added_to(tmp_path: Path) -> None:
    """It holds how many examples had been met, not which: those met again count again, and no further."""
    schedule = from_config("shares", {"one": 1}, 0, ())
    saved = Clock(0, schedule, {}, {}, {"one": 7}).to_json()
    del saved["invalid_ids"]
    clock = Clock.from_json(saved)
    for example in (3, 17, 3, 3, 17):
        clock = clock.with_invalid("one", example)
    assert clock.invalid == {"one": 9} and clock.invalid_ids == {"one": (3, 17)}
    assert Clock.from_json(clock.to_json()) == clock

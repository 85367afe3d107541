"""Instances of an example and dropped tokens: what reaches the devices, and that evaluation sees the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.evaluators.base import LossOf, device_spec
from mmjax.modalities.base import PRESENT, Input, as_rows, dropped, tokens_left
from mmjax.modalities.image import Image
from mmjax.modalities.spectrogram import Spectrogram
from mmjax.modalities.text import Text
from mmjax.modalities.video import Video
from mmjax.modalities.waveform import Waveform
from mmjax.task import make_input, make_task

RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
SOUND = RNG.normal(size=4096).astype(np.float32) / 8
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "video": (Video(tube=2, patch=8), {"frames": 8, "size": 16}, CLIP),
    "image": (Image(patch=4), {"size": 16}, CLIP[0]),
    "spectrogram": (Spectrogram(patch_frames=4, mels=32), {"frames": 16}, SOUND[:3000]),
    "waveform": (Waveform(patch=128), {"samples": 4096}, SOUND[:3000]),
}


def made(name: str, **more: Any) -> Input:
    modality, settings, _ = CASES[name]
    return make_input(name, {"field": "value", **settings, **more}, {name: modality}, "here")


def stem_of(name: str, seed: int = 0) -> Any:
    declaration = Declaration(nnx.Dict(stem=CASES[name][0].stem(6)))
    rng = np.random.default_rng(seed)
    p = {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}
    return declaration.merge(p)["stem"]


# --- dropped tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_tokens_that_stay_are_those_of_the_whole(name: str) -> None:
    """To the bit: the same values at the same coordinates, whether or not others were dropped."""
    example = {"value": CASES[name][2]}
    whole, part = made(name), made(name, token_drop=0.6)
    with jax.enable_x64(True):
        stem = stem_of(name)
        one, all_ = (
            stem({n: jnp.asarray(x)[None] for n, x in each.preprocess(example, None).items()})
            for each in (part, whole)
        )
    count = all_.x_BSD.shape[1]
    assert one.x_BSD.shape[1] == tokens_left(count, 0.6) == count - round(0.6 * count)
    place = {
        tuple(float(c[0, i]) for c in all_.coordinates.values()): i for i in range(count)
    }  # of each token of the whole
    assert len(place) == count
    index = [
        place[tuple(float(c[0, i]) for c in one.coordinates.values())]
        for i in range(one.x_BSD.shape[1])
    ]
    assert index == sorted(set(index))
    np.testing.assert_array_equal(one.x_BSD[0], all_.x_BSD[0][jnp.array(index)])
    np.testing.assert_array_equal(one.mask_BS()[0], all_.mask_BS()[0][jnp.array(index)])


@pytest.mark.parametrize("name", CASES)
def test_evaluation_has_all_tokens_of_one_instance(name: str) -> None:
    plain = made(name)
    assert made(name, token_drop=0.5, instances=3).for_evaluation().arrays() == plain.arrays()
    assert (
        made(name, token_drop=0.5).drops and not made(name, token_drop=0.5).for_evaluation().drops
    )


@given(st.integers(1, 40), st.floats(0, 0.97))
def test_as_many_stay_as_are_said(count: int, drop: float) -> None:
    values = np.arange(count)[:, None]
    if count - round(count * drop) < 1:
        with pytest.raises(UserError, match="leave one"):
            tokens_left(count, drop)
        return
    arrays, index = dropped(values, (count,), drop, np.random.default_rng(1))
    assert len(index) == tokens_left(count, drop) and len(set(index)) == len(index)
    assert index.tolist() == sorted(index) == arrays["patches"][:, 0].tolist()
    place = index.astype(np.float32) / np.float32(count)
    np.testing.assert_array_equal(arrays["coordinates"][:, 0], place)


def test_each_example_drops_its_own_and_each_token_as_often() -> None:
    rng = np.random.default_rng(5)
    draws = [dropped(np.zeros((10, 1)), (10,), 0.7, rng)[1] for _ in range(4000)]
    assert len({tuple(d) for d in draws}) > 100
    counts = np.bincount(np.concatenate(draws), minlength=10)
    # Each stays in three of ten draws; the standard deviation is 29.
    assert abs(counts - 1200).max() < 5 * 29


@pytest.mark.parametrize("drop", [-0.1, 1.0, 0.99])
def test_a_drop_that_leaves_nothing_is_refused(drop: float) -> None:
    with pytest.raises(
        UserError, match=r"here: token_drop is .*it must be in \[0, 1\) and leave one"
    ):
        made("image", token_drop=drop)


# --- stills ------------------------------------------------------------------------------------


def test_a_still_is_a_tube_of_the_same_frame() -> None:
    still = made("video", frames=1)
    assert still.arrays()["pixels"].shape == (1, 16, 16, 3)
    repeated = made("video", frames=2)
    example = {"value": CLIP[0]}
    stem = stem_of("video")
    one, two = (
        stem({n: jnp.asarray(x)[None] for n, x in each.preprocess(example, None).items()})
        for each in (still, repeated)
    )
    np.testing.assert_array_equal(one.x_BSD, two.x_BSD)
    assert one.x_BSD.shape[1] == 4
    for axis, coordinates in two.coordinates.items():
        np.testing.assert_array_equal(one.coordinates[axis], coordinates)
    assert made("video", frames=1, token_drop=0.5).arrays()["patches"].shape == (2, 2 * 8 * 8 * 3)
    with pytest.raises(UserError, match="frames 3: not a positive multiple"):
        made("video", frames=3)


# --- instances ---------------------------------------------------------------------------------


def test_clips_of_one_video_differ_and_have_an_axis() -> None:
    given_ = made("video", frames=4, instances=3)
    arrays = given_.preprocess({"value": CLIP}, np.random.default_rng(2))
    assert arrays["pixels"].shape == (3, 4, 16, 16, 3) and arrays[PRESENT].tolist() == [True] * 3
    starts = {clip.tobytes() for clip in arrays["pixels"]}
    assert len(starts) > 1 and all(
        any((CLIP[s : s + 4] == clip).all() for s in range(5)) for clip in arrays["pixels"]
    )


class Words(Text):
    """Texts whose ids are their letters."""

    def _tokenizer(self) -> Any:
        class Letters:
            def encode(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
                ids = np.array([*map(ord, text)], np.int32)
                return np.resize(ids, length).astype(np.int32), np.arange(length) < len(ids)

        return Letters()


def texts(value: Any, rng: Any, **more: Any) -> dict[str, np.ndarray]:
    block = {"field": "value", "length": 1, **more}
    return make_input("text", block, {"text": Words()}, "here").preprocess({"value": value}, rng)


def test_of_several_texts_as_many_as_are_there() -> None:
    rng = np.random.default_rng(3)
    found = texts(["a", "b"], rng, instances=3)
    assert found[PRESENT].tolist() == [True, True, False]
    assert sorted(found["ids"][:2, 0]) == [ord("a"), ord("b")]
    assert not found["valid"][2].any() and not found["ids"][2].any()
    assert texts("a", rng, instances=2)[PRESENT].tolist() == [True, False]
    assert texts(np.array([b"a", b"b"], object), None, instances=2)["ids"][:, 0].tolist() == [97, 98]  # fmt: skip
    # None is taken twice, and all are taken now and then.
    draws = [tuple(texts([*"abcde"], rng, instances=2)["ids"][:, 0]) for _ in range(200)]
    assert all(one != two for one, two in draws) and {x for d in draws for x in d} == {*map(ord, "abcde")}  # fmt: skip
    # Without instances: any of them in training, the first one otherwise.
    assert {int(texts([*"ab"], rng)["ids"][0]) for _ in range(50)} == {97, 98}
    assert texts([*"ab"], None)["ids"].tolist() == [97]
    with pytest.raises(UserError, match="found none"):
        texts([], None)


def test_instances_are_rows_and_what_is_not_there_is_not_valid() -> None:
    arrays = {"x": jnp.arange(12).reshape(2, 3, 2), PRESENT: jnp.array([[1, 1, 0], [1, 0, 0]]) > 0}
    rows, present = as_rows(arrays)
    assert rows["x"].tolist() == jnp.arange(12).reshape(6, 2).tolist() and set(rows) == {"x"}
    assert present is not None and present.tolist() == [True, True, False, True, False, False]
    assert as_rows({"x": arrays["x"]})[1] is None


@pytest.mark.parametrize("value", [-1, "two", 1.5])
def test_a_number_of_instances_is_a_number(value: Any) -> None:
    with pytest.raises(UserError, match="here.instances is .*expected a number"):
        made("image", instances=value)


TASK: dict[str, Any] = {
    "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
    "inputs": {"image": {"size": 16, "token_drop": 0.5}},
    "objective": {"name": "masked_image"},
    "batch": 4,
}


def test_objectives_refuse_what_they_cannot_take() -> None:
    modalities = {"image": Image(patch=4)}
    with pytest.raises(UserError, match="tasks.one: objective MaskedImage needs all tokens"):
        make_task("one", TASK, modalities)
    classes = {**TASK, "objective": {"name": "classification", "classes": 4}}
    task = make_task("one", classes, modalities)  # which pools what there is
    assert "patches" in task.rows().shapes().inputs["image"]
    assert "pixels" in device_spec(task, LossOf()).shapes().inputs["image"]
    several = {**classes, "inputs": {"image": {"size": 16, "instances": 2}}}
    with pytest.raises(UserError, match="takes one instance of 'image'; remove 'instances'"):
        make_task("one", several, modalities)

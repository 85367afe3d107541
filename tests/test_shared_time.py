"""One random time for the video and the sounds of an example, as IMP and MBT cut them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_1samp, uniform

from mmjax.core.config import key_class
from mmjax.core.migrations import upgrade
from mmjax.modalities.image import Image
from mmjax.modalities.spectrogram import Spectrogram
from mmjax.modalities.video import Video
from mmjax.modalities.waveform import Waveform
from mmjax.run_config import RunConfig
from mmjax.task import RowSpec, make_input, make_task

FRAMES, SAMPLES = 41, 4000  # such as a clip of 10 s, at 4 frames and 400 samples a second
MODALITIES = {
    "video": Video(tube=2, patch=4),
    "waveform": Waveform(patch=10, sample_rate=400),
    "spectrogram": Spectrogram(
        patch_frames=2, patch_mels=1, mels=2, sample_rate=400, window=20, hop=10, low=0, high=200
    ),
    "image": Image(patch=4),
}  # fmt: skip
EXAMPLE = {
    # Frame i is grey i; sample i is i / 4000.
    "video": np.broadcast_to(np.arange(FRAMES, dtype=np.uint8)[:, None, None, None], (FRAMES, 4, 4, 3)),
    "audio": np.arange(SAMPLES, dtype=np.float32) / SAMPLES,
    "image": np.zeros((4, 4, 3), np.uint8),
}  # fmt: skip
INPUTS: Mapping[str, Mapping[str, Any]] = {
    "video": {"frames": 8, "size": 4},
    "waveform": {"samples": 800},
}
OVER = {"video": FRAMES - 8, "waveform": SAMPLES - 800}  # the last place where each may begin


def spec(shared: bool = True, **inputs: Mapping[str, Any]) -> RowSpec:
    blocks = {name: {**INPUTS.get(name, {}), **block} for name, block in inputs.items()}
    made = {name: make_input(name, b, MODALITIES, "here") for name, b in blocks.items()}
    return RowSpec(made, (), shared_time=shared)


def starts(rows: RowSpec, seed: int | None) -> dict[str, np.ndarray]:
    """Return where each instance of each input begins: frames, and samples."""
    rng = None if seed is None else np.random.default_rng(seed)
    arrays = rows.make(EXAMPLE, rng).inputs
    result = {}
    for name, x in arrays.items():
        first = x["pixels"][..., 0, 0, 0, 0] if name == "video" else x["samples"][..., 0] * SAMPLES
        result[name] = np.atleast_1d(np.round(first).astype(int))
    return result


BOTH: dict[str, Any] = {"video": {}, "waveform": {}}


@pytest.mark.parametrize("order", [("video", "waveform"), ("waveform", "video")])
def test_video_and_sound_begin_at_one_relative_time(order: tuple[str, ...]) -> None:
    """The frame and the sample that contain it: floor(time (places))."""
    rows = spec(**{name: {} for name in order})
    times = []
    for seed in range(300):
        found = starts(rows, seed)
        low, high = 0.0, 1.0
        for name, [start] in found.items():
            low = max(low, start / (OVER[name] + 1))
            high = min(high, (start + 1) / (OVER[name] + 1))
        assert low < high, "some time is within both"
        times.append(low)
    assert ks_1samp(times, uniform.cdf).pvalue > 1e-3  # any time, as often


def test_without_it_each_begins_on_its_own() -> None:
    rows = spec(False, **BOTH)
    pairs = np.array([[v[0] for v in starts(rows, seed).values()] for seed in range(300)])
    apart = np.abs(pairs[:, 0] / OVER["video"] - pairs[:, 1] / OVER["waveform"])
    assert np.median(apart) > 0.15


def test_without_it_what_is_drawn_is_what_older_runs_drew() -> None:
    """To the bit: one input after the other from the generator of the row."""
    rows = spec(False, **BOTH)
    made = rows.make(EXAMPLE, np.random.default_rng(4)).inputs
    rng = np.random.default_rng(4)
    frame = int(rng.integers(OVER["video"] + 1))
    rng.integers(2**63)  # of the crop and the mirroring
    sample = int(rng.integers(OVER["waveform"] + 1))
    np.testing.assert_array_equal(made["video"]["pixels"], EXAMPLE["video"][frame : frame + 8])
    np.testing.assert_array_equal(
        made["waveform"]["samples"], EXAMPLE["audio"][sample : sample + 800]
    )


def test_each_instance_has_a_time_that_its_inputs_share() -> None:
    rows = spec(video={"instances": 3}, waveform={"instances": 2})
    for seed in range(50):
        found = starts(rows, seed)
        assert (len(found["video"]), len(found["waveform"])) == (3, 2)
        for video, sound in zip(found["video"], found["waveform"], strict=False):
            relative = np.array([video / (OVER["video"] + 1), sound / (OVER["waveform"] + 1)])
            assert abs(np.diff(relative)[0]) < 1 / (OVER["video"] + 1)
    firsts = [starts(rows, seed)["video"] for seed in range(50)]
    assert np.mean([len(set(v)) for v in firsts]) > 2.5


def test_a_spectrogram_shares_it_too() -> None:
    """Its first frame of energy is where the sound begins: a step in the middle is where the video is."""
    step = {
        **EXAMPLE,
        "audio": np.where(np.arange(SAMPLES) < SAMPLES / 2, 0, 0.5).astype(np.float32),
    }
    rows = spec(video={}, spectrogram={"frames": 78})
    for seed in range(40):
        arrays = rows.make(step, np.random.default_rng(seed)).inputs
        time = arrays["video"]["pixels"][0, 0, 0, 0] / (OVER["video"] + 1)
        begin = time * (SAMPLES - 790 + 1)
        loud = (
            arrays["spectrogram"]["mel"][:, 0] > -1
        ).sum()  # frames of 10 samples after the step
        expected = np.clip((begin + 790 - SAMPLES / 2) / 10, 0, 78)
        assert abs(loud - expected) < 3211 / 34 / 10 + 3


def test_tokens_are_dropped_by_example_and_input_still() -> None:
    rows = spec(video={"token_drop": 0.5}, waveform={"token_drop": 0.5})
    made = [rows.make(EXAMPLE, np.random.default_rng(s)).inputs for s in range(8)]
    for name in ("video", "waveform"):
        assert len({m[name]["coordinates"].tobytes() for m in made}) > 2


@pytest.mark.parametrize("inputs", [{"video": {}}, {"waveform": {}, "image": {"size": 4}}])
def test_one_input_with_time_draws_as_it_always_did(inputs: dict[str, Any]) -> None:
    for seed in range(5):
        one, other = (
            spec(shared, **inputs).make(EXAMPLE, np.random.default_rng(seed)).inputs
            for shared in (True, False)
        )
        for name in inputs:
            for array in one[name]:
                np.testing.assert_array_equal(one[name][array], other[name][array])


def test_evaluation_takes_the_middle_of_each() -> None:
    assert starts(spec(**BOTH), None) == {"video": [OVER["video"] // 2], "waveform": [1600]}


def test_a_task_shares_unless_it_says_not() -> None:
    block = {
        "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
        "inputs": INPUTS,
        "objective": {"name": "contrastive", "modalities": ["video", "waveform"], "embed_dim": 4},
        "batch": 8,
    }
    assert make_task("a", block, MODALITIES).rows().shared_time
    assert not make_task("a", {**block, "shared_time": False}, MODALITIES).rows().shared_time
    assert key_class("tasks.a.shared_time", RunConfig) == "schedule"


def test_older_configs_keep_times_of_their_own() -> None:
    modalities = {n: {"name": n} for n in ("video", "waveform", "image", "text")}
    tasks = {
        "two": {"inputs": {"video": {}, "waveform": {}}},
        "one": {"inputs": {"video": {}, "image": {}, "text": {}}},
        "says": {"inputs": {"video": {}, "waveform": {}}, "shared_time": True},
    }
    upgraded = upgrade({"modalities": modalities, "tasks": tasks}, 1)["tasks"]
    assert {n: t.get("shared_time") for n, t in upgraded.items()} == {
        "two": False, "one": None, "says": True,
    }  # fmt: skip

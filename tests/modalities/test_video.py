"""Videos: reading them in every form, cutting and augmenting them, and their tokens against loops."""

from __future__ import annotations

import io
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pil

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.video import Video, VideoInput, cut

VIDEO = Video(tube=2, patch=4)


def clip(frames: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), np.uint8)


def numbered(frames: int) -> np.ndarray:
    """Return a clip whose frame i is grey i everywhere."""
    return np.broadcast_to(
        np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, 8, 8, 3)
    )


def made(value: Any, rng: np.random.Generator | None = None, **settings: Any) -> np.ndarray:
    view = Input("clip", VIDEO, VideoInput(**{"frames": 4, "size": 8, **settings}))
    return view.preprocess({"video": value}, rng)["pixels"]


# --- reading -----------------------------------------------------------------------------------


def encoded(pictures: list[Pil.Image], form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    pictures[0].save(out, form, save_all=True, append_images=pictures[1:], **options)
    return out.getvalue()


def test_a_video_of_the_right_size_is_itself():
    video = clip(4)
    np.testing.assert_array_equal(made(video), video)
    np.testing.assert_array_equal(made([Pil.fromarray(f) for f in video]), video)
    np.testing.assert_array_equal(made(list(video)), video)
    np.testing.assert_array_equal(made(video / 255), video)
    np.testing.assert_array_equal(made(video[..., :1]), np.repeat(video[..., :1], 3, axis=-1))


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_moving_pictures_as_bytes(form, options):
    video = clip(4)
    data = encoded([Pil.fromarray(f) for f in video], form, **options)
    np.testing.assert_array_equal(made(data), video)
    np.testing.assert_array_equal(made(Pil.open(io.BytesIO(data))), video)


def test_a_gif_shows_its_frames():
    greys = numbered(4) * np.uint8(60)
    np.testing.assert_array_equal(made(encoded([Pil.fromarray(f) for f in greys], "GIF")), greys)


def test_pages_of_a_document_are_no_video():
    data = encoded([Pil.fromarray(f) for f in clip(3)], "TIFF")
    np.testing.assert_array_equal(made(data), np.repeat(clip(3)[:1], 4, axis=0))


def test_a_still_is_a_video_of_one_frame():
    still = clip(1)[0]
    expected = np.repeat(still[None], 4, axis=0)
    png = encoded([Pil.fromarray(still)], "PNG")
    for value in (still, still[None], [still], Pil.fromarray(still), png, still / 255):
        np.testing.assert_array_equal(made(value), expected)
        np.testing.assert_array_equal(made(value, np.random.default_rng(0)), expected)


def test_transparent_frames_are_laid_on_the_background():
    video = np.concatenate([clip(4), np.zeros((4, 8, 8, 1), np.uint8)], axis=-1)
    assert (made(video, background=90) == 90).all()
    greys = [made(video, np.random.default_rng(i), background=-1) for i in range(5)]
    assert all(len(np.unique(g)) == 1 for g in greys)  # one grey for all frames
    assert len({int(g.flat[0]) for g in greys}) > 1


def test_frames_are_resized():
    video = np.repeat(np.repeat(clip(4), 3, axis=1), 3, axis=2)
    assert made(video).shape == (4, 8, 8, 3)
    one = made(video[2:3])[0]
    np.testing.assert_array_equal(made(video)[2], one)
    assert np.abs(made(video).astype(int) - clip(4)).mean() < 30


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 2, 8, 8, 3), np.uint8), r"found \[2, 2, 8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"found \[0, 8, 8, 3\]"),
        (np.zeros((4, 8, 8, 5), np.uint8), r"found \[8, 8, 5\]"),
        (np.full((4, 8, 8, 3), 200.0), r"float in \[0, 1\]"),
        ([], "found no frame"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "found 8x8, 9x8"),
    ],
)
def test_what_is_no_video_is_said(value, message):
    with pytest.raises(UserError, match=message):
        made(value)


def test_damaged_bytes_are_no_user_error_so_that_a_run_goes_on():
    with pytest.raises(OSError):
        made(b"no picture at all")


# --- cutting and augmenting --------------------------------------------------------------------


def test_a_longer_video_is_cut_in_its_middle():
    assert made(numbered(9))[:, 0, 0, 0].tolist() == [2, 3, 4, 5]
    assert made(numbered(9), stride=2)[:, 0, 0, 0].tolist() == [1, 3, 5, 7]


def test_of_a_shorter_video_the_last_frame_is_repeated():
    assert made(numbered(3))[:, 0, 0, 0].tolist() == [0, 1, 2, 2]
    assert made(numbered(4), stride=2)[:, 0, 0, 0].tolist() == [0, 2, 3, 3]


@given(length=st.integers(1, 30), stride=st.integers(1, 4), seed=st.none() | st.integers(0, 99))
def test_frames_come_in_order_at_the_stride(length, stride, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    taken = made(numbered(length), rng, stride=stride)[:, 0, 0, 0].astype(int)
    span = 3 * stride + 1
    assert 0 <= taken[0] <= max(length - span, 0)
    assert taken.tolist() == [min(taken[0] + i * stride, length - 1) for i in range(4)]


def test_training_sees_every_offset():
    starts = {int(made(numbered(7), np.random.default_rng(i))[0, 0, 0, 0]) for i in range(60)}
    assert starts == {0, 1, 2, 3}


def test_crops_and_mirrors_are_those_of_all_frames():
    still = np.repeat(clip(1, 16, 16), 4, axis=0)
    found = [made(still, np.random.default_rng(i), crop=0.3, flip=True) for i in range(8)]
    for video in found:
        assert (video == video[0]).all()
    assert len({video.tobytes() for video in found}) == 8
    np.testing.assert_array_equal(made(still, crop=0.3, flip=True), made(still))


def test_mirroring_mirrors_half_of_the_videos():
    video = clip(4)
    found = [made(video, np.random.default_rng(i), flip=True) for i in range(100)]
    as_is = sum(np.array_equal(v, video) for v in found)
    mirrored = sum(np.array_equal(v, video[:, :, ::-1]) for v in found)
    assert as_is + mirrored == 100 and 30 < mirrored < 70


def test_what_is_random_is_fixed_by_the_generator():
    video = clip(9, 16, 16)
    pair = [made(video, np.random.default_rng(3), crop=0.3, flip=True) for _ in range(2)]
    np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 3}, "frames 3: not a positive multiple of the tube's 2"),
        ({"frames": 0}, "not a positive multiple"),
        ({"size": 10}, "size 10: not a positive multiple of the tube's 4"),
        ({"stride": 0}, "stride 0"),
        ({"frames": 34}, "frames 34 make 17 tubes; there are 16"),
        ({"size": 260}, "size 260 make 65 tubes; there are 64"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        VIDEO.arrays(VideoInput(**{"frames": 4, "size": 8, **change}))


def test_clips_drop_tokens_of_their_own():
    """Two examples whose generators differ; one generator gives the same tokens again."""
    view = Input("clip", VIDEO, VideoInput(frames=4, size=16, token_drop=0.75))
    video = clip(4, 16, 16)
    found = [
        view.preprocess({"video": video}, np.random.default_rng(seed))["coordinates"]
        for seed in (0, 1, 2, 0)
    ]
    assert found[0].shape == (8, 3)
    np.testing.assert_array_equal(found[0], found[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(found[one], found[other])


# --- tokens ------------------------------------------------------------------------------------


def built(modality: Any, width: int = 6) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a modality's stem as a function of arrays, and its (random) parameters."""
    declaration = Declaration(modality.stem(width))
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in declaration.specs.items()}
    call = jax.jit(lambda p, arrays: declaration.merge(p)(arrays))
    return lambda arrays: call(p, arrays), p


def normed(p: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Return `Positions`' layer norm of summed table rows, in NumPy."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return scaled * p["positions/norm/scale"] + p["positions/norm/bias"]


def test_tokens_are_projected_tubes_and_positions_time_first():
    stem, p = built(Video(tube=2, patch=4, max_time_positions=8, max_positions=4))
    pixels = np.stack([clip(4, 8, 16, seed) for seed in range(2)])
    stream = stem({"pixels": pixels})
    assert stream.x_BSD.shape == (2, 2 * 2 * 4, 6) and stream.valid_BS is None
    tables = [p[f"positions/tables/{axis}"] for axis in "tyx"]
    for b, t, y, x in np.ndindex(2, 2, 2, 4):
        tube = pixels[b, 2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        token = (tube.ravel() / 127.5 - 1) @ p["embed/kernel"] + p["embed/bias"]
        token = token + normed(p, tables[0][4 * t] + tables[1][2 * y] + tables[2][x])
        place = (t * 2 + y) * 4 + x
        np.testing.assert_allclose(stream.x_BSD[b, place], token, rtol=1e-4, atol=1e-4)
        found = [float(stream.coordinates[axis][0, place]) for axis in "tyx"]
        np.testing.assert_allclose(found, [t / 2, y / 2, x / 4])


def test_cut_by_loops():
    video = np.arange(2 * 4 * 6 * 4 * 3).reshape(2, 4, 6, 4, 3)
    tubes = np.asarray(cut(video, (2, 3, 2)))
    assert tubes.shape == (2, 8, 36)
    for b, t, y, x in np.ndindex(2, 2, 2, 2):
        tube = video[b, 2 * t : 2 * t + 2, 3 * y : 3 * y + 3, 2 * x : 2 * x + 2]
        np.testing.assert_array_equal(tubes[b, (t * 2 + y) * 2 + x], tube.ravel())


def test_another_resolution_and_frame_count_read_the_same_parameters():
    stem, _ = built(Video(tube=2, patch=4, max_time_positions=4, max_positions=4))

    def positions(t: int, y: int, x: int) -> np.ndarray:
        grey = np.full((1, 2 * t, 4 * y, 4 * x, 3), 128, np.uint8)
        return np.asarray(stem({"pixels": grey}).x_BSD).reshape(t, y, x, -1)

    fine = positions(4, 4, 4)
    np.testing.assert_allclose(positions(2, 2, 4), fine[::2, ::2], atol=1e-6)
    np.testing.assert_allclose(positions(1, 4, 2), fine[::4, :, ::2], atol=1e-6)
    assert len(np.unique(fine.reshape(64, -1), axis=0)) == 64

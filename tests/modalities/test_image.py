"""Images: what goes in, what comes out, and what chance may change."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as Pil

from mmjax.errors import UserError
from mmjax.layers.stream import Stream
from mmjax.modalities.image import Image, ImageInput
from mmjax.modality import Input
from mmjax.parameters import Declaration

IMAGE = Image(patch=4, buckets=8)


def pixels(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def made(value: Any, seed: int | None = None, **settings: Any) -> np.ndarray:
    """The preprocessed image; deterministic without a seed."""
    rng = None if seed is None else np.random.default_rng(seed)
    given = ImageInput(**{"size": 8, **settings})
    arrays = Input("image", IMAGE, given).preprocess({"image": value}, rng)
    assert list(arrays) == ["pixels"]
    assert arrays["pixels"].dtype == np.uint8 and arrays["pixels"].flags.c_contiguous
    assert arrays["pixels"].shape == (given.size, given.size, 3)
    return arrays["pixels"]


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Pil.fromarray(array).save(out, kind)
    return out.getvalue()


# --- inputs ------------------------------------------------------------------------------------


def test_every_way_to_give_an_image_gives_the_same_pixels() -> None:
    x = pixels()
    for value in (x, Pil.fromarray(x), encoded(x), x / 255.0, (x / 255.0).astype(np.float32)):
        np.testing.assert_array_equal(made(value), x)
    np.testing.assert_array_equal(made(x[:, ::-1]), x[:, ::-1])  # a view, not contiguous
    np.testing.assert_array_equal(made(jnp.asarray(x)), x)


def test_grey_becomes_rgb() -> None:
    grey = pixels(channels=1)
    for value in (grey, grey[..., 0], Pil.fromarray(grey[..., 0]), grey / 255.0):
        np.testing.assert_array_equal(made(value), np.repeat(grey, 3, axis=-1))


def test_a_palette_with_transparency_falls_on_the_background() -> None:
    x = np.zeros((8, 8, 4), np.uint8)
    x[:4] = (10, 200, 30, 255)
    out = io.BytesIO()
    Pil.fromarray(x).convert("P").save(out, "PNG", transparency=0)
    palette = Pil.open(io.BytesIO(out.getvalue()))
    assert palette.mode == "P"
    same = made(palette.convert("RGBA"), background=9)
    np.testing.assert_array_equal(made(out.getvalue(), background=9), same)
    assert np.all(same[4:] == 9) and not np.any(same[:4] == 9)


@pytest.mark.parametrize("background", [0, 128, 255])
def test_transparent_pixels_mix_with_the_background(background: int) -> None:
    x = pixels(channels=4)
    x[0, :, 3], x[1, :, 3] = 0, 255
    expected = np.empty((8, 8, 3))
    for y, column in np.ndindex(8, 8):
        alpha = int(x[y, column, 3])
        for c in range(3):
            mixed = int(x[y, column, c]) * alpha + background * (255 - alpha)
            expected[y, column, c] = (mixed + 127) // 255  # to the nearest
    np.testing.assert_array_equal(made(x, background=background), expected)
    assert np.all(expected[0] == background)
    np.testing.assert_array_equal(expected[1], x[1, :, :3])


def test_a_random_background_is_white_without_chance() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    assert np.all(made(clear, background=-1) == 255)
    greys = {int(made(clear, seed=s, background=-1)[0, 0, 0]) for s in range(20)}
    assert len(greys) > 10
    assert all(np.ptp(made(clear, seed=s, background=-1)) == 0 for s in range(5))
    assert np.all(made(clear, seed=0, background=77) == 77)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((8, 8, 2), np.uint8), r"shape \[H, W\] or \[H, W, 1, 3 or 4\], found \[8, 8, 2\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"found \[2, 8, 8, 3\]"),
        (np.zeros(8, np.uint8), r"found \[8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"found \[0, 8, 3\]"),
        ("emoji.png", r"found \[\]"),
        (np.full((8, 8), 200), r"uint8, uint16, or float in \[0, 1\]; found int64, 200 to 200"),
        (np.full((8, 8), 1.5), r"float in \[0, 1\]; found float64, 1.5 to 1.5"),
        (np.full((8, 8), -0.1), r"found float64, -0.1"),
        (np.full((8, 8), np.nan), r"found float64, nan to nan"),
        (np.zeros((8, 8), bool), r"found bool"),
    ],
)  # fmt: skip
def test_what_is_no_image(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(value)


def test_corrupt_bytes_are_the_records_fault_not_the_persons() -> None:
    # A `UserError` would end a run that should only leave the example out.
    with pytest.raises(OSError):
        made(b"no image")
    with pytest.raises(OSError):
        made(encoded(pixels(64, 64))[:200])


# --- sizes -------------------------------------------------------------------------------------


def test_resizing_averages_what_it_shrinks() -> None:
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 200
    small = made(halves)
    assert np.all(small[:, :3] == 0) and np.all(small[:, 5:] == 200)
    checks = np.indices((32, 32)).sum(axis=0) % 2 * 200  # finer than the result can show
    small = made(checks.astype(np.uint8))
    assert np.abs(small[1:-1, 1:-1].astype(int) - 100).max() <= 6


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (5, 3), (1, 1)])
def test_an_image_that_is_not_square_fills_the_square(height: int, width: int) -> None:
    x = np.zeros((height, width, 3), np.uint8)
    x[..., 0] = np.linspace(0, 240, height).astype(int)[:, None]  # red grows downwards
    x[..., 1] = np.linspace(0, 240, width).astype(int)  # green to the right
    out = made(x).astype(int)
    assert np.all(np.diff(out[..., 0], axis=0) >= 0) and np.all(np.diff(out[..., 1], axis=1) >= 0)
    assert np.ptp(out[..., 0], axis=1).max() <= 1 and np.ptp(out[..., 1], axis=0).max() <= 1
    if min(height, width) > 1:
        assert out[-1, 0, 0] > 200 and out[0, -1, 1] > 200, "the far edges are still in it"


@pytest.mark.parametrize(
    ("size", "message"),
    [(10, "size 10 is not a multiple of the patch 4"), (0, "size 0 is not"),
     (36, "size 36 has 9 patches a side, over the 8 position buckets")],
)  # fmt: skip
def test_sizes_that_do_not_fit(size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        IMAGE.arrays(ImageInput(size=size))


def test_arrays_says_what_preprocess_makes() -> None:
    assert IMAGE.arrays(ImageInput(size=32))["pixels"].shape == (32, 32, 3)


# --- augmentation ------------------------------------------------------------------------------


def test_without_chance_nothing_is_augmented() -> None:
    x = pixels()
    np.testing.assert_array_equal(made(x, crop=0.3, flip=True), x)


def test_one_seed_gives_one_image_and_another_another() -> None:
    x = pixels(32, 32)
    settings = {"crop": 0.3, "flip": True}
    np.testing.assert_array_equal(made(x, seed=1, **settings), made(x, seed=1, **settings))
    images = {made(x, seed=s, **settings).tobytes() for s in range(10)}
    assert len(images) == 10


def test_chance_changes_nothing_that_was_not_asked_for() -> None:
    x = pixels()
    for seed in range(5):
        np.testing.assert_array_equal(made(x, seed=seed), x)


def test_flip_mirrors_every_other_image_and_nothing_else() -> None:
    x = pixels()
    mirrored = 0
    for seed in range(60):
        out = made(x, seed=seed, flip=True)
        mirrored += np.array_equal(out, x[:, ::-1])
        assert np.array_equal(out, x) or np.array_equal(out, x[:, ::-1])
    assert 15 < mirrored < 45  # 30 expected, standard deviation 3.9


@pytest.mark.parametrize("least", [0.25, 0.7])
def test_crops_keep_the_stated_area_and_the_shape_and_lie_anywhere(least: float) -> None:
    # Red and green tell the place: a crop's edges show what part of the image it is.
    ramp = np.linspace(0, 250, 200)
    x = np.zeros((200, 200, 3), np.uint8)
    x[..., 0], x[..., 1] = np.round(ramp)[:, None], np.round(ramp)
    areas, centres = [], []
    for seed in range(80):
        out = made(x, seed=seed, crop=least, size=32).astype(float)
        tall, wide = np.ptp(out[..., 0]) / 250, np.ptp(out[..., 1]) / 250
        assert abs(tall - wide) < 0.02
        # The outermost pixels stand half a pixel inside: 32 of them span 31 steps.
        areas.append(tall * wide * (32 / 31) ** 2)
        centres.append([out[..., 0].mean() / 250, out[..., 1].mean() / 250])
    assert least - 0.03 < min(areas) < least + 0.1 and 0.9 < max(areas) < 1.03
    spread = np.ptp(centres, axis=0)
    room = 1 - least**0.5  # of centres, from the smallest crops
    assert np.all(spread > 0.5 * room) and np.all(spread < 1.05 * room)
    assert abs(np.corrcoef(np.transpose(centres))[0, 1]) < 0.4, "across and down apart"


# --- the stem ----------------------------------------------------------------------------------


def run_stem(
    x: np.ndarray, dtype: Any = None, image: Image = IMAGE
) -> tuple[Stream, dict[str, np.ndarray]]:
    declaration = Declaration(image.stem(5))
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape).astype("f") for n, s in declaration.specs.items()}
    call = jax.jit(lambda p, x: declaration.merge(p, dtype)({"pixels": x}))
    return call(p, x), p


def test_tokens_are_a_linear_map_of_pixels_in_minus_one_to_one_plus_positions() -> None:
    x = np.stack([pixels(8, 16), pixels(8, 16, seed=1)])
    stream, p = run_stem(x)
    assert stream.x_BSD.shape == (2, 8, 5) and stream.valid_BS is None
    assert stream.layout == (("image", 8),)
    for b, row, column in np.ndindex(2, 2, 4):
        patch = x[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(float).ravel()
        token = (patch / 127.5 - 1) @ p["embed/kernel"] + p["embed/bias"]
        # 2 rows and 4 columns among 8 buckets each.
        place = p["positions/tables/y"][4 * row] + p["positions/tables/x"][2 * column]
        place = (place - place.mean()) / np.sqrt(place.var() + 1e-6)
        place = place * p["positions/norm/scale"] + p["positions/norm/bias"]
        got = stream.x_BSD[b, row * 4 + column]
        np.testing.assert_allclose(got, token + place, rtol=1e-4, atol=1e-4)
        assert stream.coordinates["y"][0, row * 4 + column] == row / 2
        assert stream.coordinates["x"][0, row * 4 + column] == column / 4


def test_tokens_come_in_the_compute_dtype() -> None:
    stream, _ = run_stem(pixels()[None], jnp.bfloat16)
    exact, _ = run_stem(pixels()[None])
    assert stream.x_BSD.dtype == jnp.bfloat16
    np.testing.assert_allclose(stream.x_BSD.astype(jnp.float32), exact.x_BSD, atol=0.25)

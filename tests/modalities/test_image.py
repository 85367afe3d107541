"""Images: what goes in, what comes out, and what chance may change."""

from __future__ import annotations

import io
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as Pil
from scipy.stats import ks_1samp, ks_2samp, uniform

from mmjax.core.config import key_class
from mmjax.core.errors import UserError
from mmjax.core.migrations import upgrade
from mmjax.core.parameters import Declaration
from mmjax.modalities.base import Input
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.video import Video
from mmjax.nn.stream import Stream
from mmjax.run_config import RunConfig
from mmjax.task import make_input

IMAGE = Image(patch=4, max_positions=8)


def pixels(height: int = 8, width: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def made(value: Any, seed: int | None = None, **settings: Any) -> np.ndarray:
    """Return the preprocessed image; deterministic without a seed."""
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
def test_a_squashed_image_that_is_not_square_fills_the_square(height: int, width: int) -> None:
    x = np.zeros((height, width, 3), np.uint8)
    x[..., 0] = np.linspace(0, 240, height).astype(int)[:, None]  # red grows downwards
    x[..., 1] = np.linspace(0, 240, width).astype(int)  # green to the right
    out = made(x, fit="squash").astype(int)
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
    # Red and green encode the place: a crop's edges show what part of the image it is.
    ramp = np.linspace(0, 250, 200)
    x = np.zeros((200, 200, 3), np.uint8)
    x[..., 0], x[..., 1] = np.round(ramp)[:, None], np.round(ramp)
    areas, centres = [], []
    for seed in range(80):
        out = made(x, seed=seed, crop=least, size=32, fit="squash").astype(float)
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


# --- pictures that are not square --------------------------------------------------------------


def smooth(height: int, width: int) -> np.ndarray:
    """Return a picture: red grows downwards, green to the right, blue in waves."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 120 * np.sin(x / 9) * np.cos(y / 7)
    channels = (y * 250 / height, x * 250 / width, waves)
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (16, 24), (4, 6), (64, 32)])
def test_without_chance_the_short_side_is_resized_and_the_middle_taken(
    height: int, width: int
) -> None:
    """As resizing the whole and then cutting out the middle gives (torchvision, big_vision, IMP).

    Up to one grey level: Pillow rounds between its two passes, whose order depends on the sizes.
    """
    x = pixels(height, width)
    scale = 8 / min(height, width)
    whole = Pil.fromarray(x).resize(
        (round(width * scale), round(height * scale)), Pil.Resampling.BILINEAR
    )
    left, top = (whole.width - 8) // 2, (whole.height - 8) // 2
    expected = np.asarray(whole.crop((left, top, left + 8, top + 8)))
    assert ((whole.width - 8) % 2, (whole.height - 8) % 2) == (0, 0), (
        "the middle is at whole pixels"
    )
    assert np.abs(made(x).astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(made(x, seed=3), made(x))  # nothing random was asked for


@pytest.mark.parametrize(("height", "width"), [(333, 500), (77, 50), (50, 333)])
def test_where_the_long_side_is_no_whole_number_the_middle_is_the_same(
    height: int, width: int
) -> None:
    x = smooth(height, width)
    scale = 32 / min(height, width)
    whole = Pil.fromarray(x).resize(
        (round(width * scale), round(height * scale)), Pil.Resampling.BILINEAR
    )
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
    # The middle is at half a pixel of the whole, at most, which is less than this step of each ramp.
    away = np.abs(made(x, size=32).astype(int) - expected)
    assert away[..., 0].max() <= 0.6 * 250 / whole.height + 1
    assert away[..., 1].max() <= 0.6 * 250 / whole.width + 1


def test_what_is_square_and_whole_is_the_same_however_it_fits() -> None:
    x = pixels(24, 24)
    expected = np.asarray(Pil.fromarray(x).resize((8, 8), Pil.Resampling.BILINEAR))
    for fit in ("crop", "pad", "squash"):
        for seed in (None, 0, 1):
            np.testing.assert_array_equal(made(x, seed=seed, fit=fit), expected)
    assert np.array_equal(made(pixels(), fit="pad"), pixels())


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100), (3, 200)])
@pytest.mark.parametrize("channels", [3, 4])
def test_padding_shows_the_whole_on_the_background(height: int, width: int, channels: int) -> None:
    x = pixels(height, width, channels)
    x[..., 3:] = 255
    scale = 32 / max(height, width)
    inner = (max(round(width * scale), 1), max(round(height * scale), 1))
    expected = np.full((32, 32, 3), 77, np.uint8)
    left, top = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    small = np.asarray(Pil.fromarray(x).resize(inner, Pil.Resampling.BILINEAR))[..., :3]
    expected[top : top + inner[1], left : left + inner[0]] = small
    np.testing.assert_array_equal(made(x, size=32, fit="pad", background=77), expected)


def boxes_of(value: Any, count: int, **settings: Any) -> np.ndarray:
    """Return left, top, right and bottom of what is cut out of a picture, `[count, 4]`."""
    found, resize = [], Pil.Image.resize

    def noted(self: Any, size: Any, resample: Any = None, box: Any = None) -> Any:
        found.append(box)
        return resize(self, size, resample, box)

    with mock.patch.object(Pil.Image, "resize", noted):
        for seed in range(count):
            made(value, seed=seed, **settings)
    return np.array(found)


def inception(size: tuple[int, int], least: float, aspect: tuple[float, float], count: int) -> Any:
    """Return areas and aspects by rejection, as in Szegedy et al. 2015 and torchvision's `RandomResizedCrop`."""
    rng = np.random.default_rng(99)
    width, height = size
    area = rng.uniform(least, 1, (count, 10)) * width * height
    ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]), (count, 10)))
    fits = (np.sqrt(area * ratio) <= width) & (np.sqrt(area / ratio) <= height)
    first = fits.argmax(axis=1)
    kept = np.flatnonzero(fits.any(axis=1))
    return area[kept, first[kept]] / (width * height), ratio[kept, first[kept]]


@pytest.mark.parametrize(
    ("size", "least", "aspect"),
    [((30, 20), 0.5, (0.5, 2.0)), ((20, 20), 0.08, (3 / 4, 4 / 3)), ((20, 30), 0.3, (1.0, 1.5))],
)
def test_random_crops_have_areas_and_aspects_in_their_ranges(
    size: tuple[int, int], least: float, aspect: tuple[float, float]
) -> None:
    x = pixels(size[1], size[0])
    boxes = boxes_of(x, 1500, crop=least, crop_aspect=aspect)
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= size[0]).all() and (bottom <= size[1]).all()
    areas, ratios = inception(size, least, aspect, 20_000)
    wide, tall = right - left, bottom - top
    nearest = min(max(size[0] / size[1], aspect[0]), aspect[1])
    middle = (min(size[0], size[1] * nearest), min(size[1], size[0] / nearest))
    fallback = (np.abs(wide - middle[0]) < 1e-9) & (
        np.abs(tall - middle[1]) < 1e-9
    )  # none of ten fitted
    assert fallback.mean() < 0.1
    wide, tall, left, top = (v[~fallback] for v in (wide, tall, left, top))
    area, ratio = wide * tall / (size[0] * size[1]), wide / tall
    assert least - 1e-9 <= area.min() < least + 0.05
    assert aspect[0] - 1e-9 <= ratio.min() and ratio.max() <= aspect[1] + 1e-9
    assert ks_2samp(area, areas).pvalue > 0.01 and ks_2samp(ratio, ratios).pvalue > 0.01
    for place, room in ((left, size[0] - wide), (top, size[1] - tall)):
        assert ks_1samp(place / room, uniform.cdf).pvalue > 0.01
    assert abs(np.corrcoef(left / (size[0] - wide), top / (size[1] - tall))[0, 1]) < 0.1


def test_a_random_crop_becomes_a_square_and_shows_what_is_in_its_box() -> None:
    x = smooth(200, 300)
    boxes = boxes_of(x, 20, crop=0.2, crop_aspect=(0.5, 2.0), size=32)
    assert np.ptp((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])) > 0.5
    for seed, (left, top, right, bottom) in enumerate(boxes):
        out = made(x, seed=seed, crop=0.2, crop_aspect=(0.5, 2.0), size=32).astype(float)
        rows = (top + (np.arange(32) + 0.5) * (bottom - top) / 32 - 0.5) * 250 / 200
        columns = (left + (np.arange(32) + 0.5) * (right - left) / 32 - 0.5) * 250 / 300
        inner = slice(3, -3)  # at the edges of the picture less is averaged
        np.testing.assert_allclose(out[inner, 16, 0], rows[inner], atol=1.5)
        np.testing.assert_allclose(out[16, inner, 1], columns[inner], atol=1.5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((900, 10), (450 - 20 / 3, 0, 450 + 20 / 3, 10)),
        ((10, 900), (0, 450 - 20 / 3, 10, 450 + 20 / 3)),
    ],
)
def test_where_no_crop_fits_the_middle_is_taken(size: Any, expected: Any) -> None:
    boxes = boxes_of(pixels(size[1], size[0]), 5, crop=0.9)
    np.testing.assert_allclose(boxes, np.tile(expected, (5, 1)), atol=1e-9)


def test_a_crop_of_older_configs_has_the_aspect_of_the_picture_to_the_bit() -> None:
    """Their streams are stable: one draw for the sides, one for the place across and one for that down."""
    x, size = pixels(20, 30), np.array([30, 20])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sides = size * np.sqrt(rng.uniform(0.3, 1.0))
        left, top = rng.uniform(0, 30 - sides[0]), rng.uniform(0, 20 - sides[1])
        box = (left, top, left + sides[0], top + sides[1])
        expected = Pil.fromarray(x).resize((8, 8), Pil.Resampling.BILINEAR, box=box)
        np.testing.assert_array_equal(made(x, seed=seed, crop=0.3, fit="squash"), expected)


def test_older_configs_squash_and_others_say_how() -> None:
    modalities = {n: {"name": n} for n in ("image", "video", "colours", "text")}
    inputs = {"image": {}, "video": {"fit": "pad"}, "colours": {"size": 8}, "text": {}}
    config = {"modalities": modalities, "tasks": {"a": {"inputs": inputs}}}
    assert upgrade(config, 1)["tasks"]["a"]["inputs"] == {
        "image": {"fit": "squash"},
        "video": {"fit": "pad"},
        "colours": {"size": 8, "fit": "squash"},
        "text": {},
    }
    assert upgrade(config, 2) == config
    assert key_class("tasks.a.inputs.image.fit", RunConfig) == "schedule"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit": "corp"}, "fit is 'corp'. Did you mean 'crop'?"),
        ({"crop": 2.0}, "crop is 2.0; expected an area above 0 and up to 1"),
        ({"crop": 0.0}, "crop is 0.0"),
        ({"crop": math.nan}, "crop is nan"),
        ({"crop_aspect": (0.5,)}, r"crop_aspect is \[0.5\]"),
        ({"crop_aspect": (2.0, 0.5)}, r"crop_aspect is \[2.0, 0.5\]"),
        ({"crop_aspect": (0.0, 1.0)}, r"crop_aspect is \[0.0, 1.0\]"),
        ({"background": 256}, "background is 256; expected 0 to 255, or -1"),
        ({"background": -2}, "background is -2"),
    ],
)
@pytest.mark.parametrize(
    "modality", [Image(patch=4), Colours(), Video(patch=4)], ids=lambda m: type(m).__name__
)
def test_settings_that_mean_nothing_are_refused_by_key(
    modality: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=rf"^here[.:] ?{words}"):
        make_input("x", {"size": 8, **settings}, {"x": modality}, "here")


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


def test_a_class_token_comes_first_and_leaves_the_others_as_they_are() -> None:
    with_token = Declaration(Image(patch=4, max_positions=8, class_token=True).stem(6))
    without = Declaration(IMAGE.stem(6))
    assert set(with_token.specs) - set(without.specs) == {"class_token"}
    rng = np.random.default_rng(0)
    p = {n: rng.normal(size=s.shape).astype("f") for n, s in with_token.specs.items()}
    arrays = {"pixels": pixels()[None]}
    own, plain = with_token.merge(p)(arrays), without.merge(p)(arrays)
    np.testing.assert_array_equal(own.x_BSD[0, 0], p["class_token"])
    np.testing.assert_array_equal(own.x_BSD[:, 1:], plain.x_BSD)
    assert own.layout == (("image", 5),)

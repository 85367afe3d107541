"""The one opener of pictures: which formats, how large, which way up, and how many bits."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image as Pil

from mmjax.convert.values import check_image
from mmjax.core.config import key_class
from mmjax.core.errors import UserError
from mmjax.core.migrations import upgrade
from mmjax.data import pictures
from mmjax.modalities.colours import Colours
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.video import Video, VideoInput
from mmjax.run_config import RunConfig
from mmjax.sources.tfds import _decode_picture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(picture: Pil.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def with_orientation(array: np.ndarray, orientation: int, form: str) -> bytes:
    exif = Pil.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    return encoded(Pil.fromarray(array), form, exif=exif, **options)


def decoded(value: Any, channels: int = 3) -> np.ndarray:
    """Return a picture as a TFDS feature gives it."""
    return _decode_picture(tfds.features.Image(shape=(None, None, channels)), value)


def squashed(modality: Any, value: bytes) -> np.ndarray:
    """Return what a modality makes of a picture of 12 x 8, in 8 x 8."""
    settings = (
        ImageInput(size=8) if not isinstance(modality, Video) else VideoInput(frames=1, size=8)
    )
    return next(iter(modality.preprocess(settings, value, None).values()))


# --- formats -----------------------------------------------------------------------------------


def test_a_program_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is code: Pillow would hand it to Ghostscript, in a process of its own."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    assert Pil.open(io.BytesIO(EPS)).format == "EPS"
    monkeypatch.setattr(subprocess, "Popen", never)
    openers = (
        pictures.open_picture, Image().raw, Video().raw, Colours().raw, check_image, decoded,
        lambda data: Video().raw([data]),
    )  # fmt: skip
    for opener in openers:
        with pytest.raises(OSError, match="no picture of a known format"):
            opener(EPS)


def test_no_other_module_opens_pictures() -> None:
    package = Path(pictures.__file__).parents[1]
    openers = re.compile(r"\b(Image|Pil|PIL)\.open\(|cv2|imageio|imread")
    found = {p.name for p in package.rglob("*.py") if openers.search(p.read_text())}
    assert found == {"pictures.py"}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"])
def test_common_formats_are_read(form: str) -> None:
    flat = np.full((8, 8, 3), 128, np.uint8)
    image = Image().raw(encoded(Pil.fromarray(flat), form))
    assert np.abs(np.asarray(image)[..., :3].astype(int) - 128).max() <= 2


def test_bytes_of_no_format_have_a_message_that_is_the_same_in_every_process() -> None:
    with pytest.raises(
        Pil.UnidentifiedImageError, match="^the bytes are no picture of a known format"
    ):
        pictures.open_picture(b"no picture at all")


# --- bounds ------------------------------------------------------------------------------------


def tiff(tile: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels in one tile, which holds `tile ** 2`."""
    data = zlib.compress(bytes(tile * tile))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 8 + 2 + 12 * 10 + 4), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is there `count` times more."""
    data = encoded(Pil.fromarray(PIXELS), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


BOMB = encoded(Pil.new("1", (9000, 9000)))  # 10 kB, 324 MB as RGBA


@pytest.mark.parametrize(
    "opener",
    [Image().raw, Video().raw, Colours().raw, check_image, decoded],
    ids=["image", "video", "colours", "check_image", "decoded"],
)
def test_a_picture_that_would_fill_the_memory_is_not_decoded(opener: Any) -> None:
    """Before any pixel: what is allocated stays small."""
    tracemalloc.start()
    with pytest.raises(UserError, match="9000 x 9000 pixels is over the bound of 67108864"):
        opener(BOMB)
    assert tracemalloc.get_traced_memory()[1] < 10 * len(BOMB) + 2**20
    tracemalloc.stop()


def test_the_bound_is_of_what_is_stored() -> None:
    data = encoded(Pil.fromarray(PIXELS))
    for modality in (Image(max_pixels=96), Video(max_pixels=96), Colours(max_pixels=96)):
        modality.raw(data)
    small = (Image(max_pixels=95), Video(max_pixels=95), Colours(max_pixels=95))
    for modality in small:
        for value in (data, Pil.open(io.BytesIO(data))):
            with pytest.raises(UserError, match="12 x 8 pixels is over the bound of 95"):
                modality.raw(value)
    with pytest.raises(UserError, match="12 x 8 pixels is over the bound of 95"):
        Video(max_pixels=95).raw([data])


@pytest.mark.parametrize("modality", [Image, Video, Colours])
@pytest.mark.parametrize("bound", [0, 2**28])
def test_a_bound_that_bounds_nothing_is_refused(modality: Any, bound: int) -> None:
    with pytest.raises(UserError, match=rf"max_pixels is {bound}; it must be in \[1, 178956970\]"):
        modality(max_pixels=bound)


def test_tiles_larger_than_the_picture_count() -> None:
    assert np.asarray(pictures.rgb(pictures.open_picture(tiff(16)))).shape == (16, 16, 4)
    with pytest.raises(UserError, match="16 x 16 pixels in tiles is over the bound"):
        pictures.open_picture(tiff(1024), 2**19)


def test_a_jpeg_of_endless_scans_is_not_decoded() -> None:
    assert pictures.open_picture(scans(0)).size == (12, 8)
    with pytest.raises(UserError, match="more than 64 scans"):
        pictures.open_picture(scans(100))


# --- which way up ------------------------------------------------------------------------------

# The first row and column by EXIF 2.32, as NumPy.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_seen_the_right_way_up(orientation: int, form: str) -> None:
    data = with_orientation(PIXELS, orientation, form)
    expected = UPRIGHT[orientation](PIXELS)
    for value in (data, Pil.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(Image().raw(value)), expected)
        [frame] = Video().raw(value)
        np.testing.assert_array_equal(np.asarray(frame), expected)
    np.testing.assert_array_equal(np.asarray(Video().raw([data])[0]), expected)
    np.testing.assert_array_equal(decoded(data), expected)
    upright = encoded(Pil.fromarray(np.ascontiguousarray(expected)))
    for modality in (Image(patch=4), Colours(), Video(patch=4)):
        np.testing.assert_array_equal(squashed(modality, data), squashed(modality, upright))


def test_a_jpeg_as_a_phone_stores_it() -> None:
    tall = np.zeros((32, 32, 3), np.uint8)
    tall[:16] = 255  # the upper half is light
    data = with_orientation(np.ascontiguousarray(np.rot90(tall)), 6, "JPEG")
    assert np.abs(np.asarray(Image().raw(data)).astype(int) - tall).mean() < 2


def test_damaged_exif_says_nothing() -> None:
    data = encoded(Pil.fromarray(PIXELS), exif=b"Exif\0\0no header of a TIFF at all")
    np.testing.assert_array_equal(np.asarray(Image().raw(data)), PIXELS)


def test_a_given_picture_stays_as_it_was() -> None:
    picture = Pil.open(io.BytesIO(with_orientation(PIXELS, 6, "PNG")))
    Image().raw(picture)
    assert picture.size == (12, 8) and picture.getexif()[0x0112] == 6


# --- more than 8 bits --------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)


def pgm(array: np.ndarray) -> bytes:
    return b"P5 12 8 65535\n" + array.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [encoded(Pil.fromarray(RAMP)), encoded(Pil.fromarray(RAMP), "TIFF"), pgm(RAMP)],
    ids=["PNG", "TIFF", "PGM"],
)
def test_grey_of_16_bits_keeps_its_upper_8(data: bytes) -> None:
    expected = RAMP.astype(int) >> 8
    assert len(np.unique(expected)) > 90
    for image in (Image().raw(data), Image().raw(Pil.open(io.BytesIO(data))), *Video().raw(data)):
        rgba = np.asarray(image).astype(int)
        assert np.abs(rgba[..., :3] - expected[..., None]).max() <= 2
        assert (rgba[..., 3:] == 255).all()
    assert np.abs(decoded(data).astype(int) - expected[..., None]).max() <= 2
    check_image(data)


def test_grey_of_16_bits_stays_whole_where_the_data_set_says_so() -> None:
    feature = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16)
    np.testing.assert_array_equal(
        _decode_picture(feature, encoded(Pil.fromarray(RAMP))), RAMP[..., None]
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_16_bits(channels: int) -> None:
    array = RNG.integers(0, 2**16, (8, 12, channels), dtype=np.uint16)
    rgb = np.asarray(Image().raw(array)).astype(int)[..., :3]
    assert np.abs(rgb - (array[..., :3].astype(int) >> 8)).max() <= 2
    grey = np.asarray(Image().raw(array[..., 0])).astype(int)[..., 0]
    assert np.abs(grey - (array[..., 0].astype(int) >> 8)).max() <= 2


def test_floats_are_of_0_to_1_and_integers_of_32_bits_are_refused() -> None:
    unit = Pil.fromarray((RAMP / 65535).astype(np.float32))
    found = np.asarray(Image().raw(encoded(unit, "TIFF"))).astype(int)[..., 0]
    assert np.abs(found - np.round(RAMP / 257).astype(int)).max() <= 1
    with pytest.raises(UserError, match=r"float in \[0, 1\]; found float32, 0.0 to 65535"):
        Image().raw(encoded(Pil.fromarray(RAMP.astype(np.float32)), "TIFF"))
    with pytest.raises(UserError, match="32-bit integers of unknown range"):
        Image().raw(encoded(Pil.fromarray(RAMP.astype(np.int32)), "TIFF"))


def test_masks_of_a_data_set_are_classes_and_other_palettes_are_colours() -> None:
    picture = Pil.fromarray(RNG.integers(0, 3, (8, 12), dtype=np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    data = encoded(picture)
    np.testing.assert_array_equal(decoded(data, 1)[..., 0], np.asarray(picture))
    np.testing.assert_array_equal(decoded(data), np.asarray(picture.convert("RGB")))


# --- moving pictures ---------------------------------------------------------------------------


def moving(count: int, form: str = "GIF", side: int = 8) -> bytes:
    frames = [Pil.new("L", (side, side), i * 20 % 256) for i in range(count)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_frames_of_a_gif_are_counted_without_decoding(count: int) -> None:
    data = moving(count)
    assert Pil.open(io.BytesIO(data)).n_frames == count
    assert pictures.gif_frames(data, 100) == count
    assert pictures.gif_frames(data, 3) == min(count, 4)
    for cut in range(13, len(data)):
        assert pictures.gif_frames(data[:cut], 100) <= count


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_a_moving_picture_of_too_many_frames_is_not_decoded(form: str) -> None:
    data = moving(6, form)
    assert len(Video(max_frames=6).raw(data)) == 6
    with pytest.raises(UserError, match="more than 5 frames"):
        Video(max_frames=5).raw(data)
    with pytest.raises(UserError, match="more than 5 frames"):
        Video(max_frames=5).raw([encoded(Pil.new("L", (8, 8)))] * 6)


def test_all_frames_of_a_moving_picture_are_bounded_together() -> None:
    data = moving(33)
    assert len(Video(max_pixels=132).raw(data)) == 33
    with pytest.raises(UserError, match="33 frames of 8 x 8 pixels is over the bound of 16 times"):
        Video(max_pixels=131).raw(data)


def test_only_frames_that_are_taken_are_decoded() -> None:
    """The others may be damaged, or many."""
    good = encoded(Pil.fromarray(PIXELS))
    frames = [good[:60]] * 10 + [good] * 2 + [good[:60]] * 10
    arrays = Video(tube=2, patch=4).preprocess(VideoInput(frames=2, size=8), frames, None)
    assert arrays["pixels"].shape == (2, 8, 8, 3)
    with pytest.raises(OSError):
        Video(tube=2, patch=4).preprocess(VideoInput(frames=4, size=8), frames, None)


def test_the_opener_needs_no_other_library() -> None:
    code = "import mmjax.data.pictures, sys; assert not {'jax', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# --- older configs -----------------------------------------------------------------------------


def test_older_configs_keep_the_bounds_of_their_time() -> None:
    """Pillow's own, and none on the number of frames; a run may change them at any time."""
    names = ("image", "video", "colours", "text")
    config = {"modalities": {name: {"name": name} for name in names}}
    upgraded = upgrade(config, 1)["modalities"]
    assert upgraded["image"] == {"name": "image", "max_pixels": 178_956_970}
    assert upgraded["colours"] == {"name": "colours", "max_pixels": 178_956_970}
    assert upgraded["video"]["max_pixels"] == 178_956_970 and upgraded["video"]["max_frames"] > 1e9
    assert not {"max_pixels", "max_frames"} & set(upgraded["text"])
    Video(**{key: value for key, value in upgraded["video"].items() if key != "name"})
    for key in ("image.max_pixels", "video.max_frames"):
        assert key_class(f"modalities.{key}", RunConfig, {"modalities": upgraded}) == "free"

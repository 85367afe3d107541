"""Video clips of drawings that move over a plain background, with captions; drawn when they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import FREE
from mmjax.core.errors import RecordError, UserError
from mmjax.data import order
from mmjax.data.identity import facts_of, identity, records_of
from mmjax.modalities.image import Image
from mmjax.sources.base import Cached, Example, Examples, Source, integer
from mmjax.sources.tfds import Tfds

DIRECTIONS = "right|down right|down|down left|left|up left|up|up right".split("|")
"""Direction k points k eighths of a turn from right, clockwise."""

_FORMAT = (
    1  # of the clips: to be raised with any change that draws another clip for a seed and index
)
_FIELDS = ("image", "caption", "concept")
_SIDE = 0.4  # of a drawing, as a fraction of the frame's side, as are the others
_TRAVEL = (0.35, 0.6)  # least and most way of a drawing in a clip
_MARGIN = 0.15  # nearer to the edge no centre comes: an eighth of a drawing at most is out of sight
_TRIES = 4  # places tried for a later drawing
_LIGHTEST, _DARKEST = 255, 176  # of the background's red, green and blue
_PAIR_BITS = 30  # a field of a batch is an int32
_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MovingEmoji(Source):
    """Clips of the drawings in a split of a data set with fields `image`, `caption` and `concept`.

    Each clip shows one or two drawings, each on a straight way at a constant speed and in sight from the
    first frame to the last. What is held out there is held out here: concepts, drawings. Example
    `i` begins with drawing `i // clips`; the rest is drawn from integers that (seed, i) fixes.

    Fields: `video` uint8 [frames, size, size, 3]; `caption`, like "motorway moving down and guitar moving
    up left"; `concept` and `direction` (0 to 7, see `DIRECTIONS`) of the first drawing; `pair`, a number
    that clips share if and only if they show the same concepts moving in the same directions.

    Attributes:
      dataset, split, folder: as for `tfds`.
      clips: clips per drawing.
      actors: drawings in a clip, 1 or 2; two are of different concepts.
      frames: length of a clip.
      size: height and width of a frame in pixels.
      seed: of the clips.
    """

    split: str
    dataset: str = "emoji"
    folder: str = field(default="", metadata=FREE)
    clips: int = 1
    actors: int = 2
    frames: int = 8
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, clips=COUNT, actors="[1, 2]", frames=COUNT, size="[8, 2147483647]")

    @property
    def label(self) -> str:
        return self.split

    def open(self) -> Examples:
        return MovingEmojiExamples(self, Tfds(self.dataset, self.split, self.folder).open())


@dataclass(frozen=True)
class Way:
    """The motion of a drawing: its direction, and its centre as fractions of the frame, [frames, (x, y)]."""

    direction: int
    centres: np.ndarray


class MovingEmojiExamples(Examples):
    """Clips of the drawings of `inner`."""

    def __init__(self, source: MovingEmoji, inner: Examples):
        self._source, self._inner = source, Cached(inner, _CACHE_BYTES)
        self.description = f"moving_emoji of {inner.description}"
        self.fields = ("video", "caption", "concept", "direction", "pair")
        self.identity = _identity(source, inner)
        self.credits = inner.credits
        self.labels = {"direction": DIRECTIONS}
        self._check(inner)

    def _check(self, inner: Examples) -> None:
        missing = [name for name in _FIELDS if name not in inner.fields]
        if missing:
            raise UserError(
                f"moving_emoji reads the fields {', '.join(_FIELDS)}; {inner.description} has no "
                f"'{missing[0]}'. It has: {', '.join(inner.fields)}."
            )

    def __len__(self) -> int:
        return len(self._inner) * self._source.clips

    def __getitem__(self, index: int) -> Example:
        source = self._source
        draws = _Draws(source.seed, index)
        first = index // source.clips
        actors = [self._inner[first]]
        if source.actors == 2:
            actors.append(self._another(first, draws.integer(len(self._inner))))
        ways = _ways(len(actors), source.frames, draws)
        light = [_DARKEST + draws.integer(_LIGHTEST - _DARKEST + 1) for _ in range(3)]
        phrases = [
            f"{actor['caption']} moving {DIRECTIONS[way.direction]}"
            for actor, way in zip(actors, ways, strict=True)
        ]
        return {
            "video": _film([a["image"] for a in actors], ways, tuple(light), source.size),
            "caption": " and ".join(phrases),
            "concept": integer("concept", actors[0]["concept"]),
            "direction": ways[0].direction,
            "pair": pair(
                [integer("concept", a["concept"]) for a in actors], [w.direction for w in ways]
            ),
        }

    def column(self, name: str) -> list[int]:
        if name != "concept":
            return super().column(name)
        return [c for c in self._inner.column(name) for _ in range(self._source.clips)]

    def _another(self, first: int, offset: int) -> Example:
        """Return the first drawing of another concept from `first + offset` on."""
        concept, count = self._inner[first]["concept"], len(self._inner)
        for step in range(count):
            drawing = self._inner[(first + offset + step) % count]
            if drawing["concept"] != concept:
                return drawing
        raise UserError(
            f"{self.description}: two drawings per clip need two concepts; there is only one."
        )


def _identity(source: MovingEmoji, inner: Examples) -> str:
    settings = [source.clips, source.actors, source.frames, source.size, source.seed]
    whole = json.dumps(["moving_emoji", _FORMAT, settings, facts_of(inner.identity)])
    return identity(hashlib.sha256(whole.encode()).hexdigest(), records_of(inner.identity))


def pair(concepts: list[int], directions: list[int]) -> int:
    """Return a number below 2^30 for the concepts and their directions; their order does not matter.

    Raises:
      RecordError: a concept's number is too large: 2^27 for one drawing, 2^12 for two.
    """
    bits = _PAIR_BITS // len(concepts)
    codes = sorted(c * 8 + d for c, d in zip(concepts, directions, strict=True))
    if codes[0] < 0 or codes[-1] >= 1 << bits:
        raise RecordError(
            f"moving_emoji: concepts {concepts} are not all in [0, {(1 << bits) // 8}), the numbers that "
            f"'pair' can hold for clips of {len(concepts)}."
        )
    return sum(code << (bits * place) for place, code in enumerate(codes))


class _Draws:
    """Random numbers of one clip, from our own stream, so that no version of a library changes them."""

    def __init__(self, seed: int, index: int):
        key = order.fold(seed, order.name_key("moving_emoji"), index)
        self._values = iter(order.stream(key, 32).tolist())

    def integer(self, below: int) -> int:
        """Draw an integer in [0, below)."""
        return int(next(self._values)) * below >> 64

    def fraction(self, least: float, most: float) -> float:
        """Draw a number in [least, most)."""
        return least + (most - least) * (int(next(self._values)) >> 11) * 2.0**-53


def _ways(actors: int, frames: int, draws: _Draws) -> list[Way]:
    """Return a way for each drawing; a later one keeps away from the first as well as it can in a few tries."""
    ways = [_way(draws.integer(8), frames, draws)]
    for _ in range(actors - 1):
        # One direction for all tries, so that none is preferred.
        direction = draws.integer(8)
        tries = [_way(direction, frames, draws) for _ in range(_TRIES)]
        ways.append(max(tries, key=lambda way: _distance(way, ways[0])))
    return ways


def _way(direction: int, frames: int, draws: _Draws) -> Way:
    angle = direction * np.pi / 4
    travel = draws.fraction(*_TRAVEL) * np.array([np.cos(angle), np.sin(angle)])
    # The middle of the way lies where both its ends keep the margin.
    least = _MARGIN + np.abs(travel) / 2
    middle = np.array([draws.fraction(low, 1 - low) for low in least])
    times = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    return Way(direction, middle + times[:, None] * travel)


def _distance(one: Way, other: Way) -> float:
    """Return the least distance of the two centres in any frame."""
    return float(np.hypot(*(one.centres - other.centres).T).min())


def _film(images: list[Any], ways: list[Way], light: tuple[int, ...], size: int) -> np.ndarray:
    """Return a clip, uint8 `[frames, size, size, 3]`; earlier drawings lie over later ones."""
    from PIL import Image as Pil

    side = max(round(_SIDE * size), 1)
    # One tall picture of all frames, so far apart that no drawing reaches into the next.
    step, frames = size + side, len(ways[0].centres)
    film = Pil.new("RGB", (size, step * frames), light)
    for image, way in reversed(list(zip(images, ways, strict=True))):
        drawing = Image().raw(image).convert("RGBA").resize((side, side), resample=2)
        corners = np.round(way.centres * size - side / 2).astype(int).tolist()
        for time, (left, top) in enumerate(corners):
            film.paste(drawing, (left, top + step * time), drawing)
    pixels = np.asarray(film).reshape(frames, step, size, 3)
    return np.ascontiguousarray(pixels[:, :size])

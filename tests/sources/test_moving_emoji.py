"""Moving drawings: what a clip shows is what its text states, and every clip is a function of its index."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.modalities.base import Input
from mmjax.modalities.video import Video, VideoInput
from mmjax.sources.base import Example, Examples
from mmjax.sources.moving_emoji import DIRECTIONS, MovingEmoji, MovingEmojiExamples, pair
from mmjax.sources.tfds import Tfds
from mmjax.task import RowSpec

# Right, down right, ...: y grows downwards.
STEPS = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
BLACK, RED = (0, 0, 0), (200, 0, 0)


class Squares(Examples):
    """Opaque squares of these colours, each a concept of its own by default."""

    description, identity, fields = "squares", "squares", ("image", "caption", "concept")

    def __init__(self, colours: Any, concepts: Any = None):
        self.colours = colours
        self.concepts = range(len(colours)) if concepts is None else concepts

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, index: int) -> Example:
        image = np.full((64, 64, 4), 255, np.uint8)
        image[..., :3] = self.colours[index]
        return {"image": image, "caption": f"square {index}", "concept": self.concepts[index]}


def squares(inner: Examples | None = None, **changes: Any) -> MovingEmojiExamples:
    source = MovingEmoji("any", **changes)
    return MovingEmojiExamples(source, inner or Squares([BLACK, RED]))


@pytest.fixture(scope="module")
def emoji(emoji_dir):
    return lambda split, **changes: MovingEmoji(split, folder=str(emoji_dir), **changes).open()


# --- what is seen ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**64 - 1), frames=st.integers(2, 9), size=st.sampled_from([32, 64, 100])
)
def test_one_drawing_moves_straight_and_steadily_where_the_caption_says(seed, frames, size):
    clip = squares(Squares([BLACK]), actors=1, seed=seed, frames=frames, size=size)[0]
    video = clip["video"].astype(int)
    assert clip["caption"] == f"square 0 moving {DIRECTIONS[clip['direction']]}"
    background = video.max(axis=(0, 1, 2))
    shown = (video != background).any(axis=-1)
    assert not video[shown].any()
    side = round(0.4 * size)
    lefts, tops = [], []
    for frame in shown:
        rows, columns = frame.any(axis=1).nonzero()[0], frame.any(axis=0).nonzero()[0]
        # In sight: at the edge an eighth may be cut off.
        assert min(len(rows), len(columns)) >= 0.85 * side - 1
        assert frame.sum() == len(rows) * len(columns)
        tops.append(rows[0] if rows[0] > 0 else rows[-1] + 1 - side)
        lefts.append(columns[0] if columns[0] > 0 else columns[-1] + 1 - side)
    _check_way(np.array([lefts, tops]).T, STEPS[clip["direction"]], size)


def _check_way(corners: np.ndarray, step: tuple[int, int], size: int) -> None:
    way = corners[-1] - corners[0]
    assert 0.35 * size - 2 <= np.hypot(*way) <= 0.6 * size + 2
    unit = np.array(step) / np.hypot(*step)
    assert way @ unit >= np.hypot(*way) - 1  # along the direction, within rounding
    steady = corners[0] + np.linspace(0, 1, len(corners))[:, None] * way
    assert np.abs(corners - steady).max() <= 1.5


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_two_drawings_move_as_the_caption_says_and_the_first_is_in_front(seed):
    data = squares(Squares([BLACK, RED]), seed=seed)
    clip = data[0]
    one, two = clip["caption"].split(" and ")
    assert one.startswith("square 0 moving ") and two.startswith("square 1 moving ")
    assert one.removeprefix("square 0 moving ") == DIRECTIONS[clip["direction"]]
    black = (clip["video"] == BLACK).all(axis=-1)
    # Nothing hides the first one: it is a whole rectangle in every frame.
    for frame in black:
        assert frame.sum() == frame.any(axis=0).sum() * frame.any(axis=1).sum() > 20 * 20
    second = DIRECTIONS.index(two.removeprefix("square 1 moving "))
    assert clip["pair"] == pair([0, 1], [clip["direction"], second])
    # The second one, where it is in full sight, moves its own way.
    red = (clip["video"] == RED).all(axis=-1)
    whole = [t for t in range(8) if red[t].sum() == 26 * 26]
    if len(whole) > 1:
        places = np.array(
            [[red[t].any(axis=0).argmax(), red[t].any(axis=1).argmax()] for t in whole]
        )
        way = places[-1] - places[0]
        assert way @ np.array(STEPS[second]) >= (np.abs(way).max() - 2)


def test_drawings_are_laid_over_the_background_by_their_alpha():
    class Glass(Squares):
        def __getitem__(self, index: int) -> Example:
            example = dict(super().__getitem__(index))
            image = np.array(example["image"])
            image[..., 3] = 51  # a fifth
            return {**example, "image": image}

    data = squares(Glass([BLACK]), actors=1, clips=5)
    for clip in data:
        video = clip["video"].reshape(-1, 3).astype(int)
        background = video.max(axis=0)
        mixed = video[(video != background).all(axis=1)]
        assert np.abs(mixed - background * 0.8).max() <= 1
        assert (background >= 176).all()


def test_drawings_are_shrunk_by_averaging():
    class Checks(Squares):
        def __getitem__(self, index: int) -> Example:
            image = np.full((64, 64, 4), 255, np.uint8)
            image[..., :3] = (np.indices((64, 64)).sum(axis=0) % 2 * 255)[..., None]
            return {**super().__getitem__(index), "image": image}

    video = squares(Checks([BLACK]), actors=1)[0]["video"]
    background = video.max(axis=(0, 1, 2))
    drawn = video[(video != background).any(axis=-1)]
    assert len(drawn) > 8 * 500
    assert drawn.min() > 100 and drawn.max() < 155


def test_every_direction_and_many_backgrounds_come():
    clips = list(squares(clips=400))
    for place in (0, 1):
        names = [c["caption"].split(" and ")[place].split(" moving ")[1] for c in clips]
        counts = [names.count(direction) for direction in DIRECTIONS]
        assert sum(counts) == 800 and min(counts) > 60 and max(counts) < 140
    assert len({c["video"].reshape(-1, 3).max(axis=0).tobytes() for c in clips}) > 700


def test_two_drawings_are_mostly_apart():
    hidden = []
    for clip in squares(clips=100):
        red = (clip["video"] == RED).all(axis=-1).sum(axis=(1, 2))
        hidden.append(1 - red.mean() / 26**2)
    assert np.mean(hidden) < 0.25


# --- a function of the index -------------------------------------------------------------------


def same(one: Example, two: Example) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_clips_do_not_depend_on_who_reads_them_or_when():
    inner = Squares([(i, i, i) for i in range(20)])
    forth = list(squares(inner, clips=3))
    back = squares(inner, clips=3)
    assert all(same(back[i], forth[i]) for i in reversed(range(60)))
    with ThreadPoolExecutor(8) as pool:
        threads = list(pool.map(squares(inner, clips=3).__getitem__, range(60)))
    assert all(same(a, b) for a, b in zip(forth, threads, strict=True))


def test_clips_of_a_seed_stay_the_same_for_ever():
    data = squares(Squares([BLACK, RED, (0, 0, 99)]), seed=7)
    for clip, golden in zip(data, GOLDEN, strict=True):
        black = (clip["video"][0] == data._inner[clip["concept"]]["image"][0, 0, :3]).all(axis=-1)
        corner = (int(black.any(axis=0).argmax()), int(black.any(axis=1).argmax()))
        light = tuple(clip["video"].max(axis=(0, 1, 2)).tolist())
        assert (clip["caption"], clip["pair"], light, corner) == golden


# Caption, pair, background, and where the first drawing stands in the first frame.
GOLDEN: list[Any] = [
    ("square 0 moving up right and square 1 moving down right", 294919, (243, 217, 177), (2, 26)),
    ("square 1 moving up right and square 0 moving up left", 491525, (208, 250, 222), (0, 36)),
    ("square 2 moving up right and square 1 moving right", 753672, (200, 240, 232), (1, 23)),
]


def test_clips_of_one_drawing_differ_and_seeds_differ():
    clips = [c["video"].tobytes() for c in squares(Squares([BLACK]), actors=1, clips=30)]
    assert len(set(clips)) == 30
    other = [c["video"].tobytes() for c in squares(Squares([BLACK]), actors=1, clips=30, seed=1)]
    assert not set(clips) & set(other)


def test_each_drawing_begins_its_clips():
    data = squares(Squares([(i, 0, 0) for i in range(5)], [9, 8, 7, 6, 5]), clips=2)
    assert len(data) == 10
    assert [c["concept"] for c in data] == [9, 9, 8, 8, 7, 7, 6, 6, 5, 5]
    assert all(c["caption"].startswith(f"square {i // 2} moving") for i, c in enumerate(data))


def test_two_drawings_are_of_different_concepts():
    data = squares(Squares([BLACK] * 6, [0, 0, 0, 0, 0, 1]), clips=20)
    for index, clip in enumerate(data):
        other = clip["caption"].split(" and square ")[1][0]
        assert (other == "5") != (index // 20 == 5)


# --- pairs -------------------------------------------------------------------------------------


actor = st.tuples(st.integers(0, 4095), st.integers(0, 7))


@given(one=st.tuples(actor, actor), two=st.tuples(actor, actor))
def test_pairs_are_equal_if_and_only_if_the_contents_are(one, two):
    numbers = [pair(*map(list, zip(*actors, strict=True))) for actors in (one, two)]
    assert (numbers[0] == numbers[1]) == (sorted(one) == sorted(two))
    assert all(0 <= n < 2**30 for n in numbers)


def test_pairs_of_one_drawing_take_larger_concepts():
    assert pair([2**27 - 1], [7]) == 2**30 - 1
    for concepts, directions in (([2**27], [0]), ([4096, 1], [0, 0]), ([-1], [0])):
        with pytest.raises(UserError, match="concepts"):
            pair(concepts, directions)


# --- on the emoji data set ---------------------------------------------------------------------


def test_held_out_concepts_are_held_out_here(emoji, emoji_dir):
    train, test = emoji("train", frames=1, size=8), emoji("test_concept", frames=1, size=8)
    drawn = Tfds("emoji", "test_concept", str(emoji_dir)).open()
    concepts = {split: {c["concept"] for c in data} for split, data in (("a", train), ("b", test))}
    assert not concepts["a"] & concepts["b"]
    assert concepts["b"] == {int(e["concept"]) for e in drawn} and len(test) == len(drawn)
    names = {e["caption"] for e in drawn}
    assert {clip["caption"].split(" moving ")[0] for clip in test} == names


def test_a_row_of_a_task(emoji):
    data = emoji("test_drawing", clips=2)
    view = Input("video", Video(), VideoInput())
    spec = RowSpec({"video": view}, ("concept", "direction", "pair"))
    spec.check(data, "the test")
    clip = data[3]
    row = spec.make(clip, None)
    np.testing.assert_array_equal(row.inputs["video"]["pixels"], clip["video"])
    assert {name: int(v) for name, v in row.fields.items()} == {
        name: clip[name] for name in ("concept", "direction", "pair")
    }
    assert set(clip) == set(data.fields)
    assert clip["video"].shape == (8, 64, 64, 3) and clip["video"].dtype == np.uint8


def test_identity_tells_clips_apart_but_not_folders(emoji, tmp_path, emoji_dir):
    base = MovingEmoji("test_drawing", folder=str(emoji_dir))
    changes = [
        {}, {"split": "test_concept"}, {"clips": 2}, {"actors": 1}, {"frames": 4}, {"size": 32}, {"seed": 1},
    ]  # fmt: skip
    found = [replace(base, **change).open().identity for change in changes]
    assert len(set(found)) == len(changes)
    (tmp_path / "elsewhere").symlink_to(str(emoji_dir))
    moved = replace(base, folder=str(tmp_path / "elsewhere")).open()
    assert moved.identity == found[0]
    assert moved.description == "moving_emoji of emoji/1.0.0:test_drawing"


# --- mistakes ----------------------------------------------------------------------------------


def test_a_config_names_it():
    block = {"name": "moving_emoji", "split": "train", "actors": 1, "clips": 4}
    made = configs.component("sources", block, "source")
    assert made == MovingEmoji("train", actors=1, clips=4) and made.label == "train"


@pytest.mark.parametrize(
    "change", [{"actors": 0}, {"actors": 3}, {"clips": 0}, {"frames": 0}, {"size": 7}]
)
def test_settings_that_make_no_clips(change):
    [key] = change
    with pytest.raises(UserError, match=rf"MovingEmoji\.{key} is {change[key]}; it must be"):
        MovingEmoji("train", **change)


def test_a_data_set_without_drawings_is_refused():
    class Bare(Squares):
        fields = ("image", "caption")

    with pytest.raises(UserError, match="squares has no 'concept'"):
        squares(Bare([BLACK]))


def test_two_drawings_need_two_concepts():
    with pytest.raises(UserError, match="only one"):
        squares(Squares([BLACK, RED], [3, 3]))[0]

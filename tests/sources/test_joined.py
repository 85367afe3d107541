"""Sources joined by a number: who is paired with whom, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.sources.base import Example, Examples
from mmjax.sources.joined import JoinedExamples


class Listed(Examples):
    """Examples with a number each, and their place under another name."""

    def __init__(self, name: str, numbers: list[int]):
        self.name, self.numbers = name, numbers
        self.description = self.identity = f"{name}s {numbers}"
        self.fields = ("number", name)
        self.labels = {name: ["a", "b"]}
        self.credits = ("all of us", f"who made {name}")

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        return {"number": self.numbers[index], self.name: index}


def joined(left: list[int], right: list[int], by: str = "number", take: Any = ()) -> JoinedExamples:
    return JoinedExamples(Listed("one", left), Listed("other", right), by, take)


numbers = st.lists(st.integers(0, 4), max_size=12)


@settings(deadline=None, max_examples=80)
@given(numbers, numbers)
def test_each_has_a_partner_of_its_number_and_partners_take_turns(
    left: list[int], right: list[int]
) -> None:
    if not set(left) & set(right):
        with pytest.raises(UserError, match="no value of 'number' is in both"):
            joined(left, right)
        return
    found = list(joined(left, right))
    assert [x["one"] for x in found] == [i for i, n in enumerate(left) if n in right]
    assert all(right[x["other"]] == x["number"] for x in found)
    for number in set(left) & set(right):
        taken = [x["other"] for x in found if x["number"] == number]
        counts = [taken.count(i) for i, n in enumerate(right) if n == number]
        assert max(counts) - min(counts) <= 1


def test_it_says_whose_it_is() -> None:
    made = joined([1, 2], [2, 1])
    assert made.fields == ("number", "one", "other") and set(made.labels) == {"one", "other"}
    assert made.credits == ("all of us", "who made one", "who made other")
    same, other = joined([1, 2], [2, 1]), joined([1, 2], [1, 2])
    assert made.identity == same.identity != other.identity


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"by": "nummer"}, "reads field 'nummer', which ones .* lacks. It has: number, one"),
        ({"take": ("sound",)}, "reads field 'sound', which others .* lacks"),
        ({"take": ("number",)}, "takes field 'number', which ones .* has"),
    ],
)
def test_fields_that_do_not_fit_are_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        joined([1], [1], **more)


def test_clips_of_drawings_joined_with_drawings(emoji_dir: Any) -> None:
    """Through the config, on what ships: clips, each with a still of its concept."""
    block = {
        "name": "joined",
        "left": {"name": "moving_emoji", "split": "train", "actors": 1, "folder": str(emoji_dir)},
        "right": {"name": "tfds", "dataset": "emoji", "split": "test_drawing", "folder": str(emoji_dir)},
        "by": "concept",
        "take": ["image", "vendor"],
    }  # fmt: skip
    made = configs.component("sources", block, "source")
    examples = made.open()
    assert made.label == "train" and {"video", "image", "vendor"} < set(examples.fields)
    stills = configs.component("sources", block["right"], "source").open()
    known = {x["concept"]: x["image"] for x in stills}
    for index in range(0, len(examples), 40):
        assert (examples[index]["image"] == known[examples[index]["concept"]]).all()
    clips = configs.component("sources", block["left"], "source").open()
    assert len(examples) == sum(c in known for c in clips.column("concept"))
    for name in ("concept", "direction"):
        assert clips.column(name) == [x[name] for x in clips]

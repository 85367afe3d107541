"""Keys of a config are described as their dataclasses state them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mmjax.core import config as configs
from mmjax.core import describe
from mmjax.core.bounds import COUNT, FRACTION, check, check_choices
from mmjax.core.config import FREE, SCHEDULE, holds
from mmjax.core.errors import UserError
from mmjax.run_config import RunConfig


@dataclass(frozen=True)
class Inner:
    """A block below.

    Attributes:
      size: how large
        it is.
    """

    size: int = 3

    def __post_init__(self) -> None:
        check(self, size=COUNT)


@dataclass(frozen=True)
class Outer:
    """The block of this test.

    It has a second paragraph.

    Attributes:
      one, two: both of them.
      word: a choice.
    """

    word: str = field(metadata=FREE)
    one: float = 0.5
    two: float | None = None
    inner: Inner = field(default_factory=Inner, metadata=SCHEDULE)
    sizes: tuple[int, ...] = (1, 2)
    blocks: tuple[dict[str, Any], ...] = field(
        default=(), metadata=holds("blocks", {"eps": "free"})
    )

    def __post_init__(self) -> None:
        check(self, one=FRACTION)
        check_choices(self, word=("red", "blue"))


def rows(target: describe.Target) -> dict[str, tuple[str, str, str, str, str]]:
    return {k.name: (k.type, k.default, k.bounds, k.change, k.meaning) for k in target.keys}


def test_a_dataclass_is_described_key_by_key() -> None:
    target = describe.find("", Outer)
    assert target.summary == "The block of this test." and target.module == __name__
    assert [key.name for key in target.keys][0] == "word"  # what must be given comes first
    assert rows(target) == {
        "word": ("str", "required", "red, blue", "free", "a choice."),
        "one": ("float", "0.5", "in [0, 1]", "structural", "both of them."),
        "two": ("float or None", "null", "", "structural", "both of them."),
        "inner": ("block", "{}", "", "schedule", "A block below."),
        "sizes": ("list of int", "[1, 2]", "", "structural", ""),
        "blocks": ("list of block", "[]", "", "structural", ""),
    }


def test_a_block_below_has_the_class_of_its_holder() -> None:
    expected = {"size": ("int", "3", "at least 1", "schedule", "how large it is.")}
    assert rows(describe.find("inner", Outer)) == expected
    value = describe.find("inner.size", Outer)
    assert value.is_value and rows(value) == expected


def test_a_component_is_chosen_by_name_or_by_a_config() -> None:
    choice = describe.find("blocks[0]", Outer)
    assert set(choice.names) >= {"transformer", "mamba", "bottleneck"} and not choice.keys
    named = rows(describe.find("blocks[0]", Outer, ["transformer"]))
    assert named["num_heads"][:4] == ("int", "required", "at least 1", "structural")
    assert named["eps"][3] == "free"  # as the place of the block states
    config = {"blocks": [{"name": "mamba"}, {"name": "transformer"}]}
    assert rows(describe.find("blocks[1]", Outer, config=config)) == named


def test_components_on_the_way_are_named_in_order() -> None:
    path = "model.layers[0].blocks[0].experts.router"
    [key] = describe.find(f"{path}.top_k", RunConfig, ["transformer", "token_choice"]).keys
    assert (key.name, key.type, key.change) == ("top_k", "int", "structural")
    loss = describe.find(
        "model.layers[0].blocks[0].experts.losses_over", RunConfig, ["transformer"]
    )
    assert loss.keys[0].change == "schedule" and loss.keys[0].bounds == "group, batch"


def test_the_inputs_of_a_task_are_those_of_the_modality() -> None:
    for path in ("tasks.T.inputs.image", "schedule.phases[0].tasks.T.inputs.image"):
        keys = rows(describe.find(path, RunConfig))
        assert keys["size"][:2] == ("int", "64") and keys["instances"][1] == "0"
    config = {"modalities": {"drawing": {"name": "colours"}}}
    named = describe.find("tasks.T.inputs.drawing", RunConfig, config=config)
    assert named.module == "mmjax.modalities.colours"
    assert "image" in describe.find("tasks.T.inputs", RunConfig).names


def test_a_source_in_an_evaluator_or_a_source_is_one_of_the_sources() -> None:
    config = configs.read_file("quickstart")
    path = "tasks.image_text.evaluators.groups.names.dataset"
    assert rows(describe.find(path, RunConfig, config=config))["dataset"][3] == "free"
    joined = describe.find("tasks.T.source.left", RunConfig, ["joined"])
    assert {"tfds", "array_record"} <= joined.names.keys()
    assert describe.find("init_from.names[0].match", RunConfig).is_value


def test_an_entry_of_plain_data_is_described_as_a_whole() -> None:
    path = "model.layers[0].blocks[0].experts.losses.z"
    [key] = describe.find(path, RunConfig, ["transformer"]).keys
    assert (key.name, key.type) == ("losses", "float by name")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("inner.sise", "no key 'sise'. Did you mean 'size'?"),
        ("one.x", "below a single value"),
        ("blocks[0].eps", "depend on which of `mmjax/blocks/`"),
    ],
)
def test_what_is_not_there_is_an_error_with_a_remedy(path: str, message: str) -> None:
    with pytest.raises(UserError, match="mmjax|no key|single value") as caught:
        describe.find(path, Outer)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["quickstart", "moma:small"])
def test_each_key_of_a_config_has_the_class_that_a_resumed_run_gives_it(name: str) -> None:
    """Compare `describe` with `key_class`: two walks over the same metadata."""
    config = configs.read_file(name)
    count = 0
    for key, _ in configs.flat(config):
        if key.endswith(".name"):
            continue
        target = describe.find(key, RunConfig, config=config)
        if target.is_value:
            count += 1
            assert target.keys[0].change == configs.key_class(key, RunConfig, config), key
    assert count > 60


def test_every_key_of_every_block_is_described() -> None:
    kinds = [kind for kind in configs.KINDS if kind != "rules"]
    for kind in kinds:
        for name in configs.names(kind):
            assert describe.keys(configs.resolve(kind, name, kind)) is not None
        assert all(describe.summaries(kind).values()), kind


_LEAST = 2


@dataclass(frozen=True)
class Computed:
    """A block with a bound that is worked out."""

    size: int = 5
    count: int = 3

    def __post_init__(self) -> None:
        check(self, size=f"[{_LEAST}, 9]", count=COUNT)


def test_a_bound_that_is_an_expression_is_shown_as_it_is_written() -> None:
    assert describe.bounds(Computed)["size"] == "f'[{_LEAST}, 9]'"
    assert describe.bounds(Computed)["count"] == "at least 1"

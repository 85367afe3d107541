"""Tasks: what a row holds, and the errors on fields and shapes before anything compiles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.errors import CodeError, UserError
from mmjax.engine.loader import make_batch
from mmjax.modalities.image import Image
from mmjax.modalities.text import Text
from mmjax.objectives.base import Loss, heads_of
from mmjax.objectives.classification import Classification
from mmjax.sources.base import Cached, Example, Examples
from mmjax.task import RowSpec, Task, make_input, make_task

TINY = Path(__file__).resolve().parent / "configs" / "tiny.py"
MODALITIES = {"image": Image(), "text": Text(tokenizer="emoji/1.0.0/tokenizer.model")}


class Listed(Examples):
    """Examples of a list; an exception there is raised."""

    description, identity = "listed", "0"

    def __init__(self, *examples: Any):
        self._examples = examples
        self.fields = tuple(next(e for e in examples if isinstance(e, Mapping)))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        if isinstance(example, Exception):
            raise example
        return example


def example(**fields: Any) -> Example:
    picture = np.full((20, 20, 4), 200, np.uint8)
    return {"image": picture, "caption": "a cat", "concept": np.int64(7), **fields}


def task(**overrides: Any) -> Task:
    block = configs.read_file(str(TINY))["tasks"]["image_text"]
    changes = [f"{k.replace('__', '.')}={v!r}" for k, v in overrides.items()]
    return make_task("image_text", configs.override(block, changes), MODALITIES)


def spec(*fields: str, **settings: Any) -> RowSpec:
    return RowSpec({"image": make_input("image", settings, MODALITIES, "here")}, fields)


# --- rows --------------------------------------------------------------------------------------


def test_a_row_has_the_shapes_that_it_declares(emoji_dir):
    rows = task().rows()
    made = rows.make(example(), np.random.default_rng(0))
    for each in (made, rows.blank()):
        found = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), each)
        assert found == rows.shapes()
    assert made.fields["concept"] == 7 and made.valid
    assert not rows.blank().valid
    assert made.inputs["image"]["pixels"].any()
    assert made.inputs["text"]["valid"].sum() > 1


def test_rows_hold_what_is_asked_and_no_more():
    made = spec("concept", size=16).make(example(), None)
    assert made.keys is None
    assert set(made.inputs) == {"image"} and set(made.fields) == {"concept"}


def test_evaluation_is_deterministic_and_training_is_not():
    picture = np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)
    rows = spec(size=16, crop=0.3, flip=True)

    def pixels(rng: Any) -> Any:
        return rows.make(example(image=picture), rng).inputs["image"]["pixels"]

    np.testing.assert_array_equal(pixels(None), pixels(None))
    np.testing.assert_array_equal(
        pixels(np.random.default_rng(3)), pixels(np.random.default_rng(3))
    )
    assert (pixels(np.random.default_rng(3)) != pixels(np.random.default_rng(4))).any()


# --- fields ------------------------------------------------------------------------------------


def test_good_fields_pass():
    spec("concept", size=16).check(Listed(example()), "tasks.a")
    spec("concept", size=16).check(Cached(Listed(example(concept=3)), 0), "tasks.a")
    spec("concept", size=16).check(Listed(example(concept=np.array(3, np.uint8))), "tasks.a")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (spec("concpt", size=16), ["'concpt'", "'concept'", "caption, concept"]),
        (spec(size=16, field="picture"), ["'picture'", "image, caption"]),
    ],
)
def test_a_field_that_the_data_lacks_names_task_field_and_what_is_there(rows, words):
    with pytest.raises(UserError) as raised:
        rows.check(Listed(example()), "tasks.a")
    for word in ("tasks.a reads field", "listed lacks", *words):
        assert word in str(raised.value)


@pytest.mark.parametrize("value", ["one", b"1", 1.0, np.float32(1), np.array([1, 2]), [1], None])
def test_a_field_that_is_no_integer_names_task_and_field(value):
    with pytest.raises(UserError, match=r"tasks.a: listed\[0\]: field 'concept' .*expected an int"):
        spec("concept", size=16).check(Listed(example(concept=value)), "tasks.a")


def test_a_field_of_another_modality_names_task_field_and_what_was_found(emoji_dir):
    with pytest.raises(UserError) as raised:
        spec(size=16, field="caption").check(Listed(example()), "tasks.a")
    words = "tasks.a: listed[0]: field 'caption' as modality 'image': an image has shape"
    assert words in str(raised.value)
    rows = RowSpec({"text": make_input("text", {"field": "image"}, MODALITIES, "here")}, ())
    with pytest.raises(UserError, match="field 'image' as modality 'text': a text is a string"):
        rows.check(Listed(example()), "tasks.a")


@dataclass(frozen=True)
class Buggy(Image):
    """A modality whose code fails: always, or for a value that is no picture."""

    fault: str = "name"

    def preprocess(self, settings, value, rng, **time):
        if self.fault == "keys":
            return {"pixel": np.zeros((16, 16, 3), np.uint8)}
        if self.fault == "name":
            return valu  # noqa: F821
        return super().preprocess(settings, value.no_such, rng)


LINE = Buggy.preprocess.__code__.co_firstlineno + 4


def buggy(fault: str) -> RowSpec:
    image = make_input("image", {"size": 16}, {"image": Buggy(fault=fault)}, "here")
    return RowSpec({"image": image}, ())


def test_arrays_that_the_modality_does_not_declare_are_refused_at_the_start():
    words = r"tasks\.a: modality 'image': preprocess of Buggy in .*test_task\.py .*lacks pixels and it adds pixel"
    with pytest.raises(CodeError, match=words):
        buggy("keys").check(Listed(example(), example()), "tasks.a")
    with pytest.raises(CodeError, match="lacks pixels"):
        make_batch(buggy("keys"), Listed(example()), [0], lambda _: None, 1)


@dataclass(frozen=True)
class Wrong(Classification):
    """An objective that returns what a test gives."""

    returned: Any = None

    def heads(self, width, inputs):
        return self.returned

    def __call__(self, model, batch, key):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (np.float32(1), "returns float32; it must return Loss"),
        (Loss(jnp.ones(3)), r"has the shape \[3\]; it must be a scalar"),
    ],
)
def test_what_is_no_loss_is_named_with_its_objective(returned, words):
    wrong = replace(task(), objective=Wrong(classes=2, returned=returned))
    with pytest.raises(CodeError, match=rf"Wrong in .*test_task\.py {words}"):
        wrong.loss(None, Batch({}, {}, np.ones(2, bool)), jax.random.key(0))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "^heads of Wrong in .* returns NoneType; it must return Mapping"),
        ({"out": 3}, r"^heads\['out'\] of Wrong in .* returns int; it must return Module"),
    ],
)
def test_heads_that_are_no_modules_are_named_with_their_objective(returned, words):
    with pytest.raises(CodeError, match=words):
        heads_of(Wrong(classes=2, returned=returned), 4, {})


@dataclass(frozen=True)
class Undeclared(Image):
    """A modality that declares what a test gives."""

    declared: Any = None

    def arrays(self, settings):
        return self.declared


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (None, "arrays of Undeclared in .* returns NoneType; it must return Mapping"),
        ({"x": (3,)}, r"arrays\['x'\] of .* returns tuple; it must return ShapeDtypeStruct"),
    ],
)
def test_arrays_that_are_no_shapes_are_named_with_their_modality(declared, words):
    with pytest.raises(UserError, match=f"^here: {words}"):
        make_input("image", {"size": 16}, {"image": Undeclared(declared=declared)}, "here")


def test_code_that_fails_for_every_example_is_refused_at_the_start():
    where = rf"listed\[0\]: field 'image' as modality 'image': NameError: .*'valu'.*:{LINE}\)"
    with pytest.raises(CodeError, match=where):
        buggy("name").check(Listed(*[example()] * 20), "tasks.a")
    with pytest.raises(CodeError, match="none of 2 examples.*AttributeError: .*'no_such'"):
        buggy("attribute").check(Listed(example(), example()), "tasks.a")
    # Errors of several types, or of one that the data cause, are left to the loader.
    mixed = Listed(example(), KeyError("a"), ValueError("b"))
    buggy("name").check(mixed, "tasks.a")
    spec().check(Listed(example(), ValueError("a")), "tasks.a")


def test_a_corrupt_first_example_is_left_to_the_loader():
    spec("concept", size=16).check(Listed(ValueError("garbage"), example()), "tasks.a")
    spec("concept", size=16).check(Listed(example(image=b"no image")), "tasks.a")


# --- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"batch": 0}, "tasks.image_text.batch is 0"),
        ({"batch": "many"}, "'tasks.image_text.batch' is 'many'"),
        ({"bacth": 3}, "'tasks.image_text.bacth'. Did you mean 'batch'?"),
        ({"inputs": {}}, "reads modality 'image'; tasks.image_text.inputs has no such block"),
        ({"inputs__imge": {}}, "no modality 'imge' in config.modalities. Did you mean 'image'?"),
        ({"inputs__image__sise": 8}, "'tasks.image_text.inputs.image.sise'. Did you mean 'size'?"),
        ({"inputs__image__size": 17}, "tasks.image_text.inputs.image: image size 17"),
        ({"inputs__image__size": 0}, "tasks.image_text.inputs.image: "),
        ({"inputs__text__length": 0}, "tasks.image_text.inputs.text.length is 0"),
        ({"inputs__text__length": 500}, "tasks.image_text.inputs.text: text length 500"),
        ({"objective__modalities": ["image", "sound"]}, "modality 'sound'"),
        ({"objective__name": "contrastif"}, "Did you mean 'contrastive'?"),
        (
            {"objective__embed_dm": 3},
            "'tasks.image_text.objective.embed_dm'. Did you mean 'embed_dim'?",
        ),
        ({"objective": {"modalities": ["image", "text"]}}, "tasks.image_text.objective: 'name'"),
        ({"source__name": "tfd"}, "tasks.image_text.source.name: no 'tfd'"),
        ({"source__splt": "x"}, "'tasks.image_text.source.splt'. Did you mean 'split'?"),
        ({"evaluators": {"../../x": {}}}, "tasks.image_text.evaluators: '../../x' is no name"),
        ({"evaluators": {"": {}}}, "tasks.image_text.evaluators: '' is no name"),
        ({"shapes": {"a/b": {}}}, "tasks.image_text.shapes: 'a/b' is no name"),
        ({"objective__head": "../x"}, "tasks.image_text.objective.head: '../x' is no name"),
        ({"objective__head": "a.b"}, "tasks.image_text.objective.head: 'a.b' is no name"),
    ],
)
def test_wrong_blocks_are_refused_by_key(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        task(**overrides)


def test_a_missing_key_is_named():
    block = configs.read_file(str(TINY))["tasks"]["image_text"]
    for key in ("source", "inputs", "objective", "batch"):
        with pytest.raises(UserError, match=f"'tasks.a.{key}' is missing"):
            make_task("a", {k: v for k, v in block.items() if k != key}, MODALITIES)


def test_a_head_is_the_tasks_own_unless_it_is_named():
    assert task().objective.head == "image_text"
    assert task(objective__head="shared").objective.head == "shared"


def test_every_task_draws_its_own_numbers():
    block = configs.read_file(str(TINY))["tasks"]["image_text"]
    one, two = (make_task(n, block, MODALITIES) for n in ("one", "two"))
    keys = [jax.random.key_data(t.fold(s)).tolist() for t in (one, two) for s in (0, 1)]
    assert len({tuple(k) for k in keys}) == 4
    assert keys[0] == jax.random.key_data(one.fold(0)).tolist()

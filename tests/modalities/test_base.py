"""Check what every modality has from its base: inputs, instances, and which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.errors import CodeError, UserError
from mmjax.modalities.base import (
    EXISTS,
    PRESENT,
    Input,
    Modality,
    as_rows,
    asset_name,
    by_axis,
    dropped,
    dropped_arrays,
    start_of,
    tokens_left,
)


@dataclass(frozen=True)
class Settings:
    field: str = "numbers"
    length: int = 3
    token_drop: float = 0.0


@dataclass(frozen=True)
class Numbers(Modality[Settings]):
    """The first numbers of a list; `time` is added to each."""

    temporal = True
    dtype: str = "float32"

    def stem(self, width: int) -> Any:
        raise NotImplementedError

    def arrays(self, settings: Settings) -> Any:
        return {"x": jax.ShapeDtypeStruct((settings.length,), np.dtype(self.dtype))}

    def preprocess(
        self, settings: Settings, value: Any, rng: Any, time: float = 0.0
    ) -> dict[str, np.ndarray]:
        return {"x": np.asarray(value[: settings.length], np.float32) + np.float32(time)}


def input_of(instances: int = 0, modality: Any = None, **settings: Any) -> Input:
    return Input("numbers", modality or Numbers(), Settings(**settings), instances)


EXAMPLE = {"numbers": [1, 2, 3, 4]}


def test_an_input_reads_its_field() -> None:
    arrays = input_of().preprocess(EXAMPLE, None)
    assert list(arrays) == ["x"]
    np.testing.assert_array_equal(arrays["x"], [1, 2, 3])
    other = input_of(field="others", length=2)
    assert other.field == "others"
    np.testing.assert_array_equal(other.preprocess({"others": [7, 8]}, None)["x"], [7, 8])


@pytest.mark.parametrize(
    ("value", "modality", "words"),
    [
        ([1, 2], Numbers(), r"expected float32\[3\], made float32\[2\] from field 'numbers'"),
        ([1, 2, 3], Numbers(dtype="int32"), r"expected int32\[3\], made float32\[3\]"),
    ],
)
def test_arrays_other_than_the_declared_ones_are_refused(
    value: Any, modality: Numbers, words: str
) -> None:
    with pytest.raises(UserError, match=f"modality 'numbers', array 'x': {words}"):
        input_of(modality=modality).preprocess({"numbers": value}, None)


@dataclass(frozen=True)
class Returning(Numbers):
    """Returns what a test gives."""

    result: Any = None

    def preprocess(
        self, settings: Settings, value: Any, rng: Any, time: float = 0.0
    ) -> dict[str, np.ndarray]:
        returned: dict[str, np.ndarray] = self.result
        return returned


X = np.zeros(3, np.float32)


@pytest.mark.parametrize("instances", [0, 2])
@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({}, r"returns other arrays \(arrays\(\) declares x\): it lacks x\."),
        ({"x": X, "y": X, "b": X}, r"declares x\): it adds b, y\."),
        ({"z": X}, r"declares x\): it lacks x and it adds z\."),
        (None, "returns NoneType; it must return a dict of NumPy arrays"),
        ({"x": [0.0, 0.0, 0.0]}, "returns a list as 'x'; it must be a NumPy array"),
    ],
)
def test_other_arrays_than_the_declared_ones_are_a_mistake_in_the_code(
    result: Any, words: str, instances: int
) -> None:
    given = input_of(instances, Returning(result=result))
    where = r"^modality 'numbers': preprocess of Returning in .*test_base\.py"
    with pytest.raises(CodeError, match=f"{where} .*{words}"):
        given.preprocess(EXAMPLE, None)


def test_instances_have_an_axis_of_their_own_and_say_which_are_there() -> None:
    assert {n: (s.shape, s.dtype) for n, s in input_of(2).arrays().items()} == {
        "x": ((2, 3), np.float32),
        PRESENT: ((2,), np.bool_),
    }
    arrays = input_of(2).preprocess(EXAMPLE, None, times=[0.0, 0.5])
    np.testing.assert_array_equal(arrays["x"], [[1, 2, 3], [1.5, 2.5, 3.5]])
    np.testing.assert_array_equal(arrays[PRESENT], [True, True])


def test_instances_that_are_not_there_are_zeros() -> None:
    class Pieces(Numbers):
        def instances(self, value: Any, count: int, rng: Any) -> list[Any]:
            return [value[i : i + 3] for i in range(0, len(value), 3)]

    arrays = input_of(3, Pieces()).preprocess({"numbers": [1, 2, 3, 4, 5, 6]}, None)
    np.testing.assert_array_equal(arrays["x"], [[1, 2, 3], [4, 5, 6], [0, 0, 0]])
    np.testing.assert_array_equal(arrays[PRESENT], [True, True, False])
    arrays = input_of(1, Pieces()).preprocess({"numbers": [1, 2, 3, 4, 5, 6]}, None)
    np.testing.assert_array_equal(arrays["x"], [[1, 2, 3]])


def test_evaluation_has_all_tokens_of_one_instance() -> None:
    whole = input_of(4, token_drop=0.5).for_evaluation()
    assert input_of(4, token_drop=0.5).drops and not whole.drops
    assert whole == input_of()


def test_a_number_of_instances_is_not_negative() -> None:
    with pytest.raises(UserError, match="instances is -1"):
        input_of(-1)


def test_defaults_of_a_modality() -> None:
    assert Numbers().files() == {} and Numbers().folder == ""
    assert Numbers().raw(EXAMPLE) is EXAMPLE
    assert Numbers().instances([1], 3, None) == [[1], [1], [1]]


# --- where a stretch begins ---------------------------------------------------------------------


def test_a_stretch_is_in_the_middle_without_random_numbers() -> None:
    assert [start_of(over, None) for over in (0, 1, 7, 8)] == [0, 0, 3, 4]
    assert start_of(8, None, time=0.9) == 4


@given(st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_a_time_is_a_place_among_those_that_are_possible(over: int, time: float) -> None:
    start = start_of(over, np.random.default_rng(0), time)
    assert 0 <= start <= over and abs(start - time * (over + 1)) <= 1


def test_random_starts_reach_every_place_and_no_other() -> None:
    rng = np.random.default_rng(0)
    assert {start_of(3, rng) for _ in range(200)} == {0, 1, 2, 3}


# --- names of files, rows -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "emoji/1.0.0/tokenizer.model", "..model/x"])
def test_a_file_below_the_data_folder_keeps_its_path(name: str) -> None:
    assert asset_name(name) == name


@pytest.mark.parametrize(
    "name", ["/a/x.model", "~/x.model", "../x.model", "a/../../x.model", "gs://b/x.model"]
)
def test_a_file_elsewhere_gets_a_folder_of_its_own(name: str) -> None:
    kind, folder, last = asset_name(name).split("/")
    assert (kind, last, len(folder)) == ("elsewhere", "x.model", 16)
    assert asset_name(name) != asset_name(name.replace("x.model", "y/x.model"))


def test_instances_become_rows_that_exist_where_row_and_instance_do() -> None:
    x = np.arange(12).reshape(2, 3, 2)
    present = np.array([[True, True, False], [True, True, True]])
    rows, exists = as_rows({"x": jnp.asarray(x), PRESENT: jnp.asarray(present)})
    assert list(rows) == ["x"] and exists is not None
    np.testing.assert_array_equal(rows["x"], x.reshape(6, 2))
    np.testing.assert_array_equal(exists, present.reshape(-1))
    there = jnp.asarray([True, False])
    _, exists = as_rows({"x": jnp.asarray(x), PRESENT: jnp.asarray(present), EXISTS: there})
    np.testing.assert_array_equal(exists, [True, True, False, False, False, False])  # type: ignore[arg-type]


def test_without_instances_rows_stay_as_they_are() -> None:
    x = jnp.ones((2, 3))
    assert as_rows({"x": x}) == ({"x": x}, None)
    there = jnp.asarray([True, False])
    rows, exists = as_rows({"x": x, EXISTS: there})
    assert list(rows) == ["x"] and exists is there


# --- dropping tokens ----------------------------------------------------------------------------


def test_a_part_of_the_tokens_stays() -> None:
    assert [tokens_left(10, drop) for drop in (0.0, 0.25, 0.5, 0.9)] == [10, 8, 5, 1]


@pytest.mark.parametrize("drop", [-0.1, 1.0, 0.96])
def test_at_least_one_token_stays(drop: float) -> None:
    with pytest.raises(UserError, match=rf"token_drop is {drop}, of 10 tokens"):
        tokens_left(10, drop)


def test_tokens_that_stay_keep_their_order_and_their_places() -> None:
    values = np.arange(24, dtype=np.uint8).reshape(12, 2)
    arrays, index = dropped(values, (3, 4), 0.5, np.random.default_rng(1))
    assert len(index) == 6 and (np.diff(index) > 0).all()
    np.testing.assert_array_equal(arrays["patches"], values[index])
    places = [[(i // 4) / 3, (i % 4) / 4] for i in index]
    np.testing.assert_allclose(arrays["coordinates"], places, rtol=1e-6)
    declared = dropped_arrays(12, 2, 2, 0.5, np.uint8)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
        n: (s.shape, s.dtype) for n, s in declared.items()
    }
    columns = by_axis(jnp.asarray(arrays["coordinates"])[None], ("y", "x"))
    np.testing.assert_allclose(columns["x"][0], [x for _, x in places], rtol=1e-6)


def test_every_example_draws_its_own_tokens_and_evaluation_the_same() -> None:
    values = np.zeros((32, 1), np.float32)
    rng = np.random.default_rng(0)
    one, two = (dropped(values, (32,), 0.5, rng)[1] for _ in range(2))
    assert not np.array_equal(one, two)
    fixed = [dropped(values, (32,), 0.5, None)[1] for _ in range(2)]
    np.testing.assert_array_equal(*fixed)

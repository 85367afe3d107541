"""Check which rows of a window share a sequence, and that every process finds the same."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.data import order
from mmjax.data.binning import even_groups
from mmjax.engine.loader import arranged_rows
from mmjax.objectives.transfusion import Transfusion
from mmjax.task import check_batch


def test_groups_by_hand() -> None:
    """9 and 8 begin two groups; 7 joins 8, 6 joins 9; of two sums of 15 the first gets the 2, the other the 1."""
    assert even_groups([1, 9, 2, 8, 7, 6], 3) == [1, 2, 5, 0, 3, 4]
    assert even_groups([4, 4, 4, 4], 2) == [0, 2, 1, 3]
    assert even_groups([5, 1, 3], 1) == [0, 2, 1]


@given(st.lists(st.integers(0, 30), min_size=8, max_size=8))
def test_each_index_is_in_one_group_and_the_fullest_is_near_the_best(lengths: list[int]) -> None:
    found = even_groups(lengths, 4)
    assert sorted(found) == list(range(8))
    fullest = max(sum(lengths[i] for i in found[at : at + 4]) for at in (0, 4))
    best = min(
        max(sum(lengths[i] for i in group), sum(lengths) - sum(lengths[i] for i in group))
        for group in combinations(range(8), 4)
    )
    # Graham's bound for two groups, (4 - 1 / 2) / 3, holds without a fixed size; with it the longest decides.
    assert best <= fullest <= best + max(lengths)


DAMAGED = int(order.example_ids(5, "task", 48, 24, 50)[5])


class Texts:
    """Fifty texts; example i has `i * 7 % 9` tokens, and one cannot be read."""

    description = "texts"
    fields = ("id",)

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == DAMAGED:
            raise ValueError("damaged")
        return {"id": index}


class Spec:
    """Rows of a text's tokens, the example's id, and a number that the row draws."""

    def make(self, example: Any, rng: Any) -> Any:
        text = {"valid": np.arange(9) < example["id"] * 7 % 9}
        return Batch(
            inputs={"text": text},
            fields={"id": np.int32(example["id"]), "drawn": np.int64(rng.integers(2**40))},
            valid=np.True_,
        )

    def blank(self) -> Any:
        fields = {"id": np.int32(0), "drawn": np.int64(0)}
        return Batch(
            inputs={"text": {"valid": np.zeros(9, bool)}},
            fields=fields,
            valid=np.False_,
        )


def rows(window: int, share: tuple[int, int], position: int = 48) -> Any:
    objective = Transfusion(
        modalities=("text",), pack=2, capacity={"text": 12} if window else {}, window=window
    )
    task: Any = SimpleNamespace(name="task", objective=objective, rows=Spec, batch=24)
    examples: Any = Texts()
    return arranged_rows(task, examples, 5, position, share)


def test_a_window_is_the_same_whatever_part_of_it_a_process_holds() -> None:
    whole, failed = rows(8, (0, 24))
    for share in [(0, 8), (8, 24), (3, 5), (6, 11), (23, 24)]:
        part, _ = rows(8, share)
        for name in ("id", "drawn"):
            np.testing.assert_array_equal(part.fields[name], whole.fields[name][slice(*share)])
    # The positions of what cannot be read are those of the order, wherever its row lies.
    assert [position for position, _ in failed] == [48 + 5]
    assert (~whole.valid).sum() == 1


def test_windows_move_rows_and_change_nothing_in_them() -> None:
    (plain, _), (grouped, _) = rows(0, (0, 24)), rows(8, (0, 24))
    assert plain.fields["id"].tolist() != grouped.fields["id"].tolist()
    for start in (0, 8, 16):
        pairs = [
            sorted(zip(*(r.fields[n][start : start + 8].tolist() for n in ("id", "drawn")), strict=True))
            for r in (plain, grouped)
        ]  # fmt: skip
        assert pairs[0] == pairs[1]
    lengths = grouped.inputs["text"]["valid"].sum(axis=1).reshape(-1, 2).sum(axis=1)
    loose = plain.inputs["text"]["valid"].sum(axis=1).reshape(-1, 2).sum(axis=1)
    assert np.ptp(lengths) < np.ptp(loose)


def test_batches_that_hold_no_whole_windows_or_sequences() -> None:
    objective = Transfusion(pack=4, capacity={"text": 20}, window=8)
    config: Any = SimpleNamespace(batch=20, microbatches=1)
    with pytest.raises(UserError, match=r"tasks.a.batch is 20; .* window of 8 rows must divide it"):
        check_batch(config, objective, "tasks.a")
    config = SimpleNamespace(batch=24, microbatches=4)
    with pytest.raises(UserError, match="4 microbatches of sequences with 4 items each"):
        check_batch(config, objective, "tasks.a")
    check_batch(SimpleNamespace(batch=32, microbatches=4), objective, "tasks.a")  # type: ignore[arg-type]

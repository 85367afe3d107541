"""Retrieval: recall against a sorted list, chance against shuffled ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmjax.core.errors import UserError
from mmjax.evaluators import retrieval
from mmjax.evaluators.retrieval import Retrieval, chance, place, recall
from mmjax.objectives.contrastive import Contrastive
from mmjax.task import Task, TaskConfig

SOURCE = {"name": "array_record", "path": "data/pairs", "glob": "held_out*"}
FEW = st.integers(-2, 2)  # so that ties are common


def task(objective: Any = None, name: str = "pairs") -> Task:
    made: Any = objective or Contrastive(modalities=("image", "text"), head="pairs")
    return Task(name, TaskConfig({}, {}, {}, 4), {}, made, None)  # type: ignore[arg-type]


def brute_recall(similarity: np.ndarray, positive: np.ndarray, k: int) -> float:
    """Sort the candidates, negatives first among equals; look at the first k."""
    found = 0
    for row, good in zip(similarity, positive, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], good[c]))
        found += any(good[c] for c in order[:k])
    return found / len(similarity)


@given(
    similarity=hnp.arrays(int, (4, 6), elements=FEW),
    positive=hnp.arrays(bool, (4, 6)),
    k=st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_recall_is_that_of_a_sorted_list(
    similarity: np.ndarray, positive: np.ndarray, k: int
) -> None:
    expected = brute_recall(similarity, positive, k)
    assert recall(similarity.astype(float), positive, (k,)) == [expected]


@pytest.mark.parametrize("pairs", [1, 7, 30, 10**6])
def test_some_queries_at_a_time_are_all_of_them(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers, whose products are exact: the records are those of a sorted list, ties among them."""
    rng = np.random.default_rng(0)
    outputs = {
        m: {"vector": rng.integers(-2, 3, (12, 4)).astype(np.float32), "concept": rng.integers(0, 5, 12)}
        for m in ("image", "text")
    }  # fmt: skip
    monkeypatch.setattr(retrieval, "_PAIRS", pairs)
    records = Retrieval(source=SOURCE, unique="none").score(task(), outputs)
    for one, two in (("image", "text"), ("text", "image")):
        similarity = outputs[one]["vector"] @ outputs[two]["vector"].T
        positive = outputs[one]["concept"][:, None] == outputs[two]["concept"]
        found = {r["name"]: r for r in records}
        for k in (1, 5, 10):
            record = found[f"{one} to {two} R@{k}"]
            assert record["value"] == brute_recall(similarity, positive, k)
            assert record["chance"] == chance(positive.sum(axis=1), 12, (k,))[0]


def test_memory_does_not_grow_with_the_square_of_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No array of more pairs than are compared at a time, unless of one query."""
    sizes = []

    def noted(similarity: np.ndarray, positive: np.ndarray) -> np.ndarray:
        sizes.append(similarity.size)
        return place(similarity, positive)

    monkeypatch.setattr(retrieval, "_PAIRS", 1000)
    monkeypatch.setattr(retrieval, "place", noted)
    made = {"vector": np.zeros((300, 2), np.float32), "concept": np.arange(300)}
    Retrieval(source=SOURCE).score(task(), {"image": made, "text": made})
    assert max(sizes) <= 1000 and sum(sizes) == 2 * 300 * 300


def test_ties_count_against_us() -> None:
    positive = np.eye(5, dtype=bool)
    assert recall(np.zeros((5, 5)), positive, (1, 4, 5)) == [0.0, 0.0, 1.0]
    better = np.zeros((5, 5)) + np.eye(5)
    assert recall(better, positive, (1,)) == [1.0]


def test_nan_finds_nothing() -> None:
    positive = np.eye(5, dtype=bool)
    assert recall(np.full((5, 5), np.nan), positive, (1, 4)) == [0.0, 0.0]
    one = np.eye(5)
    one[2, 2] = np.nan
    assert recall(one, positive, (1,)) == [0.8]
    one[3, 0] = np.nan  # a negative that cannot be compared stands before the positive
    assert recall(one, positive, (1,)) == [pytest.approx(0.6)]


def test_any_positive_counts_and_a_query_without_one_is_lost() -> None:
    similarity = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    positive = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    assert recall(similarity, positive, (1, 2, 3)) == [0.0, 1 / 3, 2 / 3]


@given(
    positives=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    more=st.integers(0, 5),
    k=st.integers(1, 14),
)
@settings(max_examples=200, deadline=None)
def test_chance_is_one_less_the_odds_of_a_miss(positives: list[int], more: int, k: int) -> None:
    n = max(*positives, 1) + more
    expected = [1 - math.comb(n - p, min(k, n)) / math.comb(n, min(k, n)) for p in positives]
    [value] = chance(np.array(positives), n, (k,))
    assert value == pytest.approx(np.mean(expected), abs=1e-12)


def test_chance_is_the_recall_of_random_scores() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random((8, 20)) < 0.15
    positive[0] = False
    positive[1] = True
    at = (1, 5, 10)
    draws = np.array([recall(rng.random((8, 20)), positive, at) for _ in range(3000)])
    expected = chance(positive.sum(axis=1), 20, at)
    error = draws.std(axis=0) / 3000**0.5
    assert np.all(error < 0.005)
    assert np.all(np.abs(draws.mean(axis=0) - expected) < 4 * error)


def outputs() -> dict[str, dict[str, np.ndarray]]:
    """Return three concepts, the first drawn twice; concept 7's text lies where 9's image does."""
    image = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.1, 0.8]])
    text = np.array([[1, 0, 0], [1, 0, 0], [0, 0.2, 1], [0, 0, 1]])
    concept = np.array([3, 3, 7, 9])
    return {
        "image": {"vector": image, "concept": concept},
        "text": {"vector": text, "concept": concept},
    }


def test_records_of_both_directions() -> None:
    evaluator = Retrieval(source=SOURCE, at=(1, 2))
    records = evaluator.score(task(), outputs())
    assert [r["name"] for r in records] == [
        "image to text R@1", "image to text R@2", "text to image R@1", "text to image R@2",
    ]  # fmt: skip
    for record in records:
        assert record["task"] == "pairs" and record["split"] == "held_out"
        assert set(record) == {"name", "task", "split", "value", "chance", "count", "unit"}
        assert record["unit"] == "fraction"
        assert type(record["value"]) is float and type(record["count"]) is int
    # Four images look among three texts, one for each concept; three texts among four images.
    assert [r["count"] for r in records] == [4, 4, 3, 3]
    # Image 7 finds text 7, the nearest of three; image 9 is nearer to text 7 (0.82) than to its own.
    assert [r["value"] for r in records[:2]] == [pytest.approx(3 / 4), 1.0]
    # Text 3 finds either of its images; text 7 is nearest to image 9; text 9 finds its own.
    assert [r["value"] for r in records[2:]] == [pytest.approx(2 / 3), 1.0]
    assert [r["chance"] for r in records[:2]] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    expected = [np.mean([1 / 2, 1 / 4, 1 / 4]), np.mean([5 / 6, 1 / 2, 1 / 2])]
    assert [r["chance"] for r in records[2:]] == [pytest.approx(e) for e in expected]


def test_the_first_example_of_a_concept_speaks_for_it() -> None:
    made = outputs()
    made["text"]["vector"][1] = [0, 0, 9]  # the second text of concept 3 is not a candidate
    records = Retrieval(source=SOURCE, at=(1,)).score(task(), made)
    assert records[0]["value"] == pytest.approx(3 / 4)
    # With images as the unique side the texts stay apart.
    other = Retrieval(source=SOURCE, at=(1,), unique="image").score(task(), made)
    assert [r["count"] for r in other] == [3, 4]


def test_the_passes_it_needs() -> None:
    passes = Retrieval(source=SOURCE, positive_key="kind").passes(task())
    assert {n: str(p.computation) for n, p in passes.items()} == {
        "image": "embed/image",
        "text": "embed/text",
    }
    assert all(p.fields == ("kind",) and p.block == SOURCE for p in passes.values())


def test_an_objective_without_two_embeddings() -> None:
    class Nothing:
        def embeds(self) -> tuple[str, ...]:
            return ()

    with pytest.raises(UserError, match="tasks.pairs: retrieval needs .* two modalities"):
        Retrieval(source=SOURCE).passes(task(Nothing()))

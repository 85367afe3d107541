"""The ViT benchmark: both compute the same, in Flax; PyTorch's half is not needed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import vit
from benchmarks._pairs import Effort


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, emoji_dir: Any) -> None:
    monkeypatch.setattr(vit, "SIZES", {"Ti": (32, 2, 2)})
    monkeypatch.setattr(vit, "SHAPES", (("Ti", 32, 8),))
    monkeypatch.setattr(vit, "find_spec", lambda name: None)


def test_both_are_timed_where_they_agree() -> None:
    """The loss by Flax with our parameters is ours: the assertion is in the benchmark."""
    found = {each.name: each for each in vit.measure(Effort({}, 3, 1))}
    assert len(found["ViT-Ti/16, 32 px, batch 8: ours to Flax"].values) == 3
    assert not any("PyTorch" in name for name in found)


@pytest.mark.parametrize(
    "losses, said",
    [
        ({"ours": [7.0, 3.0], "Flax": [7.01, 3.0]}, "Flax"),
        ({"ours": [7.0, 3.0], "Flax": [7.0, 3.2]}, "Flax"),
        ({"ours": [7.0, 6.9], "Flax": [7.0, 6.9]}, "does not learn"),
    ],
)
def test_what_differs_is_not_timed(losses: dict[str, list[float]], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        vit.assert_equal(losses)


def test_positions_are_one_table() -> None:
    """Row by row: the sum of a row's vector and a column's, normalised."""
    steps = vit.Steps(vit.block("Ti", 32, 8, 0))
    rows = vit.by_layer(steps.parameters, 2, 2)["positions"]
    p = {n.split("/")[-1]: np.asarray(v) for n, v in steps.parameters.items() if "/tables/" in n}
    for index, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        total = p["y"][y] + p["x"][x]
        wanted = (total - total.mean()) / np.sqrt(total.var() + 1e-6)
        got = rows[index] / np.abs(rows[index]).max()
        np.testing.assert_allclose(got, wanted / np.abs(wanted).max(), rtol=1e-4, atol=1e-5)

"""Our half of the contrastive benchmark; the peer itself is not needed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import contrastive
from benchmarks._pairs import Effort
from mmjax.objectives.contrastive import info_nce


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "BATCHES", (16,))
    monkeypatch.setattr(contrastive, "SIZE", 4)
    monkeypatch.setattr(contrastive, "find_spec", lambda name: object())


def test_both_are_timed_where_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ourselves in the peer's place."""
    monkeypatch.setattr(contrastive, "_open_clip", lambda *given: contrastive._mmjax(*given, 0))
    found = {each.name: each for each in contrastive.measure(Effort({}, 3, 1))}
    assert len(found["softmax, 16 rows: time, ours to open_clip"].values) == 3
    assert len(found["sigmoid, 16 rows: time, ours by chunks to open_clip"].values) == 3
    assert not any("memory" in name for name in found)


def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(form: str, a: Any, b: Any, scale: float, bias: float) -> Any:
        return contrastive._mmjax(form, a, b, scale + 0.1, bias, 0)

    monkeypatch.setattr(contrastive, "_open_clip", other)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        contrastive.measure(Effort({}, 1, 1))


def test_memory_is_that_of_the_logits() -> None:
    """Some [4096, 4096] in float32, each of 67 MB; by chunks fewer."""
    whole, chunked = (
        contrastive.memory(name, "softmax", 4096)
        for name in (contrastive.OURS, contrastive.CHUNKED)
    )
    assert 67 < whole < 600 and chunked < whole / 1.5


def test_the_vectors_are_the_published_ones() -> None:
    value = contrastive.make(contrastive.OURS, "softmax", 256)()[0]
    rng = np.random.RandomState(0)
    a, b = (rng.randn(256, 4).astype(np.float32) for _ in range(2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = info_nce(a, b, 1 / 0.07, np.arange(256), np.ones(256, bool)).loss
    np.testing.assert_allclose(value, expected, rtol=1e-5)

"""The benchmark of loaders: what ours reads is what it is given; peers are not needed here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import _inputs_peers as others
from benchmarks import inputs
from benchmarks._inputs_peers import Batch, View
from benchmarks._pairs import Effort


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, emoji_dir: Any) -> None:
    for name, value in {"EXAMPLES": 32, "BATCH": 8, "BATCHES": 1, "SHARDS": 2}.items():
        monkeypatch.setattr(inputs, name, value)
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    monkeypatch.setattr(others, "WORKERS", 0)  # threads; `test_run.py` has a process


@pytest.fixture
def kind() -> inputs.Kind:
    return inputs.KINDS["large, 288 px JPEG"]


def by_files(path: Path, view: View) -> Iterator[Batch]:
    """Return what a peer does, in this process."""
    files = others.Files(path / "files", view)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(files))
        for at in range(0, len(order), inputs.BATCH):
            yield others.collate([files[i] for i in order[at : at + inputs.BATCH]])


def test_it_measures_ours_alone() -> None:
    found = {each.name: each for each in inputs.measure(Effort({}, 2, 1))}
    assert set(found) == {f"{kind}: mmjax" for kind in inputs.KINDS}
    assert all(len(each.values) == 2 and min(each.values) > 0 for each in found.values())


def test_others_that_read_the_same_are_compared(
    tmp_path: Path, kind: inputs.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {inputs.OURS: inputs.mmjax_loader, "files": by_files}
    monkeypatch.setattr(inputs, "loaders", lambda: both)
    inputs.make_data(tmp_path, kind)
    inputs.assert_equal(tmp_path, kind)


def test_other_pictures_are_not_compared(
    tmp_path: Path, kind: inputs.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inverted(path: Path, view: View) -> Iterator[Batch]:
        return (Batch(255 - b.pictures, b.tokens) for b in by_files(path, view))

    monkeypatch.setattr(
        inputs, "loaders", lambda: {inputs.OURS: inputs.mmjax_loader, "inverted": inverted}
    )
    inputs.make_data(tmp_path, kind)
    with pytest.raises(AssertionError, match="inverted: pictures differ by"):
        inputs.assert_equal(tmp_path, kind)

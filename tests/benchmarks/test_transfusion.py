"""Our half of the step that is timed against the port's, which itself is not needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import mains
import numpy as np
import pytest
from toyrun import CONFIG, EXTRA

from benchmarks import _transfusion_pytorch as port
from benchmarks import run, transfusion
from benchmarks._steps import random_batch
from benchmarks._transfusion_pytorch import Peer, Sizes
from mmjax.experiment import Experiment, make_experiment
from mmjax.nn.stream import Stream
from mmjax.nn.trunk import Trunk

WORDS = (f"--extra={EXTRA}", f"--config={CONFIG}", "--only=transfusion", "--pairs=3")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, emoji_dir: Any) -> None:
    sizes = {"ROWS": 8, "LENGTH": 6, "SIDE": 2, "WIDTH": 8, "LAYERS": 1, "HEADS": 2, "HIDDEN": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(transfusion, name, size)


def with_peer(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Return a port whose trunk has seen `tokens`; its rows' tokens when a step is taken."""
    steps: list[int] = []

    def peer(sizes: Sizes, rows: Any) -> Peer:
        def step() -> float:
            steps.append(sizes.tokens)
            return 0.0

        return Peer(step, tokens, parameters=5, flops=3 * 10**9)

    monkeypatch.setattr(port, "is_installed", lambda: True)
    monkeypatch.setattr(port, "peer", peer)
    return steps


def test_nothing_without_the_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(port, "is_installed", lambda: False)
    assert mains.run(run.main, *WORDS, f"--out={tmp_path}").status == 0
    assert json.loads((tmp_path / "transfusion.json").read_text())["quantities"] == []


def test_both_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = 1 + 6 + 4  # a begin token, the text, the patches
    steps = with_peer(monkeypatch, tokens)
    ended = mains.run(run.main, *WORDS, f"--out={tmp_path}")
    assert (ended.status, ended.err) == (0, "")
    assert steps == [tokens] * 4  # the first is not timed
    quantities = json.loads((tmp_path / "transfusion.json").read_text())["quantities"]
    found = {each["name"]: each for each in quantities}
    assert found["GFLOP of matrix products, peer's"]["median"] == 3
    assert found["parameters, ours"]["median"] == parameters(experiment())
    ours, theirs = (found[name]["values"] for name in ("our step", "peer's step"))
    ratios = np.divide(theirs, ours)
    np.testing.assert_allclose(found["peer's step to ours"]["values"], ratios)
    scale = found["GFLOP of matrix products, ours"]["median"] / 3
    np.testing.assert_allclose(
        found["peer's step to ours, per FLOP"]["values"], ratios * scale, rtol=1e-6
    )


def test_rows_of_other_lengths_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peer(monkeypatch, tokens=10)
    ended = pytest.raises(AssertionError, transfusion.measure, run.Effort({}, 1, 1))
    assert "10 tokens in the port's trunk, 11 in ours" in str(ended.value)


def test_the_tokens_are_those_of_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the trunk gets when the loss is traced; all of them are valid."""
    made = experiment()
    batch = random_batch(made, transfusion.TASK, 0).rows
    seen: list[Stream] = []
    called = Trunk.__call__

    def watched(trunk: Trunk, stream: Stream, key: jax.Array) -> Any:
        seen.append(stream)
        return called(trunk, stream, key)

    def loss() -> jax.Array:
        model = made.declaration.merge(made.declaration.initialise(0))
        return made.tasks[transfusion.TASK].loss(model, batch, jax.random.key(0)).value

    monkeypatch.setattr(Trunk, "__call__", watched)
    jax.eval_shape(loss)
    assert [stream.x_BSD.shape for stream in seen] == [(8, 11, 8)]
    assert transfusion.row_tokens(made) == 11
    assert batch.inputs["text"]["valid"].all() and batch.valid.all()


def experiment() -> Experiment:
    return make_experiment(transfusion.block(0))


def parameters(made: Experiment) -> int:
    return sum(int(np.prod(spec.shape)) for spec in made.declaration.specs.values())

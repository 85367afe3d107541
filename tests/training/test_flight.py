"""Steps under way: how many, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
from toyrun import run, wrap_calls


def test_two_steps_are_in_flight_and_never_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flying: list[Any] = []
    most: list[int] = []
    get = jax.device_get

    def counted(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            state, metrics = call(*arguments)
            flying.append(metrics)
            most.append(len(flying))
            return state, metrics

        return wrapped

    def fetched(tree: Any) -> Any:
        flying[:] = [metrics for metrics in flying if metrics is not tree]
        return get(tree)

    wrap_calls(monkeypatch, counted)
    monkeypatch.setattr(jax, "device_get", fetched)
    run(tmp_path / "run", "checkpoint.every=0", "evaluation.every=0")
    assert len(most) == 12 and not flying
    # The first is alone; each later one is sent before its predecessor has been asked for.
    assert most == [1] + [2] * 11

"""The benchmarks run and write their results. No time is asserted here."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mains
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from toyrun import CONFIG, EXTRA

from benchmarks import experts, inputs, run, scaling, starting, untied
from benchmarks._pairs import interval, quantity


def one_round(pairs: int, seed: int, compiling: Any = scaling._compiling) -> list[list[float]]:
    """Return the seconds of one round of compilations as those of all rounds."""
    return [pairs * each for each in compiling(1, seed)]


def first_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that returns what the first call of `function` does."""
    results: list[Any] = []

    def call(*arguments: Any) -> Any:
        if not results:
            results.append(function(*arguments))
        return results[0]

    return call


# Of cases whose sizes are their own, smaller ones; by module of `benchmarks`.
SMALL: dict[str, dict[str, Any]] = {
    "checkpoints": {"SIZES": (0.001,)},
    "checksums": {"SIZES": (0.001, 0.002)},
    "contrastive": {"BATCHES": (64,)},
    "experts": {
        "ROWS": 4, "LENGTH": 16, "WIDTH": 16, "HIDDEN": 64, "COUNT": 4,
        "ROUTERS": {**experts.ROUTERS, "soft": {"name": "soft", "slots_per_expert": 4}},
    },
    "inputs": {
        "EXAMPLES": 32, "BATCH": 8, "BATCHES": 1, "SHARDS": 2, "KINDS": dict(list(inputs.KINDS.items())[:1]),
    },
    "_inputs_peers": {"WORKERS": 1},
    "scaling": {
        "BASE": {"tokens": 8, "batch": 8, "depth": 1, "experts": 0}, "WIDTH": 16, "HIDDEN": 32,
        "SERIES": {"tokens": (8, 16), "experts": (2, 4)}, "PROGRAMS": (1, 2), "TASKS": (2, 4), "LOOKUPS": 10,
        "_compiling": one_round,
    },
    "starting": {"_round": first_result(starting._round)},  # a round is of three processes
    "untied": {
        "ROWS": 2, "LENGTH": 96, "WIDTH": 16, "LAYERS": 2, "INNER": 8, "STATE": 2,
        "BLOCK": {**untied.BLOCK, "mlp_dim": 32},
    },
    "vit": {"SIZES": {"Ti": (32, 2, 2)}, "SHAPES": (("Ti", 32, 8),)},
}  # fmt: skip
WORDS = (f"--extra={EXTRA}", f"--config={CONFIG}", "--config.mesh.data=8")


@pytest.mark.parametrize("case", run.cases())
def test_a_case_measures_and_writes(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, emoji_dir: Any
) -> None:
    for module in (case, f"_{case}_peers"):
        for name, value in SMALL.get(module, {}).items():
            monkeypatch.setattr(importlib.import_module(f"benchmarks.{module}"), name, value)
    ended = mains.run(run.main, *WORDS, f"--only={case}", "--pairs=3", f"--out={tmp_path}")
    assert (ended.status, ended.err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{case}.json", f"{case}.md"]
    found = json.loads((tmp_path / f"{case}.json").read_text())
    assert found["case"] == case and f"--only={case}" in found["command"] and found["about"]
    assert found["environment"].keys() >= {"jax", "python", "processor", "cores", "devices"}
    for each in found["quantities"]:
        assert len(each["values"]) == found["pairs"] == 3
        assert min(each["values"]) > 0 or each["unit"] == "exponent"
        assert each["low"] <= each["median"] <= each["high"]
    page = (tmp_path / f"{case}.md").read_text()
    assert found["command"] in page
    for each in found["quantities"]:
        assert f"| {each['name']} | {each['median']:.4g}" in page
    assert re.search(f"^{case}$", ended.out, re.M)


def test_cases_are_found_by_listing() -> None:
    assert {"switching", "loader"} <= set(run.cases())
    assert not [n for n in run.cases() if n.startswith("_") or n in ("run", "readme")]


def test_what_a_person_gets_wrong() -> None:
    assert "Did you mean 'switching'" in mains.refused(run.main, "--only=swiching", *WORDS)
    assert "--pairs" in mains.refused(run.main, "--pairs=0", *WORDS)


@settings(deadline=None)
@given(st.integers(6, 200))
def test_the_interval_is_the_binomial_one(n: int) -> None:
    """The narrowest pair of order statistics that holds the median with 95 %, against SciPy's law."""
    low, high = interval(range(n))
    k = int(low)  # of the values 0 .. n - 1, this many lie below
    assert high == n - 1 - k
    assert 1 - 2 * binom.cdf(k, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k + 1, n, 0.5)


def test_quantities_by_hand() -> None:
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)  # too few for more
    found = quantity("x", [float(i) for i in range(30)])
    assert (found.median, found.low, found.high) == (14.5, 9.0, 20.0)

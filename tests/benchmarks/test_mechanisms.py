"""The experiment of mechanisms: what is compared, at which compute, how it sums up, and a run of it."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toyrun
from mains import refused
from mains import run as run_main

from benchmarks.experiments import mechanisms, mixture
from benchmarks.experiments.comparisons import COMPARISONS, IMP, Comparison, Variant, chosen
from benchmarks.experiments.mixture import Trial
from mmjax import train

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "tests" / "configs" / "toy.py")
EXTRA = f"--extra={ROOT / 'tests' / 'extra'}"


FLOPS = mechanisms.flops


@cache
def flops_of(block: str) -> int:
    return FLOPS(json.loads(block))


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_variants_of_a_comparison_end_at_the_same_compute(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Comparisons of one folder have variants in common: they are counted once.
    monkeypatch.setattr(mechanisms, "flops", lambda block: flops_of(json.dumps(block)))
    runs, cost = mechanisms.trials(COMPARISONS[name], [0, 1], ())
    assert len(runs) == 2 * len(cost)
    spent = [each["flops"] for each in cost.values()]
    assert max(spent) / min(spent) < 1.01
    blocks = {repr(variant.block()) for variant in COMPARISONS[name].variants.values()}
    assert len(blocks) == len(cost)


def toy(*overrides: str) -> Variant:
    return Variant(TOY, ("tasks.two.weight=0", "tasks.two.evaluators={}", *overrides))


TOYS = Comparison("Does it?", {"narrow": toy(), "wide": toy("tasks.one.batch=16")}, parts=("loss",))


def test_more_work_in_a_step_means_fewer_steps() -> None:
    toyrun.block()  # makes the toy modules known
    runs, cost = mechanisms.trials(TOYS, [7], ("steps=30",))
    assert cost["narrow"]["steps"] == 30 and cost["wide"]["steps"] == 15
    assert cost["narrow"]["flops"] == cost["wide"]["flops"]
    assert [t.overrides[-2:] for t in runs] == [("seed=7", "steps=30"), ("seed=7", "steps=15")]


def test_values_by_variant_and_seed() -> None:
    def record(name: str, value: float) -> dict[str, object]:
        return {
            "task": "a",
            "split": "new",
            "name": name,
            "value": value,
            "chance": 9.0,
            "unit": "loss",
        }

    comparison = Comparison("Does it?", TOYS.variants, ("loss ",))
    found = {
        Trial(seed, label, ()): [record("loss text", value), record("loss", 5.0)]
        for seed, label, value in [(0, "narrow", 1.0), (1, "narrow", 3.0), (0, "wide", 0.5), (1, "wide", 2.0)]
    }  # fmt: skip
    assert mechanisms.summarise(Comparison("?", TOYS.variants, without=("a",)), found) == []
    [row] = mechanisms.summarise(comparison, found)
    assert row["values"] == {"narrow": {0: 1.0, 1: 3.0}, "wide": {0: 0.5, 1: 2.0}}
    cost = {label: {"steps": 3, "flops": 2 * 10**12} for label in TOYS.variants}
    page = mechanisms.markdown(
        "toys", {"asks": "Does it?", "cost": cost, "rows": [row], "match": {"text": [0.5, 0.7]}}
    )
    assert (
        "The text loss of training: narrow is where wide ends after 60.0 ± 14.1 % of the steps."
        in page
    )
    assert "| a | loss text | new | 2.000 ± 1.414 | 1.250 ± 1.061 | 0.750 ± 0.354 | 9.000 |" in page
    assert "narrow: 3 steps, 2 TFLOP" in page
    assert (
        "narrow against wide: ahead in every seed in 0 of 1 measures, behind in every seed in 1; "
        "the seeds differ, or are equal, in 0." in page
    )


def test_ahead_is_more_of_a_fraction_and_less_of_a_loss() -> None:
    def row(unit: str, ones: list[float], others: list[float]) -> dict[str, object]:
        values = {"a": dict(enumerate(ones)), "b": dict(enumerate(others))}
        return {"unit": unit, "values": values}

    rows = [
        row("fraction", [0.3, 0.4], [0.2, 0.3]), row("loss", [0.3, 0.4], [0.5, 0.6]),
        row("fraction", [0.1, 0.1], [0.2, 0.2]), row("fraction", [0.3, 0.1], [0.2, 0.2]),
        row("fraction", [0.2, 0.3], [0.2, 0.2]), row("experts", [8.0, 8.0], [1.0, 1.0]),
    ]  # fmt: skip
    said = mechanisms._verdict(rows, "a", "b")
    assert "ahead in every seed in 2 of 5 measures, behind in every seed in 1;" in said
    assert said.endswith("in 2.")


def test_experts_in_use_by_hand() -> None:
    """The exponential of the entropy of the mean shares, of the last fifth of the steps."""
    early = [{"usage 001 image": [1.0, 0.0, 0.0, 0.0]}] * 8
    late = [
        {"usage 001 image": [1.0, 0.0, 0.0, 0.0], "usage 001 text": [0.5, 0.5, 0.0, 0.0]},
        {"usage 001 image": [0.0, 1.0, 0.0, 0.0], "loss": 3.0},
    ]
    found = mechanisms.in_use([*early, *late])
    assert found == {"001 image": (pytest.approx(2.0), 4), "001 text": (pytest.approx(2.0), 4)}
    assert mechanisms.in_use([{"loss": 1.0}]) == {}
    runs = {Trial(seed, "a", ()): [*early, *late] for seed in (0, 1)}
    image, text = mechanisms.routing(runs)
    assert image["name"] == "experts in use 001 image" and image["chance"] == 4.0
    assert set(image["values"]["a"]) == {0, 1} and text["unit"] == "experts"


def test_a_suite_is_its_comparisons() -> None:
    assert chosen([]) == list(COMPARISONS) and chosen(["imp"]) == list(IMP)
    assert chosen(["imp_experts", "coca", "imp_experts"]) == ["imp_experts", "coca"]


def test_runs_in_common_are_the_same_run() -> None:
    """Comparisons of one folder: the same label, the same config and overrides, of as many steps."""
    known: dict[tuple[str, str], object] = {}
    for name, comparison in IMP.items():
        first = next(iter(comparison.variants))
        for label, variant in comparison.variants.items():
            seen = known.setdefault((comparison.folder or name, label), variant)
            assert seen == variant
        if comparison.folder:
            assert first == "imp", "the side that sets how much is trained"


def test_how_soon_the_system_is_where_the_other_one_ends() -> None:
    assert mechanisms.share_to_match([5.0, 3.0, 2.0, 1.0], [6.0, 5.0, 4.0, 2.5]) == 0.75
    assert mechanisms.share_to_match([5.0, 3.0], [6.0, 1.0]) is None
    labels = ["one", "two"]
    said = mechanisms._matched("text", labels, [0.5, None, 0.7])
    assert said.endswith("one is where two ends after 60.0 ± 14.1 % of the steps, in 2 of 3 seeds.")
    assert mechanisms._matched("text", labels, [None]).endswith("ends in none of 1 seeds.")
    values = [float(x) for x in np.random.default_rng(0).normal(size=50)]
    wanted = [np.mean(values[max(0, i - mechanisms.SPAN + 1) : i + 1]) for i in range(50)]
    np.testing.assert_allclose(mechanisms.smoothed(values), wanted)


def in_this_process(words: list[str], *, stdout: Any, **_: Any) -> Any:
    """Stand for `subprocess.run` of `mmjax train`."""
    assert words[1:4] == ["-m", "mmjax", "train"]
    ended = run_main(train.main, *words[4:])
    stdout.write(ended.out + ended.err)
    return subprocess.CompletedProcess(words, ended.status)


def test_it_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training of both sides, their table and picture; the second time nothing is trained again."""
    here = SimpleNamespace(run=in_this_process, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(mixture, "subprocess", here)  # `test_mixture.py` has processes
    monkeypatch.setitem(COMPARISONS, "toys", TOYS)
    words = [f"--out={tmp_path}", "--only=toys", "--seeds=0", EXTRA, "--config.steps=4"]
    ended = run_main(mechanisms.main, *words)
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "results.json").read_text())
    values = [row["values"] for row in found["toys"]["rows"]]
    assert values and all(set(v) == {"narrow", "wide"} for v in values)
    assert "toys.svg" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "toys.svg").read_text().count("<svg") == 1
    assert (tmp_path / "toys-courses.svg").read_text().count("<svg") == 1
    assert len(found["toys"]["match"]["loss"]) == 1
    # Another comparison of the same folder trains only what is new.
    other = Comparison("And that?", TOYS.variants, folder="toys")
    monkeypatch.setitem(COMPARISONS, "others", other)
    log = tmp_path / "toys" / "narrow-seed0.log"
    before = log.read_text()
    assert run_main(mechanisms.main, *words, "--only=others").status == 0
    assert log.read_text()[len(before) :].count("Done: ") == 2
    assert not (tmp_path / "others").exists() and (tmp_path / "others.svg").exists()


def test_a_comparison_that_is_not_there(tmp_path: Path) -> None:
    said = refused(mechanisms.main, f"--out={tmp_path}", "--only=mot_discret")
    assert "Did you mean 'mot_discrete'" in said

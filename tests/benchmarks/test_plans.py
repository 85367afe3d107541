"""Our half of the benchmark of plans; the peer itself is not needed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import plans
from benchmarks._pairs import Effort
from benchmarks._steps import random_batch
from mmjax.experiment import make_experiment

MACHINE = plans.Machine("v5e", (2, 2), "v5e-4", {"decoder": 1, "ViT": 1})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "FULL", plans.SMALL)
    monkeypatch.setattr(plans, "MACHINES", (MACHINE,))
    monkeypatch.setattr(plans, "find_spec", lambda name: object())


def _as_ours(request: Any, env: Any) -> Any:
    """Let numbers take MaxText's place that differ from ours by what is asked in `planned`."""
    if "parameters" in request:
        found = dict(np.load(request["parameters"]))
        assert {"ids"} <= found.keys() or {"pixels", "labels", "1/up_bias"} <= found.keys()
        return request["sizes"]["loss"]
    return request["sizes"]["planned"]


def test_plans_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory of ours, and half of what is sent."""
    ours = plans.ours("decoder", MACHINE)
    told = {
        **ours,
        "bytes": 2 * ours["bytes"],
        "sent": ours["sent"] / 2,
        "flops": 3 * ours["model"],
    }
    sizes = {"decoder": {**plans.SMALL["decoder"], "planned": told}}
    monkeypatch.setattr(plans, "FULL", sizes)
    monkeypatch.setattr(plans, "ours", lambda *given: ours)
    monkeypatch.setattr(plans, "losses", lambda what: (1.0, 1.0))
    monkeypatch.setattr(plans, "_ask", _as_ours)
    found = {each.name: each for each in plans.measure(Effort({}, 3, 1))}
    where = "decoder, v5e:2x2"
    assert found[f"{where}: memory of a chip, ours to MaxText"].values == (0.5,) * 3
    assert found[f"{where}: bytes that a chip sends, ours to MaxText"].values == (2.0,) * 3
    assert found[f"{where}: compiled to model FLOPs, MaxText"].values == (3.0,) * 3
    # Everything again but for the first products: the state lies over four chips, and its gradient is sent.
    assert 1.2 < found[f"{where}: compiled to model FLOPs, ours"].median < 1.4
    assert ours["sent"] > 0 and ours["bytes"] > 3 * 4 * ours["parameters"] / 4
    assert not ours["unknown"]


@pytest.mark.parametrize("what", ["decoder", "ViT"])
def test_another_loss_is_refused(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    experiment = make_experiment(
        {**plans.block(what, plans.SMALL[what], 4), "dtype": {"compute": "float32"}}
    )
    loss, _ = plans.our_loss(experiment, random_batch(experiment, plans.TASK, 0))
    sizes = {what: {**plans.SMALL[what], "loss": loss}}
    monkeypatch.setattr(plans, "SMALL", sizes)
    monkeypatch.setattr(plans, "_ask", _as_ours)
    np.testing.assert_allclose(*plans.losses(what), rtol=1e-6)
    sizes[what]["loss"] = loss + 0.01
    monkeypatch.setattr(plans, "FULL", sizes)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        plans.measure(Effort({}, 1, 1))


def test_other_parameters_are_refused() -> None:
    one = {
        "parameters": 100,
        "bytes": 1,
        "state": 1,
        "sent": 1,
        "flops": 1,
        "model": 1,
        "unknown": [],
    }
    with pytest.raises(AssertionError, match="parameters of a step"):
        plans.compared("a step", {"ours": one, "MaxText": {**one, "parameters": 102}}, 1)


def test_flops_that_are_not_all_known_are_not_told() -> None:
    one = {
        "parameters": 1,
        "bytes": 1,
        "state": 1,
        "sent": 1,
        "flops": 2,
        "model": 1,
        "unknown": [],
    }
    both = {"ours": one, "MaxText": {**one, "unknown": ["kernel x"]}}
    told = [each.name for each in plans.compared("a step", both, 1) if "FLOPs" in each.name]
    assert told == ["a step: compiled to model FLOPs, ours"]

"""Plans from what a compiler might say: what fits, by how much not, and where FLOPs go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import toyrun

from mmjax.core.chips import chip
from mmjax.experiment import make_experiment
from mmjax.plan import report
from mmjax.plan.report import make_plan, where_the_rest_goes
from mmjax.plan.tables import print_plan
from mmjax.plan.topology import Topology
from mmjax.plan.workers import Reports

GIB = 2**30
GRADIENT = "jit(step)/transpose(jvp())/while/body/closed_call/dot_general"
REMAT = (
    "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/dot_general"
)


def case(**changes: Any) -> dict[str, Any]:
    found = {
        "status": "compiled", "task": "one", "kind": "train", "shape": "8 x 2", "tokens": 16, "cached": False,
        "model_flops": 4000, "flops": 1000, "beside_bytes": 5, "compile_seconds": 1.0,
        "bytes": {"arguments": 2 * GIB, "temporaries": 9 * GIB, "peak": 10 * GIB, "outputs": 0, "code": 7},
        "products": [{"name": GRADIENT, "flops": 1000}], "memory_bytes": 819_000_000, "busy_seconds": 0.002,
        "collectives": [{"wire": "ici", "kind": "all-gather", "axes": "fsdp", "bytes": 90_000_000}], "unknown": [],
    }  # fmt: skip
    return {**found, **changes}


def plan(state: int = GIB, **cases: dict[str, Any]) -> dict[str, Any]:
    found = chip("TPU v5e")
    assert found is not None
    facts = {
        "device": "TPU v5 lite", "mesh": {"data": 2, "fsdp": 2}, "chip": dataclasses.asdict(found),
        "state_bytes": state, "versions": {"jax": "0"}, "names": list(cases),
    }  # fmt: skip
    experiment = make_experiment(toyrun.block())
    return make_plan(experiment, Topology("v5e", (2, 2)), Reports(facts, cases), is_fast=True)


def test_what_is_needed_is_the_peak_what_lies_beside_it_and_all_code() -> None:
    found = plan(one=case(), two=case(bytes={**case()["bytes"], "code": 100}))
    assert found["fits"] and found["code_bytes"] == 107
    first = found["programs"][0]["bytes"]
    assert first["needed"] == 10 * GIB + 5 + 107
    assert (first["arguments"], first["temporaries"], first["over"]) == (2 * GIB, 8 * GIB, 0)


def test_code_of_the_others_can_be_too_much() -> None:
    """Each compiles; together they do not fit."""
    large = {**case()["bytes"], "code": 6 * GIB}
    found = plan(one=case(bytes=large), two=case())
    assert not found["fits"]
    assert [p["bytes"]["over"] > 0 for p in found["programs"]] == [True, True]


def test_the_estimate_is_the_longest_part_and_hours_are_visits() -> None:
    found = plan(one=case())["programs"][0]
    estimate = found["estimate"]
    assert estimate["memory"] == pytest.approx(1e-3) and estimate["ici"] == pytest.approx(1e-3)
    assert estimate["compute"] == pytest.approx(1000 / 197e12) and estimate["dcn"] == 0
    assert estimate["seconds"] == 0.002
    assert estimate["mfu"] == pytest.approx(4000 / 4 / 197e12 / 0.002)
    assert found["visits"] == 8 and found["hours"] == pytest.approx(8 * 0.002 / 3600)


def test_dcn_can_be_the_longest_part() -> None:
    sent = [{"wire": "dcn", "kind": "all-reduce", "axes": "data", "bytes": 3_125_000_000}]
    assert plan(one=case(collectives=sent))["programs"][0]["estimate"]["seconds"] == 1.0


def test_what_the_compiler_refuses_does_not_fit_by_so_much(capsys: Any) -> None:
    refused = {
        "status": "out_of_memory",
        "required_bytes": 20 * GIB,
        "message": "RESOURCE_EXHAUSTED",
    }
    found = plan(one={**case(), **refused}, two=case())
    first = found["programs"][0]
    assert not found["fits"] and not first["fits"] and found["programs"][1]["fits"]
    assert first["bytes"]["over"] == 20 * GIB + 5 + 7 - int(15.75 * GIB)
    assert "--config.model.remat=full" in first["help"]
    assert "--config.tasks.one.microbatches=2 or more" in first["help"]
    print_plan(found)
    said = capsys.readouterr().out
    assert "DOES NOT FIT: one needs 20.0 GiB, 4.3 GiB over the 15.8 GiB of a device." in said
    assert "Everything fits" not in said


def test_a_large_state_is_advised_to_be_sharded_further() -> None:
    refused = {"status": "out_of_memory", "required_bytes": 20 * GIB, "message": ""}
    found = plan(state=14 * GIB, one={**case(), **refused})
    assert "--config.mesh.fsdp=4 instead of 2" in found["programs"][0]["help"][0]


@pytest.mark.parametrize("status", ["failed", "crashed", "time_limit"])
def test_what_was_not_compiled_is_no_fit(status: str, capsys: Any) -> None:
    found = plan(one={"status": status, "message": "why it was lost"}, two=case())
    assert not found["fits"] and found["hours"] is None
    print_plan(found)
    assert "NOT COMPILED: one: why it was lost" in capsys.readouterr().out


def test_a_program_at_its_model_flops_needs_no_explanation() -> None:
    assert plan(one=case())["programs"][0]["flops"] == {
        "model": 4000,
        "compiled": 4000,
        "ratio": 1.0,
    }


def test_where_the_rest_goes() -> None:
    """100 of the update, 30 computed again, and 20 done by several devices alike: of each, on 4 devices."""
    products = [
        {"name": GRADIENT, "flops": 1020}, {"name": REMAT, "flops": 30}, {"name": "jit(step)/vmap()/dot", "flops": 100},
    ]  # fmt: skip
    rest = where_the_rest_goes(products, model=4000, devices=4)
    assert {r["part"]: (r["flops"], r["largest"]) for r in rest} == {
        report.GRADIENT: (80, [GRADIENT]),
        report.OUTSIDE: (400, ["jit(step)/vmap()/dot"]),
        report.RECOMPUTED: (120, [REMAT]),
    }


def test_above_the_ratio_the_plan_says_where(capsys: Any) -> None:
    products = [{"name": GRADIENT, "flops": 1000}, {"name": REMAT, "flops": 101}]
    found = plan(one=case(flops=1101, products=products))
    print_plan(found)
    assert found["programs"][0]["flops"]["rest"][0]["flops"] == 404
    assert REMAT in capsys.readouterr().out.replace("\n", "")


def test_an_evaluation_has_one_part() -> None:
    products = [{"name": "jit(run)/while/body/dot_general", "flops": 1500}]
    (rest,) = where_the_rest_goes(products, model=4000, devices=4)
    assert rest["flops"] == 2000

"""Plans from what a compiler might report: what fits, by how much not, and where FLOPs go."""

from __future__ import annotations

import pytest
from planned import GIB, GRADIENT, REMAT, case, plan

from mmjax.plan import report
from mmjax.plan.report import where_the_rest_goes


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


def test_a_large_state_is_advised_to_be_sharded_further() -> None:
    refused = {"status": "out_of_memory", "required_bytes": 20 * GIB, "message": ""}
    found = plan(state=14 * GIB, one={**case(), **refused})
    assert "--config.mesh.fsdp=4 instead of 2" in found["programs"][0]["help"][0]


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


def test_an_evaluation_has_one_part() -> None:
    products = [{"name": "jit(run)/while/body/dot_general", "flops": 1500}]
    (rest,) = where_the_rest_goes(products, model=4000, devices=4)
    assert rest["flops"] == 2000

"""Plans as they are printed."""

from __future__ import annotations

from typing import Any

import pytest
from planned import GIB, GRADIENT, REMAT, case, plan

from mmjax.plan.tables import print_plan


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


@pytest.mark.parametrize("status", ["failed", "crashed", "time_limit"])
def test_what_was_not_compiled_is_no_fit(status: str, capsys: Any) -> None:
    found = plan(one={"status": status, "message": "why it was lost"}, two=case())
    assert not found["fits"] and found["hours"] is None
    print_plan(found)
    assert "NOT COMPILED: one: why it was lost" in capsys.readouterr().out


def test_above_the_ratio_the_plan_says_where(capsys: Any) -> None:
    products = [{"name": GRADIENT, "flops": 1000}, {"name": REMAT, "flops": 101}]
    found = plan(one=case(flops=1101, products=products))
    print_plan(found)
    assert found["programs"][0]["flops"]["rest"][0]["flops"] == 404
    assert REMAT in capsys.readouterr().out.replace("\n", "")

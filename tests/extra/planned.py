"""A plan from made-up reports of the compiler."""

from __future__ import annotations

import dataclasses
from typing import Any

import toyrun

from mmjax.core.chips import chip
from mmjax.experiment import make_experiment
from mmjax.plan.report import make_plan
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

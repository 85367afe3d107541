"""A plan as plain data: the compiler's report, against what the chip has. The schema is in `mmjax.plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.experiment import Experiment
from mmjax.plan.cost import DCN, ICI
from mmjax.plan.topology import Topology
from mmjax.plan.workers import Reports

VERSION = 1
RATIO = 1.10  # of compiled over model FLOPs; above it the plan reports where the rest goes
_LARGEST = 3  # operations that are named of each part of the rest

RECOMPUTED = "computed again for the gradient (rematerialisation)"
GRADIENT = (
    "in the loss and its gradient (done by several devices alike, or repeated by the compiler)"
)
OUTSIDE = "outside of the gradient (the update, first passes over micro-batches)"


def make_plan(
    experiment: Experiment, topology: Topology, reports: Reports, is_fast: bool
) -> dict[str, Any]:
    """Return the plan of a config for a topology."""
    facts = reports.facts
    visits = experiment.phases.visits(experiment.planned.schedule(), 0, experiment.run.steps)
    code = sum(c["bytes"]["code"] for c in reports.cases.values() if c["status"] == "compiled")
    programs = [
        _program(name, case, facts, code, experiment, visits)
        for name, case in reports.cases.items()
    ]
    train = [p for p in programs if p["kind"] == "train"]
    hours = [p.get("hours") for p in train]
    return {
        "version": VERSION,
        "topology": {
            "name": topology.name, "slices": topology.slices, "devices": _size(facts["mesh"]),
            "device": facts["device"],
        },
        "mesh": facts["mesh"],
        "compiler": {**facts["versions"], "effort": "fast" if is_fast else "default"},
        "assumed": {k: v for k, v in facts["chip"].items() if k != "kind"},
        "steps": experiment.run.steps,
        "state_bytes": facts["state_bytes"],
        "code_bytes": code,
        "fits": all(p["fits"] for p in programs),
        "hours": sum(h for h in hours if h is not None) if None not in hours else None,
        "programs": programs,
    }  # fmt: skip


def _size(mesh: Mapping[str, int]) -> int:
    size = 1
    for n in mesh.values():
        size *= n
    return size


def _program(
    name: str,
    case: Mapping[str, Any],
    facts: Mapping[str, Any],
    code: int,
    experiment: Experiment,
    visits: Mapping[str, int],
) -> dict[str, Any]:
    """Return one entry of `programs`."""
    trained = experiment.phases.programs
    task = trained[name][0].name if name in trained else name.split("/")[0]
    result: dict[str, Any] = {
        "name": name,
        "task": task,
        "kind": "train" if name in trained else name.partition("/")[2],
        "shape": case.get("shape"),
        "status": case["status"],
        "compile_seconds": case.get("compile_seconds"),
        "cached": case.get("cached", False),
    }
    if case["status"] not in ("compiled", "out_of_memory"):
        return {**result, "fits": False, "message": case["message"]}
    limit = facts["chip"]["memory"]
    needed = _needed(case, code)
    fits = case["status"] == "compiled" and needed["needed"] <= limit
    result |= {
        "fits": fits,
        "bytes": {**needed, "limit": limit, "over": max(0, needed["needed"] - limit)},
    }
    if not fits:
        result["help"] = advice(experiment, task, result["kind"], facts, limit)
    if case["status"] == "compiled":
        result |= _costs(case, facts)
    if result["kind"] == "train":
        result |= {"tokens": case["tokens"], "visits": visits.get(name, 0)}
        if "estimate" in result:
            result["hours"] = result["visits"] * result["estimate"]["seconds"] / 3600
    return result


def _needed(case: Mapping[str, Any], code: int) -> dict[str, int]:
    """Return the bytes that one device needs, by kind.

    The compiler's own peak holds arguments and temporaries; its number for temporaries alone counts
    some twice (a peak is refused exactly where it passes the chip's memory, those are not).
    """
    beside = case["beside_bytes"]
    if case["status"] != "compiled":
        required = case["required_bytes"]
        return {"required": required, "beside": beside, "code": code, "needed": required + beside + code}  # fmt: skip
    sizes = case["bytes"]
    peak = sizes["peak"] or sizes["arguments"] + sizes["temporaries"] + sizes["outputs"]
    return {
        "arguments": sizes["arguments"],
        "temporaries": peak - sizes["arguments"],
        "beside": beside,
        "code": code,
        "needed": peak + beside + code,
    }


def _costs(case: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return FLOPs, collectives and the estimate of a compiled program."""
    devices, chip = _size(facts["mesh"]), facts["chip"]
    compiled, model = case["flops"] * devices, case["model_flops"]
    ratio = compiled / model if model else None
    flops = {"model": model, "compiled": compiled, "ratio": ratio}
    if ratio is None or ratio > RATIO:
        flops["rest"] = where_the_rest_goes(case["products"], model, devices)
    sent = {
        wire: sum(c["bytes"] for c in case["collectives"] if c["wire"] == wire)
        for wire in (ICI, DCN)
    }
    parts = {
        "compute": case["flops"] / chip["flops"],
        "memory": case["memory_bytes"] / chip["bandwidth"],
        "busy": case["busy_seconds"],
        **{wire: n / chip[wire] for wire, n in sent.items()},
    }
    return {
        "flops": flops,
        "memory_traffic": case["memory_bytes"],
        "collectives": case["collectives"],
        "unknown": case["unknown"],
        "estimate": {
            **parts,
            "seconds": max(parts["busy"], parts[ICI], parts[DCN]),
            "mfu": model / devices / chip["flops"] / max(parts["busy"], parts[ICI], parts[DCN]),
        },
    }


def where_the_rest_goes(
    products: Sequence[Mapping[str, Any]], model: int, devices: int
) -> list[dict[str, Any]]:
    """Return the products beyond the model's by what they are for, on all devices, and the largest of each.

    Args:
      products: name of the JAX operation, and FLOPs on one device.
      model: model FLOPs of a call.
    """
    parts: dict[str, Counter[str]] = {
        GRADIENT: Counter(),
        OUTSIDE: Counter(),
        RECOMPUTED: Counter(),
    }
    for product in products:
        parts[part_of(product["name"])][product["name"]] += product["flops"] * devices
    is_forward = not parts[GRADIENT] and not parts[RECOMPUTED]
    totals = {part: counts.total() for part, counts in parts.items()}
    # What the model asks for is done in the gradient; of an evaluation, there is no other part.
    totals[OUTSIDE if is_forward else GRADIENT] -= model
    return [
        {"part": part, "flops": n, "largest": [m for m, _ in parts[part].most_common(_LARGEST)]}
        for part, n in totals.items()
        if n > 0
    ]


def part_of(name: str) -> str:
    """Return the purpose of a product, by the name of its JAX operation."""
    if "rematted_computation" in name:
        return RECOMPUTED
    return GRADIENT if "jvp(" in name else OUTSIDE


def advice(
    experiment: Experiment, task: str, kind: str, facts: Mapping[str, Any], limit: int
) -> list[str]:
    """Return advice for a program that does not fit."""
    config, mesh, lines = experiment.tasks[task].config, facts["mesh"], []
    if facts["state_bytes"] > limit // 2:
        lines.append(
            f"the state alone takes {facts['state_bytes'] / limit:.0%} of a device: more devices, or "
            f"--config.mesh.fsdp={2 * mesh['fsdp']} instead of {mesh['fsdp']}"
        )
    if kind != "train":
        return [*lines, f"--config.evaluation.batch={experiment.run.evaluation.batch // 2} or less"]
    model = experiment.run.model
    lines += [
        f"--config.{model.where(n)}.remat=full"
        for n, t in model.stacks.items()
        if t.remat != "full"
    ]
    parts = 2 * config.microbatches
    if config.batch % parts == 0:
        lines.append(f"--config.tasks.{task}.microbatches={parts} or more")
    return [
        *lines,
        f"a batch of less than {config.batch}, or smaller shapes",
        "--advise tries these",
    ]

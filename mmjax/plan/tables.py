"""Plans for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.monitor.tables import (
    human_bytes,
    human_count,
    human_flops,
    human_seconds,
    percent,
    table,
)

_LISTED = 4  # largest collectives of a program


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print tables of memory, FLOPs, estimates and collectives, and what does not fit."""
    where = plan["topology"]
    label = where["name"] if where["slices"] == 1 else f"{where['slices']} x {where['name']}"
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "1 device"
    print(f"Plan for {label}: {where['devices']} devices ({where['device']}), mesh {mesh}.\n")
    _memory_table(plan)
    compiled = [p for p in plan["programs"] if p["status"] == "compiled"]
    if compiled:
        _flops_table(compiled)
    if training := [p for p in compiled if p["kind"] == "train"]:
        _estimate_table(training)
        _collectives_table(training)
    print("\n".join(_remarks(plan)))


def _memory_table(plan: Mapping[str, Any]) -> None:
    rows = []
    for program in plan["programs"]:
        sizes = program.get("bytes", {})
        parts = [_known(human_bytes, sizes.get(k)) for k in ("arguments", "temporaries", "needed")]
        share = percent(sizes["needed"] / sizes["limit"]) if sizes else "-"
        verdict = "yes" if program["fits"] else "NO"
        if program["status"] not in ("compiled", "out_of_memory"):
            verdict = program["status"].replace("_", " ")
        rows.append((_label(program), *parts, share, verdict))
    limit = plan["assumed"]["memory"]
    heads = ("program", "arguments", "temporary", "needed", "of it", "fits")
    table(f"Memory of a device ({human_bytes(limit)})", heads, rows)


def _flops_table(programs: list[Mapping[str, Any]]) -> None:
    rows = [
        (
            _label(p),
            p["shape"],
            human_flops(p["flops"]["model"]),
            human_flops(p["flops"]["compiled"]),
            f"{p['flops']['ratio']:.2f}" if p["flops"]["ratio"] is not None else "-",
        )
        for p in programs
    ]
    table("FLOPs of a call, all devices", ("program", "shape", "model", "compiled", "ratio"), rows)


def _estimate_table(programs: list[Mapping[str, Any]]) -> None:
    rows = []
    for program in programs:
        estimate = program["estimate"]
        parts = [fine_seconds(estimate[k]) for k in ("compute", "memory", "ici", "dcn", "seconds")]
        tokens = _known(human_count, program.get("tokens"))
        rows.append(
            (_label(program), tokens, *parts, percent(estimate["mfu"]), f"{program['hours']:.3g} h")
        )
    heads = ("program", "tokens", "compute", "memory", "ICI", "DCN", "a step", "MFU", "run")
    table("ESTIMATE of a step: roofline, at the peaks below; a lower bound", heads, rows)


def _collectives_table(programs: list[Mapping[str, Any]]) -> None:
    rows = []
    for program in programs:
        largest = sorted(program["collectives"], key=lambda c: -c["bytes"])[:_LISTED]
        for i, c in enumerate(largest):
            name = _label(program) if i == 0 else ""
            rows.append((name, c["wire"].upper(), c["kind"], c["axes"], human_bytes(c["bytes"])))
    if rows:
        heads = ("program", "over", "collective", "mesh axes", "a device sends")
        table(f"Collectives of a call (the {_LISTED} largest)", heads, rows)


def _remarks(plan: Mapping[str, Any]) -> Iterator[str]:
    yield from _where_flops_go(plan)
    rates = plan["assumed"]
    yield (
        f"Assumed of a device: {human_flops(rates['flops'])}FLOP/s (bfloat16), {human_flops(rates['bandwidth'])}B/s to "
        f"memory, {human_flops(rates['ici'])}B/s along a mesh axis (ICI), {human_flops(rates['dcn'])}B/s to other "
        "slices (DCN); all of it at its peak, and all transfers hidden by the computation."
    )
    yield (
        f"Needed: arguments, temporaries, the next batch (evaluation: the rest of the state), and "
        f"{human_bytes(plan['code_bytes'])} of code of all programs. A program's peak is the compiler's."
    )
    if plan["hours"] is not None:
        yield f"All {plan['steps']} training steps: {plan['hours']:.3g} h at the least (ESTIMATE), without evaluation."
    yield from _what_does_not_fit(plan)


def _where_flops_go(plan: Mapping[str, Any]) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for program in plan["programs"]:
        for part in program.get("flops", {}).get("rest", ()):
            entry = f"{_label(program)} ({human_flops(part['flops'])})"
            groups[part["part"], *part["largest"]].append(entry)
    for (part_name, *largest), programs in groups.items():
        yield f"FLOPs beyond the model's, {part_name}: {', '.join(programs)}. {'; '.join(largest)}"
    for program in plan["programs"]:
        for unknown in program.get("unknown", ()):
            yield f"{_label(program)}: not counted in full: {unknown}"


def _what_does_not_fit(plan: Mapping[str, Any]) -> Iterator[str]:
    if plan["fits"]:
        yield "Everything fits."
    for program in plan["programs"]:
        if program["fits"]:
            continue
        if "bytes" not in program:
            yield f"NOT COMPILED: {program['name']}: {program['message']}"
            continue
        sizes = program["bytes"]
        yield (
            f"DOES NOT FIT: {program['name']} needs {human_bytes(sizes['needed'])}, "
            f"{human_bytes(sizes['over'])} over the {human_bytes(sizes['limit'])} of a device."
        )
        yield from (f"  would help: {line}" for line in program["help"])


def print_advice(result: Mapping[str, Any], label: str) -> None:
    """Print what was tried for each task, and what to set."""
    tried = defaultdict(list)
    for choice in result["tried"]:
        tried[choice["task"]].append(choice)
    rows = []
    for task, choices in tried.items():
        for i, choice in enumerate(choices):
            chosen = "<-" if choice["chosen"] else ""
            rows.append((
                task if i == 0 else "", choice["remat"], choice["microbatches"],
                _known(human_bytes, choice["needed"]), choice["fits"], _known(fine_seconds, choice["seconds"]), chosen,
            ))  # fmt: skip
    heads = ("task", "remat", "micro-batches", "needed", "fits", "a step", "")
    table(f"Tried for {label} (a step: roofline ESTIMATE)", heads, rows)
    if result["overrides"]:
        print("The fastest that fits:\n  " + " ".join(f"--config.{o}" for o in result["overrides"]))
    else:
        print("The fastest that fits: the config unchanged." if result["fits"] else "")
    for task in result["without"]:
        print(
            f"DOES NOT FIT: {task}, whatever was tried. A smaller batch or more devices would help."
        )


def _label(program: Mapping[str, Any]) -> str:
    """Return a program's short name, without its fields."""
    return program["task"] if program["kind"] == "train" else f"{program['task']}/{program['kind']}"


def fine_seconds(seconds: float) -> str:
    """Return a time as `human_seconds` does, down to microseconds."""
    if 0 < seconds < 0.00095:
        return f"{1e6 * seconds:.0f}us"
    return f"{1e3 * seconds:.2g}ms" if seconds < 0.0095 else human_seconds(seconds)


def _known(form: Any, value: float | None) -> str:
    return "-" if value is None else form(value)

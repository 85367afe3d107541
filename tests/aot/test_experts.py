"""Check what a layer of experts costs by the TPU's compiler, and how it moves tokens. Nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmjax.plan.topology import environment

ROUTERS = ("expert_choice", "token_choice", "two_choices", "soft")
TOKENS = 64 * 256 // 8 * 256 * 2  # bytes of a device's tokens, in bfloat16


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, environment_of: Callable[..., dict[str, str]]
) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("experts") / "found.json"
    words = [sys.executable, str(Path(__file__).with_name("experts.py")), str(file)]
    env = {**environment_of(1), **environment(), "PYTHONPATH": environment_of(1)["PYTHONPATH"]}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize("router", ROUTERS)
def test_the_compiled_cost_is_that_of_the_slots_and_the_router(
    found: dict[str, Any], router: str
) -> None:
    """To a hundredth; and, but for the router's product, the same with four times as many experts."""
    for kind, passes in (("4 forward", 1), ("16 forward", 1), ("4 backward", 3)):
        name = f"{router} {kind}"
        case = found[name]
        ratio = case["flops"] / passes / (case["experts"] + case["products"])
        assert 0.99 <= ratio <= 1.01, (name, ratio)
    few, many = (found[f"{router} {count} forward"] for count in (4, 16))
    assert many["flops"] - many["products"] == pytest.approx(few["flops"] - few["products"], rel=0.01)  # fmt: skip


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_go_to_experts_and_back_by_all_to_all(found: dict[str, Any], router: str) -> None:
    """Three quarters of a device's slots there, and as much back; nothing is gathered."""
    wires = found[f"{router} 4 forward"]["wires"]
    assert set(wires) == {"all-to-all expert"}
    assert wires["all-to-all expert"] == pytest.approx(2 * TOKENS * 3 / 4, rel=0.02)
    back = found[f"{router} 4 backward"]["wires"]
    assert not any(kind.startswith("all-gather") for kind in back)
    assert back["all-to-all expert"] == pytest.approx(4 * TOKENS * 3 / 4, rel=0.02)


def test_without_an_expert_axis_nothing_moves(found: dict[str, Any]) -> None:
    """The control."""
    assert found["expert_choice 4 whole"]["wires"] == {}

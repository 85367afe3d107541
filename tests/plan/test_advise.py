"""Check which choices are tried, and which is proposed, against a compiler whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import toyrun

from mmjax.core import config as configs
from mmjax.core.config import Block
from mmjax.core.errors import UserError
from mmjax.plan.advise import advise, changed

SPEED = {"none": 1.0, "dots": 1.2, "full": 1.4}
SAVED = {"none": 1.0, "dots": 0.5, "full": 0.2}


def plans(limit: float, calls: list[Any] | None = None) -> Any:
    """Let a step need its batch / micro-batches, less by remat, and take longer by either."""

    def plan(block: Block, task: str) -> Mapping[str, Any]:
        config, remat = block["tasks"][task], block["model"]["remat"]
        parts = config["microbatches"]
        if calls is not None:
            calls.append((task, remat, parts))
        needed = config["batch"] / parts * SAVED[remat]
        seconds = SPEED[remat] * (1 + 0.01 * parts)
        train = {"bytes": {"needed": needed}, "estimate": {"seconds": seconds}}
        train |= {"kind": "train", "fits": needed <= limit}
        return {"programs": [{"kind": "loss", "fits": True}, train]}

    return plan


def test_a_config_that_fits_is_left_as_it_is() -> None:
    calls: list[Any] = []
    found = advise(toyrun.block(), "", plans(16, calls))
    assert found["fits"] and found["overrides"] == []
    assert len(calls) == 6  # each task once with each remat


def test_the_fewest_parts_that_fit_at_the_least_time() -> None:
    """Batches 8 and 16 and room for 4: micro-batches cost 1 % each, rematerialisation 20 %."""
    found = advise(toyrun.block(), "", plans(4))
    assert found["overrides"] == ["tasks.one.microbatches=2", "tasks.two.microbatches=4"]
    chosen = [(t["task"], t["remat"], t["microbatches"]) for t in found["tried"] if t["chosen"]]
    assert chosen == [("one", "none", 2), ("two", "none", 4)]


def test_rematerialisation_where_micro_batches_do_not_help() -> None:
    """Room for half an example: only `full` with single examples makes all fit."""
    found = advise(toyrun.block(), "", plans(0.5))
    assert found["fits"] and found["overrides"][0] == "model.remat=dots"
    assert {t["microbatches"] for t in found["tried"] if t["chosen"]} == {8, 16}


def test_of_several_programs_of_a_task_the_largest_counts() -> None:
    """As activities of a run give it."""
    inner = plans(4)

    def plan(block: Block, task: str) -> Mapping[str, Any]:
        (_, small), (_, large) = (inner(b, task)["programs"] for b in (block, doubled(block, task)))
        return {"programs": [small, large]}

    def doubled(block: Block, task: str) -> Block:
        return configs.override(block, [f"tasks.{task}.batch={2 * block['tasks'][task]['batch']}"])

    found = advise(toyrun.block(), "one", plan)
    assert found["overrides"] == ["tasks.one.microbatches=4"]
    assert [t["needed"] for t in found["tried"] if t["remat"] == "none"] == [16, 8, 4]


def test_nothing_fits() -> None:
    found = advise(toyrun.block(), "one", plans(0.01))
    assert not found["fits"] and found["without"] == ["one"] and found["overrides"] == []


def test_parts_that_do_not_divide_over_the_mesh_end_the_search() -> None:
    inner = plans(0.5)

    def plan(block: Block, task: str) -> Mapping[str, Any]:
        if block["tasks"][task]["microbatches"] > 2:
            raise UserError("a micro-batch does not divide")
        result: Mapping[str, Any] = inner(block, task)
        return result

    assert not advise(toyrun.block(), "one", plan)["fits"]


def test_an_error_of_the_config_itself_is_told() -> None:
    def plan(block: Block, task: str) -> Mapping[str, Any]:
        raise UserError("the batch does not divide")

    with pytest.raises(UserError, match="does not divide"):
        advise(toyrun.block(), "one", plan)


def test_every_tower_is_rematerialised_alike() -> None:
    """Two towers, the second of which is so already: one override, of the first."""
    block = toyrun.block()
    tower = block["model"]
    block["model"] = {"towers": {"eye": tower, "ear": {**tower, "remat": "dots"}}}
    block["modalities"]["other"] = {"name": "toy", "tower": "ear"}
    block["modalities"]["toy"]["tower"] = "eye"
    tried = changed(block, "one", "full", 2)
    assert [t["remat"] for t in tried["model"]["towers"].values()] == ["full", "full"]
    assert "remat" not in block["model"]["towers"]["eye"]

    def plan(config: Block, task: str) -> Mapping[str, Any]:
        towers = config["model"]["towers"]
        return plans(0.5)({**config, "model": towers["eye"]}, task)

    assert advise(block, "", plan)["overrides"][0] == "model.towers.eye.remat=dots"

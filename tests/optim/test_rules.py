"""Rules by parameter path: what matches, what then holds, and what a frozen parameter costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from jax.nn import initializers
from toyrun import host, parts, run

from mmjax.core.errors import UserError
from mmjax.core.parameters import LayerStack, Spec
from mmjax.engine import checkpoint
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.requests import train_requests
from mmjax.optim.rules import RuleConfig, apply_rules

LAYERS = LayerStack(first=0, stride=1, repeat=3, prefix="trunk/layers", inner="kernel")
SPECS = {
    "trunk/groups/0/blocks/0/kernel": Spec(
        "trunk/groups/0/blocks/0/kernel", (3, 4, 4), (None,) * 3, initializers.zeros, False, True, LAYERS
    ),
    "stems/text/bias": Spec("stems/text/bias", (4,), (None,), initializers.zeros, False, False, None),
    "stems/text/embed": Spec(
        "stems/text/embed", (9, 4), (None,) * 2, initializers.zeros, False, True, None
    ),
}  # fmt: skip
TRUNK, BIAS, EMBED = SPECS


def test_without_rules_everything_is_as_declared() -> None:
    found = apply_rules((), SPECS)
    assert found[TRUNK].scale.tolist() == [1, 1, 1] and found[TRUNK].decays.tolist() == [1, 1, 1]
    assert found[BIAS].scale == 1 and found[BIAS].decays == 0 and found[EMBED].decays == 1
    assert not any(rule.frozen for rule in found.values())


def test_layers_have_rates_of_their_own_and_later_rules_say_more() -> None:
    rules = (
        RuleConfig("trunk/.*", learning_rate=0.5, weight_decay=False),
        RuleConfig("trunk/layers/00[12]/.*", learning_rate=0.25),
        RuleConfig(".*/(bias|embed)", weight_decay=True),
        RuleConfig("stems/text/embed", freeze=True),
    )
    found = apply_rules(rules, SPECS)
    assert found[TRUNK].scale.tolist() == [0.5, 0.25, 0.25]
    assert found[TRUNK].decays.tolist() == [0, 0, 0]
    assert found[BIAS].decays == 1 and found[BIAS].scale == 1 and not found[BIAS].frozen
    assert found[EMBED].frozen


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("stems/txet/embed", "stems/text/embed"),
        ("text", "stems/text/"),  # a part of a name is no match
        ("trunk/groups/.*", "trunk/layers/000/kernel"),
        ("(", "no regular expression"),
    ],
)
def test_a_pattern_without_a_match_names_the_nearest(pattern: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        apply_rules((RuleConfig(".*"), RuleConfig(pattern)), SPECS)
    assert "optimizer.rules[1].match" in str(error.value) and words in str(error.value)


def test_a_group_frozen_in_part_is_refused() -> None:
    with pytest.raises(UserError, match="freeze trunk/layers/001/kernel, but not"):
        apply_rules((RuleConfig(".*/001/.*", freeze=True),), SPECS)


# --- in a run ----------------------------------------------------------------------------------

STEM, KERNEL, HEAD = (
    "stems/toy/embed/kernel",
    "trunk/groups/0/blocks/0/inner/kernel",
    "heads/one/out/kernel",
)


def stepped(*overrides: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return parameters before and after a step of task one, and its program's report."""
    toy = parts("optimizer.warmup=0", "optimizer.clip=0.0", *overrides)
    program = compile_all(
        {"one": train_requests(toy.experiment, toy.mesh)["one"]}, toy.mesh, LimitsConfig()
    )["one"]
    before = host(toy.state.parameters)
    state, _ = program.call(toy.state, toy.batch("one", range(8)), toy.ticks("one", 0, 0))
    return before, host(state), program.report


def rules(*each: dict[str, Any]) -> str:
    return f"optimizer.rules={list(each)}"


def test_rates_and_decay_in_a_step() -> None:
    """Adam's first step is the rate times the gradient's sign, whatever its size."""
    before, after, _ = stepped(
        "optimizer.weight_decay=0.0",
        rules(
            {"match": "stems/.*", "learning_rate": 0.5},
            {"match": "trunk/layers/001/.*", "learning_rate": 0.0},
        ),
    )
    moved = {n: np.abs(after.parameters[n] - before[n]) for n in before}
    np.testing.assert_allclose(moved[STEM], 0.005, rtol=1e-2)
    np.testing.assert_allclose(moved[HEAD], 0.01, rtol=1e-2)
    np.testing.assert_allclose(moved[KERNEL][0], 0.01, rtol=1e-2)
    assert not moved[KERNEL][1].any()


def test_a_rule_turns_weight_decay_off_and_on() -> None:
    """The other task's head has no gradient here; only decay moves it."""
    far = "heads/two/out/kernel"
    for switched in (True, False):
        rule = rules({"match": "heads/two/.*", "weight_decay": switched})
        before, after, _ = stepped("optimizer.weight_decay=0.5", rule)
        factor = 1 - 0.01 * 0.5 * switched
        np.testing.assert_allclose(after.parameters[far], before[far] * factor, rtol=1e-6)


def test_what_is_frozen_stays_has_no_state_and_costs_no_gradient() -> None:
    _, whole, report = stepped("optimizer.ema=0.5")
    before, after, frozen = stepped(
        "optimizer.ema=0.5", rules({"match": "(stems|trunk)/.*", "freeze": True})
    )
    still = {n for n in before if not n.startswith("heads/")}
    assert still and after.optimizer.keys() == before.keys() - still
    for name in before:
        assert np.array_equal(after.parameters[name], before[name]) == (
            name in still or name == "heads/two/out/bias"  # it is zero, and stays so
        )
    assert whole.optimizer.keys() == before.keys()
    # Task one by hand, 8 rows of 2 tokens: forward 8 x 2 tokens of stem 6 x 8 and two layers 8 x 8, and the
    # head's 8 x 1 per row; backward only the head's gradient of its kernel.
    forward = 8 * (2 * (48 + 128) + 8) * 2
    assert frozen["flops"] == forward + 8 * 8 * 2
    assert report["flops"] > 2 * forward


def test_a_frozen_part_is_thawed_later(tmp_path: Path) -> None:
    """Staged training: its optimizer state begins when it does."""
    frozen = rules({"match": "trunk/.*", "freeze": True})
    run(tmp_path, frozen, "steps=4")
    start = toyrun.parameters(tmp_path)
    run(tmp_path, "steps=8", allow_change=True)
    state = checkpoint.read_shapes(epath.Path(tmp_path), 8)["optimizer"]
    layer = "trunk/layers/000/inner/kernel"
    assert layer in state
    moved = toyrun.parameters(tmp_path)
    assert not np.array_equal(moved[layer], start[layer])
    run(tmp_path, frozen, allow_change=True)
    assert np.array_equal(toyrun.parameters(tmp_path)[layer], moved[layer])
    state = checkpoint.read_shapes(epath.Path(tmp_path), 12)["optimizer"]
    assert layer not in state and "heads/one/out/kernel" in state


def test_a_rule_is_checked_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.rules\[0\]\.match = 'trunk/x'"):
        run(tmp_path, rules({"match": "trunk/x"}))
    with pytest.raises(UserError, match="Did you mean 'freeze'"):
        run(tmp_path, rules({"match": "trunk/.*", "freez": True}))
    assert jax.devices() and not list(tmp_path.iterdir())

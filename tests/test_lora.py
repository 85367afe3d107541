"""Runs with low-rank deltas: the base at step 0, frozen from then on, and merged at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from mains import run
from toyrun import parts

import mmjax
from mmjax import show
from mmjax.core.errors import UserError
from mmjax.engine import checkpoint
from mmjax.engine.steps import loss_function

EXTRA = f"--extra={toyrun.EXTRA}"
LORA = "lora=[{'match': ['trunk/.*/inner/kernel'], 'rank': 2, 'alpha': 3.0}]"
HEADS = "optimizer.rules=[{'match': 'heads/.*', 'freeze': False}]"
COMMON = (LORA, "evaluation.every=0", "optimizer.warmup=0")
KERNEL = "trunk/groups/0/blocks/0/inner/kernel"


def lost(toy: toyrun.Parts, parameters: Any) -> jax.Array:
    """Return the loss of task `one` on four examples."""
    chosen = toy.experiment.tasks["one"]
    loss = loss_function(toy.experiment.spec, chosen)
    return loss(parameters, {}, toy.batch("one", [0, 1, 2, 3]), np.int32(0)).value


def test_at_step_0_the_model_is_its_base_and_b_has_a_gradient() -> None:
    plain, toy = parts(), parts(LORA)
    base, adapted = toyrun.host(plain.state.parameters), toyrun.host(toy.state.parameters)
    assert adapted.keys() == base.keys() | {f"{KERNEL}_lora_a", f"{KERNEL}_lora_b"}
    module = toy.experiment.declaration.merge(adapted)
    folded = np.asarray(module.trunk.groups[0].blocks[0].inner.kernel[...])
    assert folded.tobytes() == base[KERNEL].tobytes()
    assert abs(float(lost(toy, adapted)) - float(lost(plain, base))) < 1e-6
    of_base = toyrun.host(jax.grad(lambda p: lost(plain, p))(base))
    gradient = toyrun.host(jax.grad(lambda p: lost(toy, p))(adapted))
    a = adapted[f"{KERNEL}_lora_a"]
    for layer in range(2):
        expected = 1.5 * a[layer].T @ of_base[KERNEL][layer]
        np.testing.assert_allclose(
            gradient[f"{KERNEL}_lora_b"][layer], expected, rtol=1e-4, atol=1e-6
        )
        assert np.abs(expected).max() > 1e-3
    assert not np.any(gradient[f"{KERNEL}_lora_a"])


def test_the_base_stays_to_the_bit_and_has_no_state(tmp_path: Path) -> None:
    toyrun.run(tmp_path / "first", "steps=1", "evaluation.every=0")
    first = toyrun.parameters(tmp_path / "first")
    source = f"init_from.path={tmp_path / 'first'}"
    toyrun.run(tmp_path / "lora", *COMMON, source, HEADS, "steps=5", "seed=3")
    last = toyrun.parameters(tmp_path / "lora")
    factors = {f"trunk/layers/00{i}/inner/kernel_lora_{x}" for i in (0, 1) for x in "ab"}
    heads = {name for name in last if name.startswith("heads/")}
    assert last.keys() == first.keys() | factors
    for name, value in last.items():
        same = name in first and np.array_equal(value, first[name])
        assert same == (name not in factors | heads), name
    folder = epath.Path(tmp_path / "lora")
    assert checkpoint.read_shapes(folder, 5)["optimizer"].keys() == factors | heads
    # 2 layers of [8, 2] and [2, 8], and two heads of 8 weights and a bias.
    count = 2 * (16 + 16) + 2 * 9
    total = sum(value.size for value in last.values())
    words = f"Trained: {count} of {total:,} numbers; the others are frozen."
    assert words in run(show.main, str(folder), EXTRA).out
    shown = run(
        show.main, f"--config={toyrun.CONFIG}", EXTRA, f"--config.{LORA}", f"--config.{HEADS}"
    )
    assert words in shown.out


def test_killed_and_resumed_the_bits_are_the_same(tmp_path: Path) -> None:
    toyrun.run(tmp_path / "straight", *COMMON, "steps=4")
    toyrun.run(tmp_path / "halved", *COMMON, "steps=2")
    toyrun.run(tmp_path / "halved", *COMMON, "steps=4")
    assert toyrun.bits(tmp_path / "halved") == toyrun.bits(tmp_path / "straight")


def test_merged_it_is_the_base_with_other_values(tmp_path: Path) -> None:
    toyrun.run(tmp_path, *COMMON, "steps=4")
    adapted, merged = mmjax.load(str(tmp_path)), mmjax.load(str(tmp_path), merge=True)
    before, after = toyrun.host(adapted.parameters), toyrun.host(merged.parameters)
    toy, plain = parts(LORA), parts()
    specs = plain.experiment.declaration.specs
    assert after.keys() == {name for spec in specs.values() for name in spec.canonical}
    assert "lora" in adapted.config and "lora" not in merged.config
    for name, value in after.items():
        expected = before[name].astype(np.float64)
        if name.endswith("inner/kernel"):
            delta = before[f"{name}_lora_a"] @ before[f"{name}_lora_b"]
            assert np.abs(delta).max() > 1e-3
            expected = expected + 1.5 * delta
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    one, two = float(lost(toy, adapted._stacked)), float(lost(plain, merged._stacked))
    assert one == pytest.approx(two, rel=1e-6)
    # Written to a file, it is a source of the base's config.
    np.savez(tmp_path / "merged.npz", **after)
    toyrun.run(tmp_path / "next", f"init_from.path={tmp_path / 'merged.npz'}", "steps=1")


def test_on_a_mesh_that_divides_its_factors_the_parameters_are_the_same(tmp_path: Path) -> None:
    words = (*COMMON, "steps=3", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1")
    toyrun.run(tmp_path / "four", *words, devices=4)
    toyrun.run(tmp_path / "one", *COMMON, "steps=3")
    four, one = toyrun.parameters(tmp_path / "four"), toyrun.parameters(tmp_path / "one")
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-4, atol=1e-5)
    mesh = parts(*words, devices=4)
    specs = {
        n: s.sharding.spec for n, s in mesh.experiment.abstract_state(mesh.mesh).parameters.items()
    }
    assert "fsdp" in str(specs[f"{KERNEL}_lora_a"]) and "tensor" in str(specs[f"{KERNEL}_lora_b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora=[{'match': ['trunk/layers/00./inner/kernal']}]"], r"lora\[0\].match: .*nearest: trunk/layers"),
        (["lora=[{'match': ['trunk/.*/inner/kernel'], 'rank': 0}]"], r"lora\[0\].rank is 0"),
        ([LORA, "optimizer.rules=[{'match': '.*', 'freeze': True}]"], "tasks.one: every parameter"),
        (["optimizer.rules=[{'match': '.*(trunk|stems|heads/one).*', 'freeze': True}]"],
         "tasks.one: every parameter that its loss reaches is frozen"),
    ],
)  # fmt: skip
def test_nothing_to_train_and_nothing_to_adapt_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts(*words)

"""Copies by modality in real training steps: what a task does not see stays as it is, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toyrun
from toyrun import host, parts

from mmjax.blocks.transformer import PARTS
from mmjax.core.parameters import from_canonical, to_canonical
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.requests import train_requests

# `toy` stands for text, `other` for pictures.
NAMES = ["toy", "other"]
DENSE = {"name": "transformer", "num_heads": 2, "mlp_dim": 6, "qk_norm": True}
MOT = {**DENSE, "per_modality": {"parts": list(PARTS), "modalities": NAMES}}
MAMBA = {
    "name": "mamba",
    "state": 2,
    "per_modality": {"parts": ["norm", "in", "x", "dt", "out"], "modalities": NAMES},
}
BOTH = {
    "source": {"name": "toy"},
    "inputs": {"toy": {"tokens": 2}, "other": {"tokens": 3}},
    "objective": {"name": "classification", "classes": 5, "modalities": NAMES, "init": "lecun"},
    "batch": 8,
}


def overrides(*pattern: Any, norms: Any = ()) -> list[str]:
    """Return the toy config with a second modality, and a task that reads both as one sequence."""
    one = {**toyrun.block()["tasks"]["one"], "weight": 1, "evaluators": {}}
    return [
        "modalities.other={'name': 'toy'}",
        f"model.layers={[{'repeat': 1, 'blocks': list(pattern)}]}",
        f"model.per_modality={ {'parts': ['norm'] if norms else [], 'modalities': list(norms)} }",
        f"tasks={ {'one': one, 'both': {**BOTH, 'weight': 1}} }",
        "optimizer.warmup=0",
        "optimizer.algorithm.name=adamw",
    ]


def after(tasks: list[str], *more: str) -> list[Any]:
    """Return the states after steps of `tasks`."""
    toy = parts(*more)
    programs = compile_all(train_requests(toy.experiment, toy.mesh), toy.mesh, LimitsConfig())
    state, states = toy.state, []
    for step, task in enumerate(tasks):
        visit = tasks[:step].count(task)
        now = toy.ticks(task, step, visit)
        state, told = programs[task].call(state, toy.batch(task, range(8)), now)
        assert told["finite"]
        states.append(host(state))
    return states


def unchanged(states: list[Any]) -> set[str]:
    """Return the parameters that the last step leaves alone with their optimizer state, to the bit."""
    result = set()
    for name in states[-1].parameters:
        one, two = ((s.parameters[name], s.optimizer[name]) for s in states[-2:])
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        if all(a.tobytes() == b.tobytes() for a, b in pairs):
            result.add(name)
    return result


def test_copies_of_an_absent_modality_stay_to_the_bit() -> None:
    config = overrides(MOT, MAMBA, norms=NAMES)
    own = after(["both", "one"], *config, "optimizer.update_scope=own_clock")
    of_other = {n for n in own[0].parameters if "other" in n.split("/")}
    assert len(of_other) > 20
    assert unchanged(own) == of_other | {n for n in own[0].parameters if n.startswith("heads/both")}


def test_under_the_shared_view_they_move() -> None:
    """The control of the test above."""
    assert not unchanged(
        after(
            ["both", "one"],
            *overrides({**DENSE, "per_modality": {"parts": ["mlp"], "modalities": NAMES}}),
        )
    )


# --- LlamaFusion: a text model gets eyes and stays as it was ------------------------------------

LAYERS = r"(trunk/layers/\d+/.*|trunk/norm)/(toy|other)(/.*)?"
FREEZE = [r"(trunk/layers/\d+/.*|trunk/norm)/toy(/.*)?", "stems/toy/.*", "heads/one/.*"]


def text_model(path: Path) -> Mapping[str, np.ndarray]:
    """Return a dense model's parameters, in a file."""
    toy = parts(*overrides(DENSE))
    dense = host(to_canonical(toy.experiment.declaration.specs, toy.state.parameters))
    np.savez(path, **{n: a + 0.1 for n, a in dense.items() if "other" not in n})
    return {n: a + 0.1 for n, a in dense.items()}


def outputs(parameters: Mapping[str, Any], *config: str) -> np.ndarray:
    """Return the model's output for texts alone."""
    declaration = parts(*config).experiment.declaration
    rows = jnp.asarray(np.random.default_rng(5).normal(size=(4, 2, 6)), jnp.float32)

    def call(p: Any) -> jax.Array:
        model = declaration.merge(p)
        stream, _ = model.encode([model.tokens("toy", {"rows": rows})], jax.random.key(0))
        return model.heads["one"].out(stream.x_BSD)

    return np.asarray(jax.jit(call)(from_canonical(declaration.specs, parameters)))


def trained(workdir: Path, file: Path, freeze: list[str]) -> Mapping[str, np.ndarray]:
    names = [{"match": LAYERS, "name": r"\1\3"}]
    rules = [{"match": pattern, "freeze": True} for pattern in freeze]
    alone = ["tasks.one.weight=0"] if freeze else []  # a task that trains nothing is refused
    more = [
        f"init_from.path={file}",
        f"init_from.names={names}",
        f"optimizer.rules={rules}",
        *alone,
    ]
    more += ["init_from.skip=['stems/other/.*']"]
    more += ["schedule.rule=shares", "steps=4", "evaluation.every=0"]
    toyrun.run(workdir, *overrides(MOT, norms=NAMES), *more)
    return toyrun.parameters(workdir)


def test_a_frozen_text_model_says_the_same_after_training_on_pictures(tmp_path: Path) -> None:
    config = overrides(MOT, norms=NAMES)
    dense = text_model(tmp_path / "text.npz")
    before = outputs(dense, *overrides(DENSE))
    after = trained(tmp_path / "frozen", tmp_path / "text.npz", FREEZE)
    np.testing.assert_array_equal(outputs(after, *config), before)
    copy, source = "trunk/layers/000/mlp/other/up/kernel", "trunk/layers/000/mlp/up/kernel"
    change = np.abs(after[copy] - dense[source]).max()
    assert 0 < change < 0.1, "pictures began with the text's weights, and learned"


def test_without_the_rules_it_would_not(tmp_path: Path) -> None:
    dense = text_model(tmp_path / "text.npz")
    after = trained(tmp_path / "open", tmp_path / "text.npz", [])
    before = outputs(dense, *overrides(DENSE))
    assert np.abs(outputs(after, *overrides(MOT, norms=NAMES)) - before).max() > 1e-4

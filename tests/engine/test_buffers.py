"""Buffers: proposed by passes, added up, settled once per update; each rule of the state is a test."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import toyrun

from mmjax.core.errors import UserError
from mmjax.core.parameters import STAT
from mmjax.engine.buffers import settled
from mmjax.engine.state import EMA, SUM, SUMMED, evaluated, state_from_canonical, state_to_canonical
from mmjax.engine.steps import train_function

WIDE = ("dtype.parameters=float64", "dtype.compute=float64")
MODEL = (
    "model.layers=[{'repeat': 2, 'blocks': [{'name': 'toy_buffers'}]}]",
    "tasks.one.objective={'name': 'toy_buffers', 'bad_loss': [39]}",
    "optimizer.ema=0.75",
)
MEAN, CODES = "trunk/groups/0/blocks/0/mean", "trunk/groups/0/blocks/0/codes"
LABELS, ROWS = "heads/one/labels/mean", "heads/one/labels/rows"

pytestmark = pytest.mark.usefixtures("x64")


@cache
def parts(*words: str, devices: int = 1) -> toyrun.Parts:
    with jax.enable_x64(True):
        return toyrun.parts(*MODEL, *WIDE, *words, devices=devices)


@cache
def program(*words: str, devices: int = 1, task: str = "one") -> Any:
    made = parts(*words, devices=devices)
    experiment = made.experiment
    function = train_function(experiment.spec, experiment.tasks[task], experiment.optimizers.whole)

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(made.mesh):
            return jax.jit(function)(*arguments)

    return call


def after(
    *words: str, ids: Any = (range(8),), devices: int = 1, tasks: str = "one"
) -> tuple[Any, Any]:
    """Return the state after a step on each of the batches, of a task each, and the last metrics."""
    made = parts(*words, devices=devices)
    state, metrics = made.state, None
    names = tasks.split() * (len(ids) if " " not in tasks else 1)
    for step, (chosen, task) in enumerate(zip(ids, names, strict=True)):
        batch, ticks = made.batch(task, list(chosen)), made.ticks(task, step, step)
        state, metrics = program(*words, devices=devices, task=task)(state, batch, ticks)
    return toyrun.host(state), metrics


def buffers(state: Any) -> dict[str, np.ndarray]:
    return {n.removeprefix(STAT): x for n, x in state.buffers.items() if n.startswith(STAT)}


def labels(ids: Any) -> np.ndarray:
    return np.array([i % 5 for i in ids], float)


def test_an_update_settles_each_buffer_from_the_sums_of_its_rows() -> None:
    """The first layer by hand: it reads x = rows W + b of the stem."""
    made = parts()
    state, _ = after(ids=(range(8), range(8, 16)))
    old = buffers(toyrun.host(made.state))
    first, second = labels(range(8)).mean(), labels(range(8, 16)).mean()
    found = buffers(state)
    np.testing.assert_allclose(found[LABELS], 0.75 * 0.25 * first + 0.25 * second, rtol=1e-12)
    one = buffers(after()[0])
    rows = np.asarray(made.batch("one", list(range(8))).inputs["toy"]["rows"], float)
    begun = toyrun.host(made.state.parameters)
    x_ND = (rows @ begun["stems/toy/embed/kernel"] + begun["stems/toy/embed/bias"]).reshape(-1, 8)
    nearest = [np.argmin(((x - old[CODES][0, :, :-1]) ** 2).sum(axis=1)) for x in x_ND]
    wanted = 0.9 * old[CODES][0]
    for x, code in zip(x_ND, nearest, strict=True):
        wanted[code] += 0.1 * np.append(x, 1)
    np.testing.assert_allclose(one[CODES][0], wanted, rtol=1e-6, atol=1e-8)
    assert np.abs(one[MEAN][0] - 0.1 * x_ND.mean(axis=0)).max() < 6e-3  # the noise of the settle


def test_the_key_of_a_settle_is_of_the_layer_and_the_step() -> None:
    """Without a token's mean the buffer is the noise alone: it differs between layers, steps and seeds."""
    spec = parts().experiment.declaration.buffers[MEAN]
    old = {STAT + MEAN: np.zeros((2, 8))}
    zero = {f"{STAT}{MEAN}/sum": np.zeros((2, 8)), f"{STAT}{MEAN}/count": np.ones(2)}
    noise = [
        settled(old, zero, {MEAN: spec}, seed, np.int32(step))[STAT + MEAN]
        for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    np.testing.assert_array_equal(noise[0], noise[3])
    rows = np.concatenate([np.asarray(n) for n in noise[:3]])
    assert len(np.unique(rows, axis=0)) == 6
    assert spec.canonical == [f"trunk/layers/{i:03d}/mean" for i in range(2)]


SAME = [
    (("tasks.one.microbatches=2",), 1),
    (("tasks.one.microbatches=4",), 1),
    ((), 8),
    (("mesh.tensor=4",), 8),
    (("model.remat=full",), 1),
    (
        (
            "model.layers=[{'repeat': 1, 'blocks': [{'name': 'toy_buffers'}, {'name': 'toy_buffers'}]}]",
        ),
        1,
    ),
]


@pytest.mark.parametrize(("words", "devices"), SAME)
def test_parts_meshes_remat_and_grouping_come_to_the_same(
    words: tuple[str, ...], devices: int
) -> None:
    ids = (range(8), [3, 4, 5])
    wanted, found = after(ids=ids)[0], after(*words, ids=ids, devices=devices)[0]
    trees = [
        state_to_canonical(made.experiment.declaration.stored, state)["buffers"]
        for made, state in ((parts(), wanted), (parts(*words, devices=devices), found))
    ]
    assert trees[0].keys() == trees[1].keys()
    assert len([n for n in trees[0] if n.startswith(STAT)]) == 6
    for name in trees[0]:
        np.testing.assert_allclose(trees[1][name], trees[0][name], rtol=1e-10, atol=1e-13)


def test_invalid_rows_weigh_nothing() -> None:
    """Three rows in a batch of eight: the mean of the labels is theirs."""
    found = buffers(after(ids=([3, 4, 6],))[0])
    np.testing.assert_allclose(found[LABELS], 0.25 * (3 + 4 + 1) / 3, rtol=1e-12)
    np.testing.assert_allclose(found[CODES][0, :, -1].sum(), wanted_count(6), rtol=1e-12)


def wanted_count(tokens: int) -> float:
    old = buffers(toyrun.host(parts().state))[CODES][0, :, -1].sum()
    return float(0.9 * old + 0.1 * tokens)


def test_a_non_finite_step_or_one_without_rows_leaves_buffers_and_averages() -> None:
    state, _ = after()
    for ids in (range(32, 40), []):
        bad, metrics = after(ids=(range(8), ids))
        assert bool(metrics["finite"]) is (ids == [])
        assert bad.buffers.keys() == state.buffers.keys()
        for name in state.buffers:
            np.testing.assert_array_equal(bad.buffers[name], state.buffers[name])


def test_only_steps_whose_loss_proposes_change_a_buffer() -> None:
    """The toy objective of task two hands on no proposals."""
    before, state = toyrun.host(parts().state), after(ids=(range(16),), tasks="two")[0]
    for name, x in buffers(before).items():
        np.testing.assert_array_equal(buffers(state)[name], x)
    moved = (
        before.parameters["stems/toy/embed/kernel"] != state.parameters["stems/toy/embed/kernel"]
    )
    assert moved.any()


def test_own_moments_keep_no_copies_of_buffers() -> None:
    state = parts("optimizer.update_scope=own_moments").state
    assert not [n for n in state.moments if "codes" in n or "labels" in n]
    assert {n for n in state.moments if n.startswith("one:")}


def test_freezing_by_path_freezes_a_buffer() -> None:
    rule = "optimizer.rules=[{'match': '.*/codes', 'freeze': True}]"
    before, state = buffers(toyrun.host(parts(rule).state)), buffers(after(rule)[0])
    np.testing.assert_array_equal(state[CODES], before[CODES])
    assert (state[MEAN] != before[MEAN]).all()
    with pytest.raises(UserError, match="matches the whole of no parameter"):
        parts("optimizer.rules=[{'match': '.*/codes', 'learning_rate': 0.5}]")


def test_an_average_of_a_buffer_moves_with_it() -> None:
    before, state = toyrun.host(parts().state), after(ids=(range(8), range(8, 16)))[0]
    one = after()[0]
    for name in (CODES, MEAN, LABELS):
        mean = 0.75 * before.buffers[STAT + name] + 0.25 * one.buffers[STAT + name]
        wanted = 0.75 * mean + 0.25 * state.buffers[STAT + name]
        np.testing.assert_allclose(state.buffers[EMA + STAT + name], wanted, rtol=1e-12)
    read = evaluated(state)
    np.testing.assert_array_equal(read[STAT + CODES], state.buffers[EMA + STAT + CODES])
    assert read.keys() == {*state.parameters, *(STAT + n for n in (CODES, MEAN, LABELS, ROWS))}


# --- accumulation ------------------------------------------------------------------------------


ACCUMULATE = "optimizer.accumulate=2"


def test_accumulated_steps_settle_once_with_the_sums_of_both() -> None:
    """The first step of a round changes nothing but sums; the second settles with all 16 labels."""
    first, state = after(ACCUMULATE)[0], after(ACCUMULATE, ids=(range(8), range(8, 16)))[0]
    before = buffers(toyrun.host(parts(ACCUMULATE).state))
    for name, x in before.items():
        np.testing.assert_array_equal(buffers(first)[name], x)
    assert first.buffers[f"{SUM}{STAT}{LABELS}/sum"] == labels(range(8)).sum()
    np.testing.assert_allclose(buffers(state)[LABELS], 0.25 * labels(range(16)).mean(), rtol=1e-12)
    assert not any(x.any() for n, x in state.buffers.items() if n.startswith(SUM) or n == SUMMED)


def test_a_non_finite_step_adds_nothing_to_a_round() -> None:
    state = after(ACCUMULATE, ids=(range(8), range(32, 40)))[0]
    np.testing.assert_allclose(buffers(state)[LABELS], 0.25 * labels(range(8)).mean(), rtol=1e-12)


def test_a_round_without_proposals_leaves_the_buffers() -> None:
    ids = (range(16), range(16))
    state = after(ACCUMULATE, ids=ids, tasks="two two")[0]
    for name, x in buffers(toyrun.host(parts(ACCUMULATE).state)).items():
        np.testing.assert_array_equal(buffers(state)[name], x)


def test_a_round_settles_what_one_of_its_steps_has_proposed() -> None:
    state = after(ACCUMULATE, ids=(range(8), range(16)), tasks="one two")[0]
    np.testing.assert_allclose(buffers(state)[LABELS], 0.25 * labels(range(8)).mean(), rtol=1e-12)


# --- rows, and what is refused -----------------------------------------------------------------


def objective(**keys: Any) -> str:
    return f"tasks.one.objective={ {'name': 'toy_buffers', **keys} }"


def test_rows_of_one_proposal_replace_a_buffer() -> None:
    state = after(objective(rows=1), ids=(range(8), range(12, 20)))[0]
    np.testing.assert_array_equal(buffers(state)[ROWS], [2, 3, 4])


REFUSED: list[tuple[Mapping[str, Any], tuple[str, ...], str]] = [
    ({"rows": 2}, (), f"buffer '{ROWS}' is replaced.*second one"),
    ({"rows": 1}, ("tasks.one.microbatches=2",), f"microbatches: buffer '{ROWS}'"),
    ({"rows": 1}, (ACCUMULATE,), f"optimizer.accumulate is 2, and buffer '{ROWS}'"),
    ({"unknown": "heads/one/labels/men"}, (), f"no module declares.*{LABELS}.*Did you mean"),
]


@pytest.mark.parametrize(("keys", "words", "message"), REFUSED)
def test_a_proposal_that_cannot_be_settled_is_refused(
    keys: Mapping[str, Any], words: tuple[str, ...], message: str
) -> None:
    made = (objective(**keys), *words)
    with pytest.raises(UserError, match=message):
        after(*made)


def test_an_unknown_axis_names_the_buffer() -> None:
    layers = "model.layers=[{'repeat': 2, 'blocks': [{'name': 'toy_buffers', 'axis': 'nothing'}]}]"
    with pytest.raises(UserError, match=f"stat/{CODES}'.*'nothing'"):
        parts(layers)


# --- storage -----------------------------------------------------------------------------------


def test_the_canonical_form_has_a_name_for_each_layer_and_comes_back() -> None:
    specs = parts(ACCUMULATE).experiment.declaration.stored
    state = after(ACCUMULATE)[0]
    tree = state_to_canonical(specs, state)
    for layer in range(2):
        name = f"stat/trunk/layers/{layer:03d}/codes"
        np.testing.assert_array_equal(tree["buffers"][name], state.buffers[STAT + CODES][layer])
        np.testing.assert_array_equal(
            tree["buffers"][f"sum/{name}/count"], state.buffers[f"sum/stat/{CODES}/count"][layer]
        )
        assert f"ema/{name}" in tree["buffers"]
    back = state_from_canonical(specs, tree)
    jax.tree.map(np.testing.assert_array_equal, toyrun.host(back), state)


def test_codes_are_divided_as_the_rule_table_says() -> None:
    made = parts("mesh.tensor=4", ACCUMULATE, devices=8)
    for name in (f"stat/{CODES}", f"ema/stat/{CODES}", f"sum/stat/{CODES}/sum"):
        assert made.state.buffers[name].sharding.spec[1] == "tensor", name
        assert made.state.buffers[name].dtype == np.float64


def test_buffers_are_never_narrower_than_float32() -> None:
    made = toyrun.parts(*MODEL, "dtype.parameters=bfloat16", "dtype.compute=bfloat16", ACCUMULATE)
    dtypes = {str(x.dtype) for n, x in made.state.buffers.items() if n != SUMMED}
    assert dtypes == {"float32"}
    assert {str(x.dtype) for x in made.state.parameters.values()} == {"bfloat16"}

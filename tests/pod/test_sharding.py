"""Every mechanism on the meshes that it is sensitive to: as on one device, in float64, and laid out as counted by hand.

The models are those of `mechanisms.py`. Of every system only the layout is compared, and programs are traced;
`python -m tests.pod.matrix` compares every system on every mesh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import pytest
from matrix import SETTINGS, file_of
from mechanisms import TRIALS
from sharded import CASES, CLOSE, CONTROL, GRADIENT, ROOT, WARNING, flat, run_apart, small

from mmjax.core import config as configs
from mmjax.core.config import KINDS
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.requests import train_requests
from mmjax.experiment import make_experiment

TASKS = [(name, task) for name, trial in TRIALS.items() for task in trial.tasks]
# By hand, not from the table that is tested: which axis of the mesh cuts what.
CUT_BY = {
    "embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocabulary": "tensor", "experts": "expert",
}  # fmt: skip
# Each axis that cuts parameters alone, and two at once.
LAYOUTS = ("fsdp 8", "expert 8", "tensor 8", "data 2 fsdp 2 tensor 2")
# A mesh with rows, parameters and tokens over several devices.
MIXED = MeshConfig(data=1, fsdp=2, tensor=2, sequence=2)


def sizes_of(case: str) -> dict[str, int]:
    """Return a case's axes, by its name."""
    return {axis: int(size) for axis, size in re.findall(r"(\w+) (\d)", case)}


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the results of `mechanisms.py`, and what XLA printed during each compilation."""
    return run_apart("mechanisms.py", timeout=1800)


@pytest.fixture(scope="module")
def results(ran: Any) -> dict[str, Any]:
    """Return the results by trial."""
    return ran[0]


@pytest.mark.parametrize(("trial", "task"), TASKS)
def test_as_on_one_device(results: dict[str, Any], trial: str, task: str) -> None:
    """Loss, gradient and update."""
    cases = {case: tasks[task] for case, tasks in results[trial]["cases"].items() if task in tasks}
    assert set(cases) == set(TRIALS[trial].meshes[task])
    for case, kinds in cases.items():
        is_updated = TRIALS[trial].depths.get(case) != GRADIENT
        assert set(kinds) == {"loss", "gradient", *(["state"] if is_updated else [])}
    over = {
        (case, kind): worst
        for case, kinds in cases.items()
        for kind, worst in kinds.items()
        if not worst[0] < CLOSE
    }
    assert not over, over
    assert results[trial]["moved"][task] > 1e-4, "an update that moves nothing shows nothing"


def test_every_axis_alone_and_every_task_is_there() -> None:
    names = [case for t in TRIALS.values() for cases in t.meshes.values() for case in cases]
    sizes = {case: sizes_of(case) for case in names}
    assert set(sizes) <= set(CASES)
    for axis in ("data", "fsdp", "expert", "tensor", "sequence"):
        assert {axis: 8} in sizes.values(), axis
    for trial in TRIALS.values():
        assert set(trial.meshes) == set(trial.tasks)
        for cases in trial.meshes.values():
            assert any(len(sizes[case]) > 1 for case in cases), "a mesh of several axes"


def test_updates_are_compared_along_every_axis_that_cuts_parameters() -> None:
    """And on a mesh of several axes for each model."""
    for axis in set(CUT_BY.values()):
        alone = [
            trial.depths.get(f"{axis} 8") != GRADIENT
            for trial in TRIALS.values()
            if any(f"{axis} 8" in cases for cases in trial.meshes.values())
        ]
        assert any(alone), axis
    for name, trial in TRIALS.items():
        cases = {case for cases in trial.meshes.values() for case in cases}
        mixed = [c for c in cases if len(sizes_of(c)) > 1 and trial.depths.get(c) != GRADIENT]
        assert mixed, name


@pytest.mark.parametrize("kind", ["blocks", "modalities", "objectives", "routers"])
def test_every_mechanism_that_a_config_can_name_is_there(kind: str) -> None:
    """A new file in one of these packages needs a trial."""
    used = {name for trial in TRIALS.values() for name in named(trial.block())}
    folder = ROOT / KINDS[kind].replace(".", "/")
    files = {path.stem for path in folder.glob("*.py")}
    assert len(files) > 4 and files - {"__init__", "base"} <= used


def named(block: Any) -> Iterator[str]:
    """Yield the values of all keys `name` within a block."""
    if isinstance(block, Mapping):
        if isinstance(block.get("name"), str):
            yield block["name"]
        block = list(block.values())
    if isinstance(block, list):
        for value in block:
            yield from named(value)


@pytest.mark.parametrize("trial", TRIALS)
def test_bytes_of_a_device_are_those_counted_by_hand(results: dict[str, Any], trial: str) -> None:
    specs = results[trial]["specs"]
    for case, lies in results[trial]["lies"].items():
        bytes_of = {n: lies[f".parameters['{n}']"][2] for n in specs}
        check_bytes(specs, bytes_of, sizes_of(case), case)


def check_bytes(
    specs: Mapping[str, Any], bytes_of: Mapping[str, int], sizes: Mapping[str, int], case: str
) -> None:
    """Compare one device's bytes of parameters with those counted from their logical axes."""
    counted, on_device = 0, sum(bytes_of.values())
    for shape, axes in specs.values():
        local, used = list(shape), set[str]()
        for i, logical in enumerate(axes):
            axis = CUT_BY.get(logical, "")
            if axis not in used and shape[i] % sizes.get(axis, 1) == 0:
                local[i] //= sizes.get(axis, 1)
                used.add(axis)
        counted += 8 * math.prod(local)
    assert on_device == counted, case
    whole = 8 * sum(math.prod(shape) for shape, _ in specs.values())
    # Along fsdp nearly all is cut; along tensor the layers are, but neither stems nor classifiers.
    most = 0.6 if sizes.get("fsdp", 1) > 1 else 0.9
    divides = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    count = sizes.get("expert", 1)
    divided = [
        n % count == 0
        for shape, axes in specs.values()
        for axis, n in zip(axes, shape, strict=True)
        if axis == "experts"
    ]
    parts = count if any(divided) else 1
    if divides > 1:
        assert on_device < most * whole, case
    else:
        assert on_device < whole if parts > 1 else on_device == whole, case


@pytest.mark.parametrize("trial", TRIALS)
def test_optimizer_state_lies_like_its_parameters(results: dict[str, Any], trial: str) -> None:
    for case, lies in results[trial]["lies"].items():
        local_of = {name: (shape, local) for name, (shape, local, _) in lies.items()}
        assert check_optimizer(local_of, case) >= len(results[trial]["specs"])


def check_optimizer(local_of: Mapping[str, Any], case: str) -> int:
    """Compare the layout of optimizer state with that of its parameters; return how many leaves were compared."""
    compared = 0
    for name, (shape, local) in local_of.items():
        match = re.match(r"\.optimizer\['(.*?)'\]", name)
        if match and shape == local_of[f".parameters['{match[1]}']"][0]:
            assert local == local_of[f".parameters['{match[1]}']"][1], (case, name)
            compared += 1
    return compared


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("system", SETTINGS)
def test_each_system_lies_as_counted_and_traces_on_a_mesh(system: str) -> None:
    """Without a compilation: some meshes for the layout, and one mesh for a task of each objective."""
    experiment = make_experiment(small(configs.read_file(str(ROOT / file_of(system)))))
    specs = {n: [s.shape, s.axes] for n, s in experiment.declaration.specs.items()}
    for case in LAYOUTS:
        leaves = flat(experiment.abstract_state(make_mesh(MeshConfig(**CASES[case]))))
        local = {
            n: (list(x.shape), list(x.sharding.shard_shape(x.shape))) for n, x in leaves.items()
        }
        bytes_of = {n: 8 * math.prod(local[f".parameters['{n}']"][1]) for n in specs}
        check_bytes(specs, bytes_of, sizes_of(case), case)
        assert check_optimizer(local, case) >= len(specs)
    mesh = make_mesh(MIXED)
    requests = train_requests(experiment, mesh)
    first = {t.config.objective["name"]: n for n, t in reversed(experiment.tasks.items())}
    with jax.set_mesh(mesh):
        for name in first.values():
            jax.jit(requests[name].function).trace(*requests[name].arguments)


def test_nothing_is_made_whole_against_our_will(ran: Any) -> None:
    """XLA warns where it finds no way from one sharding to another but through the whole array."""
    said = {case for case, text in ran[1].items() if WARNING in text}
    assert said == {CONTROL}, {case: ran[1][case][:1000] for case in said}
    for name, trial in TRIALS.items():
        programs = {f"{name} / {c} / {t}" for t, cases in trial.meshes.items() for c in cases}
        assert programs <= set(ran[1])

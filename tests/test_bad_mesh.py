"""Check what a mesh or a batch that does not fit gets: a line that states what to change, before anything compiles."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import toyrun
from mains import refused, run

from mmjax import evaluate, train
from mmjax.engine import compile as compilation

TOY = (f"--extra={toyrun.EXTRA}", f"--config={toyrun.CONFIG}")


def trained(folder: Path, *overrides: str) -> str:
    """Return the message of a training that is refused, and compiles no program of a task."""
    words = [f"--config.{each}" for each in overrides]
    with mock.patch.object(compilation, "_compile", side_effect=AssertionError("it compiled")):
        return refused(train.main, *TOY, f"--workdir={folder / 'run'}", *words)


MULTIPLE = (
    "does not divide over the 8 parts of the mesh axes data, fsdp, expert. Choose a multiple of 8."
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mesh.data=3"], "does not make up the 8 devices here. Set --config.mesh.AXIS"),
        (["mesh.data=-1", "mesh.tensor=3"], "does not make up the 8 devices here"),
        (["mesh.data=16"], "does not make up the 8 devices here"),
        (["mesh.tensor=-1"], "sizes are positive, at most one is -1"),
        (["mesh.tensor=0"], "sizes are positive, at most one is -1"),
        (["mesh.slices=3"], "mesh.slices is 3; it must divide the 8 devices here"),
        (["mesh.slices=-2"], "mesh.slices is -2; it must be at least 0"),
        (["mesh.slices=2", "mesh.data=1", "mesh.fsdp=8"], "Set --config.mesh.data to a multiple of 2, or"),
        (["mesh.dcn_axis=slices"], "mesh.dcn_axis: no axis 'slices'. Known: data, expert, fsdp, sequence, tensor."),
        (["mesh.rules.embed=['fspd']"], "mesh.rules.embed: no axis 'fspd'. Did you mean 'fsdp'?"),
        (["mesh.rules.embd=['fsdp']"], "mesh.rules: no logical axis 'embd'. Did you mean 'embed'?"),
        (["mesh.rules.embed=fsdp"], "'config.mesh.rules.embed' is 'fsdp'; expected a list, each str."),
        (["mesh.sequense=2"], "Did you mean 'sequence'?"),
        (["tasks.one.batch=12"], f"tasks.one: batch 12 {MULTIPLE}"),
        (["tasks.one.batch=16", "tasks.one.microbatches=4"], f"tasks.one in 4 microbatches: batch 4 {MULTIPLE}"),
        (["tasks.one.batch=24", "tasks.one.microbatches=2"], f"tasks.one in 2 microbatches: batch 12 {MULTIPLE}"),
        (["evaluation.batch=20"], f"evaluation.batch (of tasks.one): batch 20 {MULTIPLE}"),
        (["mesh.rules.batch=['data','tensor']", "mesh.data=2", "mesh.tensor=4", "tasks.two.batch=12"],
         "tasks.two: batch 12 does not divide over the 8 parts of the mesh axes data, tensor."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_before_anything_compiles(tmp_path: Path, overrides: list[str], words: str) -> None:
    message = trained(tmp_path, *overrides)
    assert words in message and "\n" not in message


def test_evaluation_of_a_run_on_other_devices(tmp_path: Path) -> None:
    toyrun.run(tmp_path, "steps=2", "evaluation.batch=2", "evaluation.every=0", devices=1)
    # In training on one device any batch divides; here there are eight.
    message = refused(evaluate.main, f"--extra={toyrun.EXTRA}", f"--workdir={tmp_path}")
    assert f"batch 2 {MULTIPLE}" in message


def test_what_stays_whole_is_said_once_at_the_start(tmp_path: Path) -> None:
    words = ["steps=2", "mesh.data=2", "mesh.tensor=4", "model.width=10", "checkpoint.every=0"]
    words += [f"tasks.{task}.evaluators={{}}" for task in ("one", "two")]
    done = run(train.main, *TOY, f"--workdir={tmp_path / 'run'}", *(f"--config.{w}" for w in words))
    assert done.status == 0, done.err
    at = done.out.index("These stay whole on a mesh axis, whose size does not divide theirs:")
    assert done.out.count("stay whole") == 1
    (line,) = (x for x in done.out[at:].splitlines() if "over tensor 4" in x)
    assert line.strip() == (
        "mlp 10 over tensor 4: trunk/layers/000/inner/bias, trunk/layers/001/inner/bias and 2 more"
    )


def test_nothing_is_said_where_all_is_divided(tmp_path: Path) -> None:
    words = ["steps=1", "mesh.data=2", "mesh.tensor=4", "checkpoint.every=0"]
    words += [f"tasks.{task}.evaluators={{}}" for task in ("one", "two")]
    done = run(train.main, *TOY, f"--workdir={tmp_path / 'run'}", *(f"--config.{w}" for w in words))
    assert done.status == 0 and "stay whole" not in done.out

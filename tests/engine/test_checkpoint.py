"""Checkpoints: what is written, read, kept, refused and set aside."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.core import migrations
from mmjax.core.config import Difference
from mmjax.core.errors import UserError
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine import checkpoint
from mmjax.engine.checkpoint import CheckpointConfig, Checkpoints, Restored
from mmjax.engine.integrity import Damaged
from mmjax.engine.state import Clock
from mmjax.monitor import metrics
from mmjax.schedule.phase_specs import from_config

CONFIG = {"steps": 40, "tasks": {"one": {"objective": {}, "inputs": {}}}}
Tree = dict[str, Any]


def meta(step: int) -> Tree:
    """Return meta data of a run of one task."""
    count = {"one": 0}
    clock = Clock(step, from_config("shares", {"one": 1}, 0), {"one": 8 * step}, count, count)
    return {"clock": clock.to_json(), "config": CONFIG, "identities": {}, "environment": {}}


def state(value: float = 0.0) -> Tree:
    return {
        "parameters": {"a/kernel": jnp.arange(12.0).reshape(3, 4) + value, "b": jnp.float32(value)},
        "optimizer": {
            "a/kernel": {"mu": jnp.full((3, 4), jnp.float32(value)), "count": jnp.int32(7)}
        },
        "buffers": {},
    }


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def save(workdir: Path, *steps: int, keep: int = 9, tree: Callable[[float], Tree] = state) -> None:
    with Checkpoints(epath.Path(workdir), CheckpointConfig(keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(float(step)), meta(step))
            checkpoints.wait()


def equal(one: Any, two: Any) -> bool:
    same = jax.tree.map(
        lambda a, b: np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b), one, two
    )
    return all(jax.tree.leaves(same))


def restore(workdir: Path, wanted: Any = None, **more: Any) -> Restored | None:
    chosen: dict[str, Any] = {
        "accept": lambda step, meta: (),
        "log": lambda text: None,
        "may_be_new": lambda name, meta: False,
    }
    return checkpoint.restore_latest(
        epath.Path(workdir), abstract(state()) if wanted is None else wanted, **{**chosen, **more}
    )


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    restored = restore(tmp_path)
    assert restored is not None and restored.step == 5
    assert equal(restored.state, state(5)) and restored.state["buffers"] == {}
    versions = {"format": checkpoint.FORMAT, migrations.KEY: migrations.VERSION}
    assert restored.meta == {**meta(5), "step": 5, **versions}


def test_arrays_that_were_read_can_be_taken_once(tmp_path: Path) -> None:
    save(tmp_path, 5)
    restored = restore(tmp_path)
    assert restored is not None
    assert equal(restored.take(), state(5)) and restored.state is None
    with pytest.raises(RuntimeError, match="checkpoint 5 were taken before"):
        restored.take()


def test_how_the_config_differs_comes_with_the_checkpoint_that_was_read(tmp_path: Path) -> None:
    """Not how it differs from one that was passed over because its arrays are damaged."""
    save(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "state")

    def accept(step: int, meta: dict[str, Any]) -> list[Difference]:
        return [Difference("steps", "free", step, 9)]

    restored = restore(tmp_path, accept=accept)
    assert restored is not None and restored.differences == (Difference("steps", "free", 2, 9),)


def test_arrays_are_written_as_they_are(tmp_path: Path) -> None:
    """Not made smaller, which for numbers that were trained takes long and gains little."""
    size = 2**20
    save(tmp_path, 5, tree=lambda value: {"parameters": {"a": jnp.zeros(size, jnp.uint8)}})
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) >= size


def test_the_newest_is_restored_and_the_oldest_go(tmp_path: Path) -> None:
    """By number, not by name: 12 is newer than 9."""
    save(tmp_path, 1, 9, 12, keep=2)
    assert checkpoint.steps(epath.Path(tmp_path)) == [12, 9]
    restored = restore(tmp_path)
    assert restored is not None and restored.step == 12 and equal(restored.state, state(12))


# --- what stays --------------------------------------------------------------------------------


def kept(workdir: Path, config: CheckpointConfig, steps: int, **more: Any) -> list[int]:
    """Return what is left after saves at steps 1 to `steps`; `values` and `well` by step, `seconds` between saves."""
    values, well = more.get("values", {}), more.get("well", {})

    def is_healthy(meta: dict[str, Any]) -> bool:
        return bool(well.get(meta["clock"]["step"], True))

    with Checkpoints(epath.Path(workdir), config, is_healthy) as checkpoints:
        for step in range(1, steps + 1):
            checkpoints.save(step, state(float(step)), meta(step))
            checkpoints.wait()
            if step in values:
                record = {"task": "one", "name": "loss", "split": "toy", "value": values[step]}
                checkpoints.evaluated(step, [{**record, "name": "other"}, record])
            time.sleep(more.get("seconds", 0.0))
    return sorted(checkpoint.steps(epath.Path(workdir)))


VALUES = {2: 5.0, 3: 9.0, 4: 1.0, 5: 9.0, 6: float("nan"), 7: 2.0}
RETENTION: dict[str, tuple[CheckpointConfig, dict[str, Any], list[int]]] = {
    "the last": (CheckpointConfig(keep=2), {}, [7, 8]),
    "every third": (CheckpointConfig(keep=1, keep_every=3), {}, [3, 6, 8]),
    "the highest, the later of two": (
        CheckpointConfig(keep=1, best="one/loss"),
        {"values": VALUES},
        [5, 8],
    ),
    "the two lowest": (
        CheckpointConfig(keep=1, best="one/loss/toy", best_is="lowest", keep_best=2),
        {"values": VALUES},
        [4, 7, 8],
    ),
    "the newest good one": (
        CheckpointConfig(keep=2),
        {"well": {s: s <= 3 for s in range(1, 9)}},
        [3, 7, 8],
    ),
    "all of it": (
        CheckpointConfig(keep=1, keep_every=4, best="one/loss"),
        {"values": VALUES, "well": {s: s != 8 for s in range(1, 9)}},
        [4, 5, 7, 8],
    ),
}


@pytest.mark.parametrize("what", RETENTION)
def test_what_stays(tmp_path: Path, what: str) -> None:
    config, more, left = RETENTION[what]
    assert kept(tmp_path, config, 8, **more) == left


def test_one_of_each_stretch_of_time_stays(tmp_path: Path) -> None:
    """A second and a half each, by the clock on the wall; saves lie half a second apart at least."""
    left = kept(tmp_path, CheckpointConfig(keep=1, keep_minutes=1.5 / 60), 6, seconds=0.5)
    assert left[0] == 1 and left[-1] == 6
    assert len(left) >= 3
    # The control: without it, only the last stays.
    assert kept(tmp_path / "other", CheckpointConfig(keep=1), 3, seconds=0.0) == [3]


def test_a_measure_that_is_not_there_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no measure 'one/los'.*Did you mean 'one/loss/toy'"):
        kept(tmp_path, CheckpointConfig(best="one/los"), 2, values=VALUES)
    with pytest.raises(UserError, match="best_is is 'biggest'"):
        kept(tmp_path, CheckpointConfig(best_is="biggest"), 1)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert restore(tmp_path) is None and checkpoint.steps(epath.Path(tmp_path)) == []
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    assert restore(tmp_path) is None


def test_a_step_that_is_saved_already_is_left_as_it_is(tmp_path: Path) -> None:
    with Checkpoints(epath.Path(tmp_path), CheckpointConfig()) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(4, state(value), meta(4))
            checkpoints.wait()
    restored = restore(tmp_path)
    assert restored is not None and equal(restored.state, state(1.0))


@pytest.mark.parametrize("level", [logging.WARNING, logging.CRITICAL])
def test_orbax_warns_no_person_of_a_slow_disk(tmp_path: Path, level: int) -> None:
    logger = logging.getLogger("absl")
    before = logger.level
    try:
        logger.setLevel(level)
        with Checkpoints(epath.Path(tmp_path), CheckpointConfig()):
            assert logger.level == max(level, logging.ERROR)
        assert logger.level == level
    finally:
        logger.setLevel(before)


def test_later_steps_do_not_reach_into_a_save_under_way(tmp_path: Path) -> None:
    """The step after a save donates its state, whose memory is then written over."""
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    draws = np.random.default_rng(0)
    values = {f"p{i}": draws.normal(size=(512, 512)).astype(np.float32) for i in range(16)}
    current = bump({"parameters": jax.tree.map(jnp.asarray, values)})
    overtook = False
    with Checkpoints(epath.Path(tmp_path), CheckpointConfig(keep=9)) as checkpoints:
        expected = {}
        for step in range(1, 6):
            expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), current)
            checkpoints.save(step, current, meta(step))
            current = jax.block_until_ready(bump(current))
            overtook = overtook or step not in checkpoint.steps(epath.Path(tmp_path))
            checkpoints.wait()
    assert overtook  # else no save was under way, and the test shows nothing
    for step, tree in expected.items():
        assert equal(checkpoint.read_state(epath.Path(tmp_path), step, abstract(tree)), tree)


def test_a_save_that_fails_in_the_background_is_an_error_and_the_last_good_one_stays(
    tmp_path: Path,
) -> None:
    """No file may grow past 100 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"parameters": {"p": jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)))}}
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="os_error_code"):  # noqa: SIM117
        with Checkpoints(epath.Path(tmp_path), CheckpointConfig(keep=1)) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            try:
                checkpoints.save(2, large, meta(2))
                checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    restored = restore(tmp_path)
    assert restored is not None and restored.step == 1 and equal(restored.state, state(1.0))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_any_mesh_reads_what_any_mesh_wrote(tmp_path: Path, sizes: dict[str, int]) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    array = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    spec = PartitionSpec("data", tuple(a for a in ("fsdp", "tensor") if a in sizes) or None)
    written = jax.device_put(array, NamedSharding(mesh, spec))
    assert not written.sharding.is_fully_replicated
    save(tmp_path, 1, tree=lambda _: {"parameters": {"w": written}})
    other = NamedSharding(
        make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4]), PartitionSpec(None, "fsdp")
    )
    wanted = {"parameters": {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=other)}}
    restored = restore(tmp_path, wanted)
    assert restored is not None
    read = restored.state["parameters"]["w"]
    assert read.sharding == other and np.array_equal(read, array)


def test_parts_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    save(tmp_path, 2)
    wanted = {"parameters": {"b": jax.ShapeDtypeStruct((), np.float32)}}
    found = checkpoint.read_state(epath.Path(tmp_path), 2, wanted)
    assert found.keys() == {"parameters"} and found["parameters"].keys() == {"b"}
    assert found["parameters"]["b"] == 2.0


def test_a_parameter_may_be_new_where_the_run_says_so(tmp_path: Path) -> None:
    save(tmp_path, 2)
    wanted = abstract(state())
    wanted["parameters"]["new"] = jax.ShapeDtypeStruct((5,), np.float32)
    with pytest.raises(UserError, match=r"parameters/new: expected float32\[5\], found nothing"):
        restore(tmp_path, wanted)
    restored = restore(tmp_path, wanted, may_be_new=lambda name, meta: name == "new")
    assert restored is not None and equal(restored.state, state(2))


def test_shapes_and_dtypes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    wanted = abstract(state())
    wanted["parameters"]["a/kernel"] = jax.ShapeDtypeStruct((4, 3), np.float32)
    wanted["parameters"]["b"] = jax.ShapeDtypeStruct((), jnp.bfloat16)
    wanted["optimizer"]["a/kernel"]["mu"] = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(UserError) as error:
        restore(tmp_path, wanted)
    assert str(error.value).splitlines()[1:4] == [
        "  parameters/a/kernel: expected float32[4, 3], found float32[3, 4]",
        "  parameters/b: expected bfloat16[], found float32[]",
        "  optimizer/a/kernel/mu: expected float32[3], found float32[3, 4]",
    ]
    assert str(tmp_path / "checkpoints" / "2") in str(error.value)
    # It is whole, so it stays where it is.
    assert checkpoint.steps(epath.Path(tmp_path)) == [2] and not (tmp_path / "torn").exists()


def test_a_long_list_is_cut_and_says_by_how_much() -> None:
    expected = {
        "parameters": {f"p{i:02d}": jax.ShapeDtypeStruct((i,), np.float32) for i in range(11)}
    }
    with pytest.raises(UserError, match="and 3 more"):
        checkpoint.check_shapes({}, expected, "here")


def test_a_refusal_leaves_a_good_checkpoint_alone(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)

    def refuse(step: int, meta: dict[str, Any]) -> None:
        assert (step, meta["clock"]["step"]) == (4, 4)
        raise UserError("another run's")

    with pytest.raises(UserError, match="another run's"):
        restore(tmp_path, accept=refuse)
    assert checkpoint.steps(epath.Path(tmp_path)) == [4, 2]


def test_a_torn_one_is_set_aside_aloud(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "state")
    said: list[str] = []
    restored = restore(tmp_path, log=said.append)
    assert restored is not None and restored.step == 2
    assert len(said) == 1 and said[0].startswith("Checkpoint 4 is damaged (")
    assert str(tmp_path / "torn" / "4") in said[0]
    assert (tmp_path / "torn" / "4" / "meta" / "metadata").exists()
    assert checkpoint.steps(epath.Path(tmp_path)) == [2]


def test_the_newest_is_the_first_that_its_reader_accepts_and_nothing_is_moved(
    tmp_path: Path,
) -> None:
    save(tmp_path, 2, 9, 10)
    shutil.rmtree(tmp_path / "checkpoints" / "10" / "state")
    tried: list[int] = []

    def readable(step: int) -> str | None:
        tried.append(step)
        return None if step == 10 else f"step {step}"

    folder = epath.Path(tmp_path)
    assert checkpoint.newest(folder, readable) == "step 9" and tried == [10, 9]
    assert checkpoint.newest(folder, readable, [10, 2]) == "step 2"
    assert checkpoint.newest(folder, lambda step: None) is None
    assert checkpoint.newest(folder, lambda step: 0 if step == 9 else None) == 0  # a step may be 0
    assert checkpoint.newest(folder / "empty", readable) is None
    assert checkpoint.steps(folder) == [10, 9, 2] and not (tmp_path / "torn").exists()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": checkpoint.FORMAT + 1}))
    with pytest.raises(UserError, match=f"format {checkpoint.FORMAT + 1}.*reads up to"):
        checkpoint.read_meta(epath.Path(tmp_path), 2)


def test_missing_meta_data_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").unlink()
    with pytest.raises(Damaged, match="2' is damaged: .*No such file.*meta/metadata"):
        checkpoint.read_meta(epath.Path(tmp_path), 2)


def test_nothing_in_a_checkpoint_is_code(tmp_path: Path) -> None:
    """No pickle, under any name: its streams begin with byte 0x80 and a protocol number."""
    save(tmp_path, 2)
    files = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()]
    assert len(files) >= 5
    for path in files:
        content = path.read_bytes()
        assert not (content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05"), path
    assert (
        json.loads((tmp_path / "checkpoints" / "2" / "meta" / "metadata").read_text())["config"]
        == CONFIG
    )


def test_the_best_of_a_whole_run_stays(tmp_path: Path) -> None:
    """By a measure of its evaluations; the highest loss is an early one, which would be gone long since."""
    words = ("checkpoint.every=2", "checkpoint.keep=1", "evaluation.every=2", "limits.divergence=0")
    best = "checkpoint.best='one/held-out loss'"
    toyrun.run(tmp_path / "with", *words, best)
    toyrun.run(tmp_path / "without", *words)
    lines = metrics.read(epath.Path(tmp_path / "with"))
    values = {x["step"]: x["value"] for x in lines if x["kind"] == "eval" and x["task"] == "one"}
    highest = max(values, key=lambda step: values[step])
    assert highest < 10
    assert set(checkpoint.steps(epath.Path(tmp_path / "with"))) == {highest, 12}
    assert checkpoint.steps(epath.Path(tmp_path / "without")) == [12]

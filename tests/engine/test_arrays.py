"""Arrays with checksums: what is read is what was written, or an error; by any mesh, and by Orbax alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine import arrays
from mmjax.engine.integrity import Mismatch, is_damage, seal

STEP = 5
TREE: dict[str, Any] = {
    "parameters": {"a/kernel": np.arange(2100, dtype=np.float32).reshape(30, 70), "b": np.float32(3)},
    "optimizer": {"a/kernel": {"mu": np.linspace(0, 1, 9).astype(jnp.bfloat16), "count": np.int32(7)}},
    "buffers": {"mask": np.arange(5) % 2 == 0},
}  # fmt: skip


def write(folder: Path, tree: Any, step: int = STEP) -> epath.Path:
    with ocp.AsyncCheckpointer(arrays.TreeHandler()) as checkpointer:
        checkpointer.save(folder, args=arrays.TreeSave(jax.tree.map(jnp.asarray, tree), step=step))
    return epath.Path(folder)


def read(folder: epath.Path, wanted: Any = None) -> Any:
    index = arrays.index(folder, STEP)
    return arrays.read(folder, index, arrays.shapes(index) if wanted is None else wanted)


def same(one: Any, other: Any) -> bool:
    flat, others = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (one, other))
    return [path for path, _ in flat] == [path for path, _ in others] and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for (_, a), (_, b) in zip(flat, others, strict=True)
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    return write(tmp_path_factory.mktemp("arrays") / "state", TREE)


def test_what_is_written_is_read(folder: epath.Path) -> None:
    assert same(read(folder), TREE)
    part = {"optimizer": arrays.shapes(arrays.index(folder, STEP))["optimizer"]}
    assert same(read(folder, part), {"optimizer": TREE["optimizer"]})


def test_orbax_reads_it_too(folder: epath.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        assert same(checkpointer.restore(folder), TREE)


def test_every_bit_of_every_file_is_that_of_the_array_or_found(
    folder: epath.Path, tmp_path: Path
) -> None:
    """One bit of every 29th byte: `tests/pod/faults.py` does it at random, in whole runs."""
    files = [Path(p) for p in sorted(Path(folder).rglob("*")) if Path(p).is_file()]
    found, bits = 0, itertools.cycle(range(8))
    for path in files:
        content = path.read_bytes()
        try:
            for at in range(0, len(content), 29):
                path.write_bytes(
                    content[:at] + bytes([content[at] ^ 1 << next(bits)]) + content[at + 1 :]
                )
                try:
                    assert same(read(folder), TREE), (path, at)
                except ValueError as error:
                    assert is_damage(error), (path, at, error)
                    found += 1
        finally:
            path.write_bytes(content)
    (data,) = (p for p in files if p.stat().st_size > 8400 and p.parent.name == "d")
    assert found > data.stat().st_size // 29


def test_a_list_of_another_step_is_a_mismatch(folder: epath.Path) -> None:
    with pytest.raises(Mismatch, match="those of step 5"):
        arrays.index(folder, 6)


def test_parts_that_are_missing_from_the_list_are_a_mismatch(tmp_path: Path) -> None:
    folder = write(tmp_path / "state", {"x": np.arange(4.0, dtype=np.float32)})
    path = folder / arrays.CHECKSUMS
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    content["arrays"][0]["parts"] = []
    path.write_text(json.dumps(seal(content)))
    with pytest.raises(Mismatch, match="parts of x are missing"):
        read(folder)


MESHES: Mapping[str, tuple[dict[str, int], PartitionSpec]] = {
    "whole": ({"data": 8}, PartitionSpec()),
    "rows": ({"data": 8}, PartitionSpec("data")),
    "columns": ({"data": 1, "fsdp": 4, "tensor": 2}, PartitionSpec(None, ("fsdp", "tensor"))),
    "both": ({"data": 2, "fsdp": 2, "tensor": 2}, PartitionSpec("tensor", "fsdp")),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.product(MESHES, MESHES)))
def test_any_mesh_reads_and_verifies_what_any_mesh_wrote(
    tmp_path: Path, one: str, other: str
) -> None:
    array = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    shardings = {
        name: NamedSharding(make_mesh(MeshConfig(**sizes)), spec)
        for name, (sizes, spec) in MESHES.items()
    }
    folder = write(tmp_path / "state", {"x": jax.device_put(array, shardings[one])})
    wanted = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[other])}
    read_back = read(folder, wanted)["x"]
    assert read_back.sharding == shardings[other] and np.array_equal(read_back, array)
    content = json.loads((folder / arrays.CHECKSUMS).read_text())
    # Each part is stored once, and together they are the array; copies are written in parts, too.
    assert (
        sum((a[1] - a[0]) * (b[1] - b[0]) for (a, b), _ in content["arrays"][0]["parts"])
        == array.size
    )
    part = content["arrays"][0]["parts"][-1]
    part[1] = "0" * 64
    del content["sha256"]
    (folder / arrays.CHECKSUMS).write_text(json.dumps(seal(content)))
    with pytest.raises(Mismatch, match="the bytes of x do not match"):
        read(folder, wanted)


def test_a_part_that_is_not_needed_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process reads the parts that its own devices meet, each whole."""
    mesh = make_mesh(MeshConfig(data=8))
    array = jax.device_put(
        np.arange(64.0, dtype=np.float32), NamedSharding(mesh, PartitionSpec("data"))
    )
    folder = write(tmp_path / "state", {"x": array})
    stored = arrays.index(folder, STEP)[("x",)]
    assert sorted(stored.parts) == [((8 * i, 8 * i + 8),) for i in range(8)]
    seen: list[arrays.Box] = []
    original = arrays._read_part
    monkeypatch.setattr(
        arrays, "_read_part", lambda s, part, a: (seen.append(part), original(s, part, a))
    )
    store = arrays._open(folder, arrays.ts.Context(arrays._CONTEXT), stored)
    box = ((12, 28),)
    assert arrays._fill(store, stored, [box])[box].tolist() == list(range(12, 28))
    assert seen == [((8, 16),), ((16, 24),), ((24, 32),)]

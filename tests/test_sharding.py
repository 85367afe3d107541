"""Meshes, and the table from logical axes to mesh axes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from mmjax.errors import UserError
from mmjax.sharding import (
    AXES,
    RULES,
    MeshConfig,
    batch_sharding,
    constrain,
    make_mesh,
    named,
    partition,
    replicated,
)

_SHAPES = [(8, 1, 1, 1, 1), (2, 4, 1, 1, 1), (2, 2, 1, 2, 1), (1, 2, 2, 2, 1), (1, 1, 1, 8, 1)]


def mesh_of(*sizes: int):
    return make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1, 1, 1)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 1, 4, 1)),
        (MeshConfig(data=2, fsdp=2, sequence=2), (2, 2, 1, 1, 2)),
    ],
)
def test_a_mesh_takes_all_devices(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=16),
        MeshConfig(data=4),
        MeshConfig(fsdp=3),
        MeshConfig(fsdp=16),
        MeshConfig(fsdp=-1),
        MeshConfig(data=0),
        MeshConfig(data=-2),
    ],
)
def test_a_mesh_that_is_not_all_devices_is_refused(config):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(config)


def test_a_mesh_of_some_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).devices.shape == (1, 1, 1, 1, 1)
    with pytest.raises(UserError, match="the 2 devices here.*--config.mesh.AXIS"):
        make_mesh(MeshConfig(data=8), jax.devices()[:2])


@settings(deadline=None)
@given(
    st.sampled_from(_SHAPES),
    st.lists(
        st.tuples(st.sampled_from([None, *RULES]), st.integers(1, 48)), min_size=1, max_size=4
    ),
)
def test_a_partition_divides_and_uses_an_axis_once(sizes, dimensions):
    mesh = mesh_of(*sizes)
    axes, shape = [a for a, _ in dimensions], [n for _, n in dimensions]
    spec = partition(axes, shape, mesh)
    # JAX writes a single axis without its tuple.
    entries = [(e,) if isinstance(e, str) else e or () for e in spec]
    used = [axis for entry in entries for axis in entry]
    assert len(used) == len(set(used))
    for name, size, entry in zip(axes, shape, entries, strict=True):
        assert size % math.prod(mesh.shape[a] for a in entry) == 0
        assert all(a in RULES[name] and mesh.shape[a] > 1 for a in entry)
    # JAX itself refuses a shape that does not divide.
    parts = math.prod(mesh.shape[a] for a in used)
    assert math.prod(named(axes, shape, mesh).shard_shape(tuple(shape))) * parts == math.prod(shape)


def test_what_divides_is_divided():
    mesh = mesh_of(2, 2, 1, 2, 1)
    assert partition(("embed", "mlp"), (8, 6), mesh) == PartitionSpec(("fsdp",), ("tensor",))
    assert partition(("embed", "mlp"), (7, 6), mesh) == PartitionSpec(None, ("tensor",))
    assert partition(("batch", None), (8, 6), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert partition(("batch",), (2,), mesh) == PartitionSpec(("data",))
    assert partition(("vocabulary", "mlp"), (8, 8), mesh) == PartitionSpec(("tensor",), None)


def test_a_logical_axis_without_a_rule_is_our_mistake():
    with pytest.raises(ValueError, match="'embd' has no rule"):
        partition(("embd",), (8,), mesh_of(8))


def test_a_batch_lies_over_all_batch_axes():
    mesh = mesh_of(2, 2, 2, 1, 1)
    indices = batch_sharding(mesh, 16, "tasks.a").devices_indices_map((16,))
    rows = sorted((i[0].start, i[0].stop) for i in indices.values())
    assert rows == [(n, n + 2) for n in range(0, 16, 2)]


@pytest.mark.parametrize("rows", [1, 4, 12, 20])
def test_a_batch_that_does_not_divide_says_what_does(rows):
    with pytest.raises(UserError, match=f"tasks.a: batch {rows} .* 8 parts .*multiple of 8"):
        batch_sharding(mesh_of(8), rows, "tasks.a")


def test_hints_are_nothing_outside_a_mesh_and_lie_so_inside():
    x = jnp.arange(16.0).reshape(8, 2)
    np.testing.assert_array_equal(constrain(x, ("batch", None)), x)
    with jax.set_mesh(mesh_of(8)):
        y = jax.jit(lambda x: constrain(x, ("batch", None)) * 1)(x)
    assert y.sharding.spec == PartitionSpec(("data",)) and len(y.addressable_shards) == 8
    np.testing.assert_array_equal(y, x)


def test_replicated_is_whole_everywhere():
    x = jax.device_put(np.arange(3), replicated(mesh_of(8)))
    assert all(shard.data.shape == (3,) for shard in x.addressable_shards)

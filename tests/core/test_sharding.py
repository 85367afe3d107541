"""Meshes, and the table from logical axes to mesh axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import mesh_utils
from jax.sharding import AxisType, PartitionSpec

from mmjax.core.errors import UserError
from mmjax.core.sharding import (
    AXES,
    RULES,
    MeshConfig,
    ReplicatedDim,
    batch_sharding,
    constrain,
    describe_replicated,
    device_grid,
    make_mesh,
    named,
    partition,
    record_replicated,
    replicated,
    replicated_dims,
    rules_of,
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
    "sizes",
    [
        {"data": 3},
        {"data": 16},
        {"data": 4},
        {"fsdp": 3},
        {"fsdp": 16},
        {"fsdp": -1},
        {"data": 0},
        {"data": -2},
    ],
)
def test_a_mesh_that_is_not_all_devices_is_refused(sizes):
    with pytest.raises(UserError, match=r"(?i)mesh"):
        make_mesh(MeshConfig(**sizes))


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


# --- rules of a config -------------------------------------------------------------------------


def test_a_config_has_rules_in_place_of_the_table_s():
    rules = {"embed": ("fsdp", "data"), "mlp": (), "batch": ("data",)}
    own = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, rules=rules))
    assert rules_of(own) == {**RULES, **rules} and rules_of(mesh_of(2, 2, 1, 2, 1)) == RULES
    assert partition(("embed", "mlp"), (8, 8), own) == PartitionSpec(("fsdp", "data"), None)
    assert partition(("heads",), (8,), own) == PartitionSpec(("tensor",))
    assert batch_sharding(own, 2, "").shard_shape((2,)) == (1,)
    with pytest.raises(
        UserError, match="the 2 parts of the mesh axes data. Choose a multiple of 2"
    ):
        batch_sharding(own, 3, "")


def test_rules_go_with_the_mesh_into_traces():
    x = jnp.arange(64.0).reshape(8, 8)
    made = {}
    for name, rules in (("own", {"embed": ("tensor",)}), ("table's", {})):
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, rules=rules))
        with jax.set_mesh(mesh):
            made[name] = jax.jit(lambda x: constrain(x, ("embed", None)) * 1)(x)
        np.testing.assert_array_equal(made[name], x)
    assert made["own"].sharding.spec == PartitionSpec(("tensor",))
    assert made["table's"].sharding.spec == PartitionSpec(("fsdp",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": {"embd": ("fsdp",)}}, "mesh.rules: no logical axis 'embd'. Did you mean 'embed'?"),
        ({"rules": {"embed": ("fspd",)}}, "mesh.rules.embed: no axis 'fspd'. Did you mean 'fsdp'?"),
        ({"rules": {"embed": ("fsdp", "fsdp")}}, "mesh.rules.embed names an axis twice: fsdp, fsdp"),
        ({"dcn_axis": "dta"}, "mesh.dcn_axis: no axis 'dta'. Did you mean 'data'?"),
    ],
)  # fmt: skip
def test_rules_of_what_there_is_not(settings, message):
    with pytest.raises(UserError) as error:
        MeshConfig(**settings)
    assert message in str(error.value)


# --- slices ------------------------------------------------------------------------------------


def of_slices(*sizes: int, **settings):
    """Return the ids of the devices in the mesh; of two simulated slices, 0 to 3 and 4 to 7."""
    mesh = make_mesh(MeshConfig(*sizes, slices=2, **settings))
    return np.vectorize(lambda d: d.id)(mesh.devices)


@given(st.sampled_from([(2, 4, 1, 1, 1), (4, 1, 1, 2, 1), (2, 2, 1, 2, 1), (2, 1, 1, 1, 4)]),
       st.sampled_from(AXES))  # fmt: skip
@settings(deadline=None)
def test_only_the_axis_across_goes_from_slice_to_slice(sizes, across):
    axis = AXES.index(across)
    if sizes[axis] % 2:
        with pytest.raises(UserError, match=f"mesh.{across} is 1, which 2 slices do not divide"):
            of_slices(*sizes, dcn_axis=across)
        return
    ids = of_slices(*sizes, dcn_axis=across)
    assert sorted(ids.flat) == list(range(8))
    slices = np.moveaxis(ids, axis, 0) // 4
    for index in range(sizes[axis]):
        assert set(slices[index].flat) == {index // (sizes[axis] // 2)}


@dataclass(frozen=True)
class Tpu:
    """The attributes of a TPU device."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def tpus(slices: int) -> list[Tpu]:
    """Return slices of 4 x 4, their chips in an order that is no one's."""
    made = [Tpu(16 * s + n, (n % 4, n // 4, 0), s) for s in range(slices) for n in range(16)]
    return [made[i] for i in np.random.default_rng(1).permutation(len(made))]


def test_tpus_say_their_slices_and_neighbours():
    grid = device_grid((2, 16, 1, 1, 1), MeshConfig(), tpus(2))
    assert [{d.slice_index for d in part.flat} for part in grid] == [{0}, {1}]
    # Within a slice, a ring over the chips' own links, as JAX lays it.
    ordered = sorted((d for d in tpus(2) if d.slice_index == 1), key=lambda d: d.id)
    expected = mesh_utils.create_device_mesh(
        (1, 4, 1, 4, 1), ordered, allow_split_physical_axes=True
    )
    grid = device_grid((2, 4, 1, 4, 1), MeshConfig(), tpus(2))
    for row in (grid[1, :, 0, :, 0], expected[0, :, 0, :, 0]):
        for line in (*row, *row.T):
            changed = np.ptp([d.coords for d in line], axis=0) > 0
            assert sum(changed) == 1, "an axis of the mesh is an axis of the torus"
    with pytest.raises(UserError, match="mesh.slices is 4; the devices here are in 2."):
        device_grid((4, 8, 1, 1, 1), MeshConfig(slices=4), tpus(2))
    with pytest.raises(UserError, match="mesh.data is 1, which 2 slices do not divide"):
        device_grid((1, 32, 1, 1, 1), MeshConfig(), tpus(2))


def test_simulated_slices_divide_the_devices():
    with pytest.raises(UserError, match="mesh.slices is 3; it must divide the 8 devices here"):
        make_mesh(MeshConfig(slices=3))


# --- what stays whole --------------------------------------------------------------------------


def test_what_stays_whole_is_told():
    mesh = mesh_of(2, 1, 1, 4, 1)
    assert replicated_dims(("heads", "embed"), (8, 7), mesh) == []
    assert replicated_dims(("heads", "mlp"), (6, 8), mesh) == [
        ReplicatedDim("tensor", 4, "heads", 6)
    ]
    found = {name: [str(x) for x in replicated_dims(("heads",), (6,), mesh)] for name in "abc"}
    assert describe_replicated({**found, "d": []}) == ["heads 6 over tensor 4: a, b and 1 more"]


def test_activations_that_stay_whole_are_noted_in_the_trace():
    def function(x):
        return constrain(x, ("batch", "tokens", None))

    with jax.set_mesh(mesh_of(2, 1, 1, 1, 4)):
        with record_replicated() as whole:
            jax.jit(function).lower(jnp.ones((4, 6, 3)))
            jax.jit(function).lower(jnp.ones((4, 8, 3)))
        assert whole == {ReplicatedDim("sequence", 4, "tokens", 6)}
        jax.jit(function).lower(jnp.ones((4, 5, 3)))
    assert len(whole) == 1, "no more is noted outside"


def test_a_run_under_rules_of_its_own_comes_to_the_same(tmp_path):
    """Also when it resumes under the table's; float32, so to rounding."""
    words = ("mesh.data=2", "mesh.fsdp=4", "steps=4", "evaluation.every=0")
    own = "mesh.rules={'embed': ['data', 'fsdp'], 'mlp': [], 'batch': ['fsdp']}"
    toyrun.run(tmp_path / "table", *words, devices=8)
    toyrun.run(tmp_path / "own", *words[:2], "steps=2", "evaluation.every=0", own, devices=8)
    toyrun.run(tmp_path / "own", *words, devices=8)
    one, other = (toyrun.parameters(tmp_path / name) for name in ("table", "own"))
    assert one.keys() == other.keys()
    for name, expected in one.items():
        np.testing.assert_allclose(other[name], expected, rtol=1e-4, atol=1e-6)

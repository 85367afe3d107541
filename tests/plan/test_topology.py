"""Names of machines: what they mean, and the errors for those that mean none."""

from __future__ import annotations

import pytest

from mmjax.core.errors import UserError
from mmjax.plan import topology
from mmjax.plan.topology import GPUS, TPUS, Topology, read_topology, require_compiler


@pytest.mark.parametrize(
    ("name", "slices", "chips"),
    [("v5e:16x16", 1, 256), ("v5e:4x4", 2, 32), ("v5p:16x16x16", 1, 4096), ("tpu7x:2x2x1", 1, 4), ("h100:4x8", 1, 32)],
)  # fmt: skip
def test_chips(name: str, slices: int, chips: int) -> None:
    made = read_topology(name, slices)
    assert (made.name, made.slices, made.chips) == (name, slices, chips)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5e:16x16", (True, True, False)), ("v6e:8x16", (False, True, False)), ("v5e:8x8", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)), ("v4:2x4x4", (False, False, False)), ("tpu7x:4x8x12", (True, True, True)),
    ],
)  # fmt: skip
def test_sides_that_close_to_a_ring(name: str, rings: tuple[bool, ...]) -> None:
    """As MaxText has them for each of these."""
    assert read_topology(name).wrap == rings


def test_every_suggestion_is_a_topology() -> None:
    names = list(topology._known())
    assert {name.split(":")[0] for name in names} == {*TPUS, *GPUS}
    for name in names:
        assert read_topology(name).name == name


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5e:16x61", 1, "the first two sides are even. Did you mean 'v5e:16x16'?"),
        ("v5litepod-256", 1, "unknown. Did you mean 'v5e:16x16'?"),
        ("v4-512", 1, "unknown. Did you mean 'v4:4x8x8'?"),
        ("v5:4x4x4", 1, "unknown. Did you mean 'v5p:4x4x4'?"),
        ("v5e:4x4x4", 1, "v5e has 2 dimensions."),
        ("v5p:4x4", 1, "v5p has 3 dimensions."),
        ("v5e:32x16", 1, "a slice of v5e has at most 256 chips; use --slices."),
        ("v5e:0x4", 1, "the first two sides are even"),
        ("v5e:4x4", 0, "0 slices; there is at least 1."),
        ("h100:4x8", 2, "GPU nodes have no slices"),
        ("h100:4x16", 1, "a node has 1 to 8 GPUs."),
        ("moon", 1, "unknown. Forms: v5e:AxB"),
    ],
)
def test_what_is_wrong_and_which_is_nearest(name: str, slices: int, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read_topology(name, slices)
    assert f"--topology={name}: " in str(raised.value)
    assert said in str(raised.value) and "Forms: " in str(raised.value)


@pytest.mark.parametrize(
    ("made", "extra"), [(Topology("v5e", (2, 2)), "tpu"), (Topology("h100", (1, 8)), "gpu-plan")]
)
def test_a_missing_compiler_names_its_extra(
    made: Topology, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    for find in (lambda _: None, missing):  # a package, and one within a package, that is not there
        monkeypatch.setattr(topology.importlib.util, "find_spec", find)
        with pytest.raises(UserError, match=rf"not installed.*pip install 'mmjax\[{extra}\]'"):
            require_compiler(made)

"""Known accelerators: found by the names that JAX gives their devices."""

from __future__ import annotations

import pytest

from mmjax.core.chips import chip, peak_flops


# FLOP/s as their makers publish them: dense, bfloat16.
@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v2", 22.5e12),  # of a core; a chip of two: 45 TFLOP/s
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("Tesla T4", 65e12),
    ],
)
def test_a_kind_has_the_peak_of_its_data_sheet(kind: str, flops: float) -> None:
    assert peak_flops(kind) == flops


def test_the_longer_name_comes_before_the_one_that_begins_it() -> None:
    """`TPU v5 lite` also begins with `TPU v5`, which is another chip."""
    lite, p = chip("TPU v5 lite"), chip("TPU v5")
    assert lite is not None and p is not None
    assert lite.kind == "tpu v5 lite" and lite.memory < 17e9 < 95e9 < p.memory


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v99", "NVIDIA H"])
def test_nothing_is_known_of_another_kind(kind: str) -> None:
    assert chip(kind) is None and peak_flops(kind) is None


def test_a_chip_with_memory_has_what_the_plan_reads_of_it() -> None:
    for kind in ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "NVIDIA B200"):
        known = chip(kind)
        assert known is not None and min(known.memory, known.bandwidth) > 0
        # Main memory is faster than a neighbour, and that faster than another slice.
        assert known.bandwidth > known.ici > known.dcn > 0

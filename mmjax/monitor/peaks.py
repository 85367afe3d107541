"""Peak FLOP/s of accelerators, as their makers publish them: dense bfloat16, per JAX device."""

from __future__ import annotations

# The first name that a device kind begins with, in lower case, counts. Sources:
# TPU: cloud.google.com/tpu/docs, the pages v2 to v6e and tpu7x, "peak compute per chip (bf16)". A device is a
#   chip from v4 on (megacore; of tpu7x, one of two chiplets), and one of two cores of a v2 or v3 chip.
# NVIDIA: the data sheets of A100, H100, H200, B200 (SXM unless the name says other) and T4 (float16), without sparsity.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("tpu v2", 22.5e12),
    ("tpu v3", 61.5e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v6 lite", 918e12),
    ("tpu v6e", 918e12),
    ("tpu7x", 1153.5e12),
    ("nvidia a100", 312e12),
    ("nvidia h100 pcie", 756e12),
    ("nvidia h100 nvl", 835e12),
    ("nvidia h100", 989e12),
    ("nvidia h200", 989e12),
    ("nvidia b200", 2250e12),
    ("tesla t4", 65e12),
)


def peak_flops(kind: str) -> float | None:
    """FLOP/s of one device of a kind (`jax.Device.device_kind`); None where it is not known, as of CPUs."""
    name = kind.lower()
    return next((peak for start, peak in _PEAKS if name.startswith(start)), None)

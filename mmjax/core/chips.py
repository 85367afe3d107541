"""Accelerators, per JAX device: what their makers publish, and what the plan assumes of their wires."""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device of a kind. Peaks are dense bfloat16, without sparsity.

    Attributes:
      kind: how `jax.Device.device_kind` begins, in lower case.
      flops: FLOP/s at peak.
      memory: bytes of main memory that a program can have; 0 where the plan does not know the kind.
      bandwidth: bytes a second between main memory and the chip.
      ici: bytes a second that a device sends to its neighbours along one mesh axis (of a TPU: a ring in
        one dimension of the torus, both ways; of a GPU: NVLink, one way).
      dcn: bytes a second that a device sends to other slices or nodes.
    """

    kind: str
    flops: float
    memory: int = 0
    bandwidth: float = 0.0
    ici: float = 0.0
    dcn: float = 0.0


# The first kind that a name begins with counts. Sources:
# FLOP/s, bandwidth: cloud.google.com/tpu/docs, the pages v2 to v6e and tpu7x ("peak compute per chip (bf16)",
#   "HBM bandwidth"). A device is a chip from v4 on (megacore; of tpu7x, one of two chiplets), and one of two cores
#   of a v2 or v3 chip.
# Memory of TPUs: what their compiler allows a program (libtpu 0.0.42 prints it when it refuses one).
# ICI: the same pages' total per chip, as links of one way: v4 50e9 x 6, v5e 50e9 x 4, v5p 100e9 x 6, v6e 112e9 x 4,
#   tpu7x 100e9 x 6 (two devices share them); 0.9 of two links is assumed for a ring, as measured rates go
#   (jax-ml.github.io/scaling-book, "TPU networking": 4.5e10 of one link of v4 and v5e, 9e10 of v5p).
# DCN: the same book: 25e9 bytes a second out of a host of v4 or v5p with 4 chips, and half of that a chip of v5e, v6e.
# NVIDIA: the data sheets of A100, H100, H200, B200 (SXM unless the name states another) and T4 (float16), without
#   sparsity; NVLink is half of the total that they state; a 400 Gb/s card for each GPU is assumed (A100: 200).
#   Memory: the sheets' less 5 GB for what is not the program's.
_CHIPS: tuple[Chip, ...] = (
    Chip("tpu v2", 22.5e12),
    Chip("tpu v3", 61.5e12),
    Chip("tpu v4", 275e12, int(30.75 * _GIB), 1228e9, 90e9, 6.25e9),
    Chip("tpu v5 lite", 197e12, int(15.75 * _GIB), 819e9, 90e9, 3.125e9),
    Chip("tpu v5e", 197e12, int(15.75 * _GIB), 819e9, 90e9, 3.125e9),
    Chip("tpu v5p", 459e12, int(95.74 * _GIB), 2765e9, 180e9, 6.25e9),
    Chip("tpu v5", 459e12, int(95.74 * _GIB), 2765e9, 180e9, 6.25e9),
    Chip("tpu v6 lite", 918e12, int(31.25 * _GIB), 1638e9, 200e9, 3.125e9),
    Chip("tpu v6e", 918e12, int(31.25 * _GIB), 1638e9, 200e9, 3.125e9),
    Chip("tpu7x", 1153.5e12, int(94.75 * _GIB), 3690e9, 90e9, 6.25e9),
    Chip("nvidia a100", 312e12, int(75e9), 2039e9, 300e9, 25e9),
    Chip("nvidia h100 pcie", 756e12),
    Chip("nvidia h100 nvl", 835e12),
    Chip("nvidia h100", 989e12, int(75e9), 3350e9, 450e9, 50e9),
    Chip("nvidia h200", 989e12, int(136e9), 4800e9, 450e9, 50e9),
    Chip("nvidia b200", 2250e12, int(175e9), 8000e9, 900e9, 50e9),
    Chip("tesla t4", 65e12),
)


def chip(kind: str) -> Chip | None:
    """Return the data of a kind of device (`jax.Device.device_kind`); None for unknown kinds, such as CPUs."""
    name = kind.lower()
    return next((c for c in _CHIPS if name.startswith(c.kind)), None)


def peak_flops(kind: str) -> float | None:
    """Return the FLOP/s of one device of a kind; None if unknown."""
    spec = chip(kind)
    return spec.flops if spec else None

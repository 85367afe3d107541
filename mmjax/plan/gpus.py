"""GPUs described for their compiler: what it would ask the driver of a card that is there.

From NVIDIA's data sheets (memory, its bandwidth, clock, multiprocessors, cache) and the CUDA C++
Programming Guide's table of compute capabilities (threads, registers, shared memory).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _Card:
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    units: int  # for float32, of a multiprocessor
    shared: int  # bytes of shared memory of a multiprocessor
    cache: int  # bytes, second level
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes a second


_CARDS = {
    "a100": _Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167936, 40 << 20, 1.41, 80 * 10**9, 2039 * 10**9),
    "h100": _Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233472, 50 << 20, 1.98, 80 * 10**9, 3350 * 10**9),
    "h200": _Card("NVIDIA H200", (9, 0), 132, 128, 233472, 50 << 20, 1.98, 141 * 10**9, 4800 * 10**9),
    "b200": _Card("NVIDIA B200", (10, 0), 148, 128, 233472, 126 << 20, 1.96, 180 * 10**9, 8000 * 10**9),
}  # fmt: skip

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin}
  shared_memory_per_core: {shared}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  l2_cache_size: {cache}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def target(kind: str) -> str:
    """Return XLA's `GpuTargetConfig` of a kind of card, as text."""
    card = _CARDS[kind]
    return _TARGET.format(
        optin=card.shared - 1024, shared=card.shared, cores=card.multiprocessors, units=card.units,
        clock=card.clock, cache=card.cache, memory=card.memory, bandwidth=card.bandwidth,
        major=card.capability[0], minor=card.capability[1], name=card.name,
    )  # fmt: skip

"""The contrastive losses, forward and backward, against those of open_clip: time, and the memory that they need.

Nothing where open_clip is not installed. The same: unit vectors (of `numpy.random.RandomState(0)`), scale and bias,
float32, gradients of both sides' vectors and of the scale. Asserted before anything is timed: both give the same loss
and the same gradients. Ours are timed whole, and by chunks (`objective.chunk`). Memory is what a process of its own
grows by, at its peak, during a second call (Linux only).

The config is not read.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._pairs import Effort, Quantity, millis, quantity, ratios, rounds

BATCHES = (256, 1024, 4096, 8192)
SIZE = 512
CHUNKS = 8  # of a batch
MEMORY_FROM = (
    1024  # rows from which on memory is measured: below, what is measured is the allocator
)
FORMS = {"softmax": (1 / 0.07, 0.0), "sigmoid": (10.0, -10.0)}  # scale and bias
OURS, CHUNKED, PEER = "ours", "ours by chunks", "open_clip"
Loss = Callable[[], Any]  # -> the value, and gradients of a, b and the scale


def measure(effort: Effort) -> list[Quantity]:
    """Return ratios to the peer's, by form and batch."""
    if find_spec("open_clip") is None:
        return []
    result = []
    for form in FORMS:
        for batch in BATCHES:
            result += _compared(form, batch, effort)
    return result


def _compared(form: str, batch: int, effort: Effort) -> list[Quantity]:
    calls = {name: make(name, form, batch) for name in (OURS, CHUNKED, PEER)}
    values = {name: call() for name, call in calls.items()}
    for name in (OURS, CHUNKED):
        for ours, theirs in zip(values[name], values[PEER], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-5)
    times = rounds(calls, effort.pairs, effort.steps)
    what = f"{form}, {batch} rows"
    result = [
        ratios(times, OURS, PEER, "below 1", f"{what}: time, {OURS} to {PEER}"),
        ratios(times, CHUNKED, PEER, "", f"{what}: time, {CHUNKED} to {PEER}"),
        *millis(times, f"{what}: "),
    ]
    if batch >= MEMORY_FROM:
        peaks = {name: memory(name, form, batch) for name in calls}
        for name in (OURS, CHUNKED):
            values_ = [peaks[name] / peaks[PEER]] * effort.pairs
            result.append(quantity(f"{what}: memory, {name} to {PEER}", values_, wanted="below 1"))
        result.append(quantity(f"{what}: memory, {PEER}", [peaks[PEER]] * effort.pairs, "MB"))
    return result


def make(name: str, form: str, batch: int) -> Loss:
    """Return a call that gives the loss and its gradients, as NumPy arrays or what they are made of."""
    rng = np.random.RandomState(0)
    a, b = (rng.randn(batch, SIZE).astype(np.float32) for _ in range(2))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    scale, bias = FORMS[form]
    if name == PEER:
        return _open_clip(form, a, b, scale, bias)
    return _mmjax(form, a, b, scale, bias, batch // CHUNKS if name == CHUNKED else 0)


def _mmjax(form: str, a: Any, b: Any, scale: float, bias: float, chunk: int) -> Loss:
    import jax
    import jax.numpy as jnp

    from mmjax.objectives.contrastive import chunked_info_nce, info_nce, sigmoid_loss

    concept, valid = jnp.arange(len(a)), jnp.ones(len(a), bool)

    def loss(a: Any, b: Any, scale: Any) -> Any:
        if form == "sigmoid":
            return sigmoid_loss(a, b, scale, jnp.float32(bias), concept, valid, chunk).loss
        if chunk:
            return chunked_info_nce(a, b, scale, concept, valid, chunk).loss
        return info_nce(a, b, scale, concept, valid).loss

    call = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    given = jax.device_put((a, b, np.float32(scale)))

    def run() -> Any:
        value, gradients = jax.block_until_ready(call(*given))
        return value, *gradients

    return run


def _open_clip(form: str, a: Any, b: Any, scale: float, bias: float) -> Loss:
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    given = [torch.tensor(x, requires_grad=True) for x in (a, b, np.float32(scale))]
    made = ClipLoss() if form == "softmax" else SigLipLoss()
    more = {} if form == "softmax" else {"logit_bias": torch.tensor(np.float32(bias))}

    def run() -> Any:
        for x in given:
            x.grad = None
        value = made(*given, **more)
        value.backward()
        return value.detach().numpy(), *(x.grad.numpy() for x in given)

    return run


def memory(name: str, form: str, batch: int) -> float:
    """Return the megabytes of a call, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.contrastive", name, form, str(batch)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(name: str, form: str, batch: int) -> None:
    """Print by how much the process grows, at its peak, during a call that is not the first."""
    call = make(name, form, batch)
    call()
    time.sleep(1)  # threads of the runtime give back what they held of the first call
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, to be counted when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _kilobytes("VmRSS")
    call()
    print((_kilobytes("VmHWM") - before) / 1000)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""The HLO of programs for chips that are not here, from a cache beside JAX's: such executables cannot be read back."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mmjax.plan import topology
from mmjax.plan.case import versions


def text_of(lowered: Any, mesh: Mesh) -> str:
    """Return the optimised HLO of a lowered program; compile it unless the same compiler did so before."""
    file = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / f"hlo-{_key(lowered, mesh)}.txt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = file.with_suffix(f".{os.getpid()}")
        partial_file.write_text(lowered.compile().as_text())
        partial_file.replace(file)
    return file.read_text()


def _key(lowered: Any, mesh: Mesh) -> str:
    """Return a digest of the program, the compiler, the devices and how these are described to the compiler."""
    devices = [f"{device.device_kind} {device}" for device in mesh.devices.flat]
    words = [versions(), devices, Path(topology.__file__).read_text(), lowered.as_text()]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()

"""The toy objective, whose trace ends or stops its process: as a compiler may."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import jax

from mmjax.core.batch import Batch
from mmjax.model import Model
from mmjax.objectives.base import Loss
from mmjax.objectives.toy import Toy  # found beside this file, by --extra


@dataclass(frozen=True, kw_only=True)
class Faulty(Toy):
    """Attributes:
    fault: `crash` ends the process as a bad memory access does; `hang` stops it.
    """

    fault: str

    def __call__(self, model: Model, batch: Batch, key: jax.Array) -> Loss:
        if self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(1e6)
        return super().__call__(model, batch, key)

"""Teachers in a config: named copies of part of the parameters, moving averages or frozen ones.

The state holds one as `teacher/NAME/PARAMETER`, which `mmjax.engine.teachers` moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmjax.core.bounds import FRACTION, FieldError, check, check_choices

TEACHER = "teacher/"  # begins the name of a teacher's parameter among the arrays of a model
KINDS = EMA, FROZEN = ("ema", "frozen")
SCHEDULES = COSINE, CONSTANT = ("cosine", "constant")


@dataclass(frozen=True)
class TeacherConfig:
    """A copy of part of the parameters, which objectives read and no gradient moves.

    Attributes:
      of: patterns of the parameters that it copies, as in `optimizer.rules`: `trunk/.*`. All layers of a group or none.
      kind: `ema`: a moving average, `decay * teacher + (1 - decay) * parameter` after each update of a task that reads
        it; `frozen`: it stays as it is.
      decay: of an average, at the first update.
      end_decay: of an average, at the last update of the run, where the schedule is `cosine`.
      schedule: of the decay, `cosine` from `decay` to `end_decay`, or `constant`.
      path: of a frozen one, a workdir of mmjax (its newest checkpoint when the run first begins), or a .npz or
        .safetensors file, with the same names; empty for the parameters at step 0, after `init_from`.
    """

    of: tuple[str, ...]
    kind: str = EMA
    decay: float = 0.996
    end_decay: float = 1.0
    schedule: str = COSINE
    path: str = ""

    def __post_init__(self) -> None:
        check(self, decay=FRACTION, end_decay=FRACTION)
        check_choices(self, kind=KINDS, schedule=SCHEDULES)
        if self.path and self.kind != FROZEN:
            words = f"is '{self.path}', and of a frozen teacher. Set kind to '{FROZEN}', or remove path: an average "
            raise FieldError(self, "path", f"{words}begins at the parameters of step 0.")

    @property
    def moves(self) -> bool:
        return self.kind == EMA

    def decay_at(self, update: int, updates: int) -> float:
        """Return the decay of an update of [0, updates); from the last one on it is `end_decay`, if a cosine."""
        if self.schedule == CONSTANT:
            return self.decay
        part = min(update / (updates - 1), 1.0) if updates > 1 else 1.0
        return self.end_decay - (self.end_decay - self.decay) * (math.cos(math.pi * part) + 1) / 2

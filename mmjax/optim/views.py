"""Views of the optimizer, one for each task: which parameters they move, and with whose moments.

One step of Adam moves a parameter along its moments, whatever the gradient. So with one optimizer for
all tasks (`shared`, the published way of alternating gradient descent) a parameter that only one
task reaches keeps moving, decaying and forgetting during the steps of the others: where that task
runs every 12th step and its gradient does not change, 3.46 learning rates per visit (the square
root of 12: the second moment has the zeros of the others in its mean), 86 % of it during the
others' steps, with b1 = 0.9. `tests/optim/test_views.py` measures both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmjax.core.errors import UserError, nearest
from mmjax.optim.reach import Reach

SHARED, OWN_CLOCK, OWN_MOMENTS = KINDS = ("shared", "own_clock", "own_moments")


@dataclass(frozen=True)
class UpdateScope:
    """One task's view of the optimizer.

    Attributes:
      kind: `shared`: a step updates every parameter. `own_clock`: a step updates what the gradient
        of its task's loss reaches; the rest neither moves nor decays, and its count does not change.
        `own_moments`: as `own_clock`, with optimizer state of the task's own.
      trains: the parameters that its steps update; frozen ones are not among them.
    """

    kind: str
    trains: frozenset[str]


def check_kind(kind: str, where: str) -> str:
    """Return `kind`; raise an error that names the config key `where` if there is no such view."""
    if kind not in KINDS:
        raise UserError(f"{where}: no '{kind}'.{nearest(kind, KINDS)}")
    return kind


def make_update_scope(kind: str, trained: frozenset[str], reach: Reach | None) -> UpdateScope:
    """Return the view of a task.

    Args:
      kind: one of `KINDS`.
      trained: the parameters that no rule freezes.
      reach: of the task's loss; None for all.
    """
    if reach is None:
        return UpdateScope(kind, trained)
    return UpdateScope(kind, trained & reach.names)


def shared_parameters(views: Mapping[str, UpdateScope]) -> frozenset[str]:
    """Return the parameters with optimizer state that tasks have in common."""
    moved = (view.trains for view in views.values() if view.kind != OWN_MOMENTS)
    return frozenset().union(*moved)


def task_state_name(task: str, parameter: str) -> str:
    """Return the name of a task's own optimizer state of a parameter."""
    return f"{task}:{parameter}"


def split_name(name: str) -> tuple[str, str]:
    """Return (task, parameter) of `task_state_name`."""
    task, _, parameter = name.partition(":")
    return task, parameter

"""Rules of a schedule: how often each task runs in a cycle, and in which order.

A rule is one file in `mmjax/schedule/rules/`, whose class is named like it. It sees the weights above zero, in the
order of the config, and names a task by its place among them.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmjax.core import config as configs
from mmjax.core.errors import UserError, nearest

MAX_CYCLE = 1_000_000  # steps; a table of this many is built in seconds and held in megabytes


@dataclass(frozen=True)
class Rule(abc.ABC):
    """A rule that turns weights into cycles with integer arithmetic, so that every machine finds the same order.

    Attributes:
      varies: whether cycles differ from one another; else each is the first.
      key: the key of a task that a weight is read from, `weight` or `interval`.
    """

    varies: ClassVar[bool] = False
    key: ClassVar[str] = "weight"

    @abc.abstractmethod
    def counts(self, weights: Sequence[int]) -> list[int]:
        """Return the visits of each task in a cycle; their sum is its length."""

    @abc.abstractmethod
    def order(self, weights: Sequence[int], seed: int, first: int) -> list[int]:
        """Return the task of each step of the cycle that begins at step `first`."""


def names() -> list[str]:
    """Return the names of the rules, sorted."""
    return configs.names("rules")


def is_known(name: str) -> bool:
    """Return whether there is a rule of this name."""
    return name in names()


@functools.cache
def rule_of(name: str) -> Rule:
    """Return the rule of a name.

    Raises:
      UserError: there is no such rule.
    """
    if not is_known(name):
        raise UserError(f"Unknown schedule rule '{name}'.{nearest(str(name), names())}")
    rule: Rule = configs.component("rules", {"name": name}, "schedule.rule")
    return rule


@dataclass(frozen=True)
class Cycle:
    """The order of a cycle's steps, and where each task's are."""

    order: NDArray[np.int32]  # [length], the task of each step
    where: list[NDArray[np.int64]]  # per task, the steps at which it runs, ascending

    def visits(self, task: int, offset: int) -> int:
        """Return how often a task runs in the first `offset` steps."""
        return int(np.searchsorted(self.where[task], offset))


@functools.lru_cache(maxsize=16)
def make_cycle(rule: str, weights: tuple[int, ...], seed: int, first: int) -> Cycle:
    """Return a cycle of a rule under weights above zero."""
    order = np.array(rule_of(rule).order(weights, seed, first), dtype=np.int32)
    ends = np.cumsum(np.bincount(order, minlength=len(weights)))
    return Cycle(order, np.split(np.argsort(order, kind="stable"), ends[:-1]))


def shares_cycle(shares: tuple[int, ...]) -> Cycle:
    """Return a cycle of the rule `shares`."""
    return make_cycle("shares", shares, 0, 0)


def exact_integer(value: Any, what: str, *, low: int | None = 0) -> int:
    """Return an integer that is at least `low`; anything else is a `UserError` about `what`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{what} must be an integer; found {value!r}.")
    if low is not None and value < low:
        raise UserError(f"{what} must be {low} or more; found {value}.")
    return int(value)


def check_weights(rule: Rule | None, weights: Mapping[str, int], name: str = "") -> dict[str, int]:
    """Return the weights of tasks as integers.

    Args:
      rule: what reads them; None where it is not settled yet, as under a budget.
      weights: by task.
      name: the rule's, for messages.

    Raises:
      UserError: a weight that is no integer from 0 up, no task that runs, or a cycle above `MAX_CYCLE`.
    """
    word = rule.key if rule else Rule.key
    checked = {t: exact_integer(w, f"Task '{t}': its {word}") for t, w in weights.items()}
    if not checked:
        raise UserError("The schedule has no tasks. Give at least one.")
    active = {task: weight for task, weight in checked.items() if weight}
    if not active:
        tasks = ", ".join(f"'{task}'" for task in checked)
        raise UserError(f"No task would ever run: the {word} of each of {tasks} is 0.")
    length = sum(rule.counts(tuple(active.values()))) if rule else 0
    if length > MAX_CYCLE:
        raise UserError(
            f"The schedule {name} {active} repeats only after {length} steps, more than "
            f"{MAX_CYCLE}. Use {word}s with smaller numbers or more common factors."
        )
    return checked

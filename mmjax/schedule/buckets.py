"""Buckets: a task in several shapes (resolution, frames, stride, tokens dropped), which its visits take in turn.

A bucket changes a task's `inputs` and nothing else. Which one a visit takes follows from its number alone, spread as
evenly as tasks are over steps, so that a run that was interrupted finds the same. Each has a program of its own; all
give as many tokens per example, so that they cost about the same (IMP, Akbari et al. 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from mmjax.core.errors import UserError
from mmjax.schedule.rules.base import turns

if TYPE_CHECKING:
    from mmjax.task import Task


@dataclass(frozen=True)
class Variant:
    """A task in one of its shapes.

    Attributes:
      program: name of the training program.
      task: with the bucket's inputs.
      bucket: its name; empty for a task without buckets.
      share: its weight among the task's visits.
    """

    program: str
    task: Task
    bucket: str = ""
    share: int = 1


@dataclass(frozen=True)
class Variants:
    """A task in all its shapes, in the order of the config."""

    each: tuple[Variant, ...]

    def __iter__(self) -> Iterator[Variant]:
        return iter(self.each)

    @property
    def shares(self) -> tuple[int, ...]:
        return tuple(variant.share for variant in self.each)

    def at(self, visit: int) -> Variant:
        """The one that a visit takes, counted from 0."""
        period = turns(self.shares)
        return self.each[int(period.order[visit % len(period.order)])]

    def counts(self, start: int, stop: int) -> dict[str, int]:
        """How many of the visits [start, stop) each program has."""
        period = turns(self.shares)

        def before(index: int, visit: int) -> int:
            rounds, rest = divmod(visit, len(period.order))
            return rounds * len(period.where[index]) + period.visits(index, rest)

        found: Counter[str] = Counter()
        for index, variant in enumerate(self.each):
            found[variant.program] += before(index, stop) - before(index, start)
        return dict(found)

    def mean(self, values: Mapping[str, float]) -> float:
        """Of a number per program, over the task's visits."""
        total = sum(v.share * values[v.program] for v in self.each)
        return total / sum(self.shares)


def check_tokens(tokens: Mapping[str, Fraction], where: str) -> None:
    """All buckets must give as many tokens per example.

    Raises:
      UserError: they do not; names each with its tokens.
    """
    if len(set(tokens.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in tokens.items())
        raise UserError(
            f"{where}: buckets give different numbers of tokens per example ({said}). Choose resolution, frames, "
            "length and drop so that they agree; shapes of other sizes are tasks of their own."
        )


def merged(block: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`block` with the leaves of `changes` in it."""
    made = dict(block)
    for key, value in changes.items():
        inner = made.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        made[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return made

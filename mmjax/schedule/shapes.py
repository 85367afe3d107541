"""A task in several shapes (resolution, frames, stride, tokens dropped), which its visits take in turn.

A shape changes a task's `inputs` and nothing else. Which one a visit takes follows from its number alone, spread as
evenly as tasks are over steps, so that a run that was interrupted finds the same. Each has a program of its own; all
give as many tokens per example, so that they cost about the same (IMP, Akbari et al. 2023).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mmjax.core.errors import UserError
from mmjax.schedule.rules.base import shares_cycle
from mmjax.task import Task


@dataclass(frozen=True)
class ShapeVariant:
    """A task in one of its shapes.

    Attributes:
      program: name of the training program.
      task: with the shape's inputs.
      shape: its name; empty for a task of one shape.
      weight: its weight among the task's visits.
    """

    program: str
    task: Task
    shape: str = ""
    weight: int = 1


@dataclass(frozen=True)
class ShapeVariants:
    """A task in all its shapes, in the order of the config."""

    variants: tuple[ShapeVariant, ...]

    def __iter__(self) -> Iterator[ShapeVariant]:
        return iter(self.variants)

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(variant.weight for variant in self.variants)

    def at(self, visit: int) -> ShapeVariant:
        """Return the one that a visit takes, counted from 0."""
        cycle = shares_cycle(self.weights)
        return self.variants[int(cycle.order[visit % len(cycle.order)])]

    def counts(self, start: int, stop: int) -> dict[str, int]:
        """Return the number of visits in [start, stop) of each program."""
        cycle = shares_cycle(self.weights)

        def before(index: int, visit: int) -> int:
            rounds, offset = divmod(visit, len(cycle.order))
            return rounds * len(cycle.where[index]) + cycle.visits(index, offset)

        counts: Counter[str] = Counter()
        for index, variant in enumerate(self.variants):
            counts[variant.program] += before(index, stop) - before(index, start)
        return dict(counts)

    def mean(self, values: Mapping[str, float]) -> float:
        """Return the mean of a number per program over the task's visits."""
        total = sum(v.weight * values[v.program] for v in self.variants)
        return total / sum(self.weights)


def check_tokens(tokens: Mapping[str, Fraction], where: str) -> None:
    """Raise unless all shapes of a task give as many tokens per example.

    Raises:
      UserError: names each with its tokens.
    """
    if len(set(tokens.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in tokens.items())
        raise UserError(
            f"{where}: shapes give different numbers of tokens per example ({counts}). Choose resolution, frames, "
            "length and token_drop so that they agree; shapes with other numbers are tasks of their own."
        )


def merged(block: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `block` with the leaves of `changes` in it."""
    result = dict(block)
    for key, value in changes.items():
        inner = result.get(key)
        nested = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[key] = merged(inner, value) if nested else value  # type: ignore[arg-type]
    return result

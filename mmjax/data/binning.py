"""Groups of examples of even lengths: which rows of a batch share a sequence."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def even_groups(lengths: Sequence[int], size: int) -> list[int]:
    """Return an order of `lengths` in which each `size` in a row add up to about the same.

    The longest comes first, each to the group with the smallest sum that has a place left (the greedy rule of Graham
    1969, with a fixed number of members). It is a pure function: equal lengths and sums go by their index.

    Args:
      lengths: as many as `size` divides.

    Returns:
      Every index of `lengths` once; those of a group ascend.

    Example:
      >>> even_groups([8, 1, 2, 7], 2)
      [0, 1, 2, 3]
      >>> even_groups([8, 7, 2, 1], 2)
      [0, 3, 1, 2]
    """
    groups = [list[int]() for _ in range(len(lengths) // size)]
    sums = [(0, group) for group in range(len(groups))]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, group = heapq.heappop(sums)
        groups[group].append(index)
        if len(groups[group]) < size:
            heapq.heappush(sums, (total + lengths[index], group))
    return [index for group in groups for index in sorted(group)]

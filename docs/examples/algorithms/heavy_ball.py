"""Gradient descent with momentum: `m = momentum m + g`, and a step against `m`."""

from __future__ import annotations

from dataclasses import dataclass, field

import optax

from mmjax.core.bounds import PART, check
from mmjax.core.config import SCHEDULE
from mmjax.core.parameters import Spec
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.transforms import LeafTransform, layer_shape


@dataclass(frozen=True)
class HeavyBall(Algorithm):
    """The keys of the algorithm.

    Attributes:
      momentum: decay of the sum of gradients.
    """

    momentum: float = field(default=0.9, metadata=SCHEDULE)

    def __post_init__(self) -> None:
        check(self, momentum=PART)

    def transform(self, spec: Spec) -> LeafTransform:
        """Return the transform of one parameter, with the shape and the axes of its state."""
        shape, axes = layer_shape(spec)
        return LeafTransform(optax.trace(self.momentum), shape, {"trace": axes})

"""Lion."""

from __future__ import annotations

from dataclasses import dataclass, field

import optax

from mmjax.core.bounds import PART, check, check_choices
from mmjax.core.config import SCHEDULE, STRUCTURAL
from mmjax.core.parameters import Spec
from mmjax.optim.algorithms.base import MOMENTS, Algorithm
from mmjax.optim.transforms import LeafTransform, layer_shape


@dataclass(frozen=True)
class Lion(Algorithm):
    """The sign of an average of gradients (Chen et al. 2023, algorithm 2).

    Its authors set b2 to 0.99, and the learning rate to a third of Adam's or less.

    Attributes:
      b1: weight of the average in the direction.
      b2: decay of the average.
      moments_dtype: of the average, `bfloat16` or `float32`; empty for the parameters' own.
    """

    b1: float = field(default=0.9, metadata=SCHEDULE)
    b2: float = field(default=0.999, metadata=SCHEDULE)
    moments_dtype: str = field(default="", metadata=STRUCTURAL)

    def __post_init__(self) -> None:
        check(self, b1=PART, b2=PART)
        check_choices(self, moments_dtype=MOMENTS)

    def transform(self, spec: Spec) -> LeafTransform:
        shape, axes = layer_shape(spec)
        transform = optax.scale_by_lion(self.b1, self.b2)
        return LeafTransform(transform, shape, {"count": (), "mu": axes}, self.moments_dtype)

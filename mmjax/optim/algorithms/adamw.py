"""AdamW."""

from __future__ import annotations

from dataclasses import dataclass, field

import optax

from mmjax.core.bounds import PART, POSITIVE, check, check_choices
from mmjax.core.config import SCHEDULE, STRUCTURAL
from mmjax.core.parameters import Spec
from mmjax.optim.algorithms.base import MOMENTS, Algorithm
from mmjax.optim.transforms import LeafTransform, layer_shape


@dataclass(frozen=True)
class Adamw(Algorithm):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
      b1, b2: decays of the first and the second moment.
      eps: added to the root of the second moment.
      moments_dtype: of first moments, `bfloat16` or `float32`; empty for the parameters' own. Second moments are
        float32 or wider, like averages and sums: a bfloat16 average whose weight is 0.999 never changes.
    """

    b1: float = field(default=0.9, metadata=SCHEDULE)
    b2: float = field(default=0.999, metadata=SCHEDULE)
    eps: float = field(default=1e-8, metadata=SCHEDULE)
    moments_dtype: str = field(default="", metadata=STRUCTURAL)

    def __post_init__(self) -> None:
        check(self, b1=PART, b2=PART, eps=POSITIVE)
        check_choices(self, moments_dtype=MOMENTS)

    def transform(self, spec: Spec) -> LeafTransform:
        shape, axes = layer_shape(spec)
        fields = {"count": (), "mu": axes, "nu": axes}
        transform = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return LeafTransform(transform, shape, fields, self.moments_dtype)

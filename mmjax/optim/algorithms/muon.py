"""Muon for the matrices of a trunk, AdamW for all else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import optax
from optax import contrib

from mmjax.core.bounds import PART, check
from mmjax.core.config import SCHEDULE
from mmjax.core.parameters import Spec
from mmjax.optim.algorithms.adamw import Adamw
from mmjax.optim.transforms import LeafTransform, as_matrix

# Size of Muon's update relative to Adam's, after Liu et al. (2025): one learning rate and one weight
# decay then serve the matrices and the rest.
_RMS = 0.2


@dataclass(frozen=True)
class Muon(Adamw):
    """Muon (Jordan 2024), at the size of Adam's updates (Liu et al. 2025), for the matrices of a trunk's layers.

    All other parameters have AdamW, whose keys are here too.

    Attributes:
      momentum: decay of the average of gradients that is made orthogonal.
    """

    momentum: float = field(default=0.95, metadata=SCHEDULE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, momentum=PART)

    def transform(self, spec: Spec) -> LeafTransform:
        shape, axes = as_matrix(spec)
        if spec.stack is None or len(shape) < 2:
            return super().transform(spec)
        sides = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        transform = optax.chain(
            contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=sides),
            optax.scale(math.sqrt(max(shape[-2:])) * _RMS),
        )
        return LeafTransform(transform, shape, {"count": (), "mu": axes}, self.moments_dtype)

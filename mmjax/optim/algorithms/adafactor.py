"""Adafactor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import optax

from mmjax.core.bounds import COUNT, check
from mmjax.core.config import STRUCTURAL
from mmjax.core.parameters import Spec
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.transforms import LeafTransform, as_matrix


@dataclass(frozen=True)
class Adafactor(Algorithm):
    """Adafactor without a first moment (Shazeer and Stern 2018, algorithms 4 and 5).

    The learning rate is relative to a parameter's size.

    Attributes:
      min_dim_to_factor: the second moment of a matrix is held as rows and columns if neither side is below this.
    """

    min_dim_to_factor: int = field(default=128, metadata=STRUCTURAL)

    def __post_init__(self) -> None:
        check(self, min_dim_to_factor=COUNT)

    def transform(self, spec: Spec) -> LeafTransform:
        shape, axes = as_matrix(spec)
        transform = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=self.min_dim_to_factor),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
        if len(shape) < 2 or sorted(shape)[-2] < self.min_dim_to_factor:
            return LeafTransform(transform, shape, {"count": (), "v": axes})
        # As Optax chooses: the row statistics lose the largest axis, the column statistics the next.
        second, largest = np.argsort(shape)[-2:]
        fields = {
            "count": (),
            "v_row": tuple(a for i, a in enumerate(axes) if i != largest),
            "v_col": tuple(a for i, a in enumerate(axes) if i != second),
        }
        return LeafTransform(transform, shape, fields)

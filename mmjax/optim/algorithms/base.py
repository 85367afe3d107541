"""Algorithms of the optimizer: what the gradient of one parameter goes through, and how its state lies.

An algorithm is one file in `mmjax/optim/algorithms/`, whose class is named like it. The learning rate, weight decay,
clipping, rules and averages are the optimizer's own (`mmjax.optim.config.OptimizerConfig`) and hold for all of them.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from mmjax.core.parameters import Spec
from mmjax.optim.transforms import LeafTransform

# Dtypes of first moments; the empty one means the parameter's own.
MOMENTS = ("", "bfloat16", "float32")


@dataclass(frozen=True)
class Algorithm(abc.ABC):
    """An optimization algorithm; its fields are the keys of `optimizer.algorithm`.

    A field states what a change of its key means for a run that exists: `SCHEDULE` for a number that the next step
    reads, `STRUCTURAL` (also of fields that state nothing) for what decides the shapes or dtypes of the state.
    """

    KIND: ClassVar[str] = "algorithms"
    # The algorithm of a block without `name`.
    DEFAULT: ClassVar[str] = "adamw"

    @abc.abstractmethod
    def transform(self, spec: Spec) -> LeafTransform:
        """Return the transform of one parameter, with the shape in which it sees it and the axes of its state.

        Args:
          spec: of the parameter. If it is stacked, the transform is of one of its layers (see `layer_shape` and
            `as_matrix` in `mmjax.optim.transforms`).
        """

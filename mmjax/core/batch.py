"""A batch of examples: what a task's loss and its evaluation read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

Arrays = Mapping[str, Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["fields", "inputs", "keys", "valid"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """The rows of one step, `[B, ...]` each; or one row of them, without the axis B.

    The leaves are NumPy arrays on the host, JAX arrays on devices, and `jax.ShapeDtypeStruct`s where
    programs are compiled ahead.

    Attributes:
      inputs: arrays of each modality, by the names that the modality gives them.
      fields: integer fields of the examples, int32 `[B]`.
      valid: bool `[B]`; False for a row that only fills the batch or whose example could not be read.
      keys: random key of each row `[B]`, where the program sets them: then a row draws the same
        whatever part of a batch it comes in.
    """

    inputs: Mapping[str, Arrays]
    fields: Arrays
    valid: Any
    keys: Any = None

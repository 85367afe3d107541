"""A span of a generated or shown sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from mmjax.nn.stream import Stream


@dataclass(frozen=True)
class Span:
    """One span of a sequence.

    Attributes:
      name: its modality.
      arrays: what it holds; if it is generated, arrays of the same shapes.
      generated: whether it is sampled, as text or by diffusion.
      absent: whether nothing is known of it: it stands in the sequence as pure noise, as in training at the last time.
    """

    name: str
    arrays: Mapping[str, jax.Array]
    generated: bool = False
    absent: bool = False


class NoisySpan(NamedTuple):
    """The tokens of a noisy span, and what turns the trunk's outputs for them into a prediction.

    Attributes:
      stream: its tokens.
      context: whatever the objective that made it needs for the prediction; the sampler only passes it on.
    """

    stream: Stream
    context: Any

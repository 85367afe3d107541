"""A modality token: one learned vector that is added to every token of a modality (ViLT, Kim et al. 2021).

Two modalities whose stems give equal tokens at equal positions differ in nothing else to a shared trunk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flax import nnx
from jax.nn import initializers

from mmjax.core.parameters import declare
from mmjax.nn.stream import Stream

NAME = "modality_token"


def add_modality_token(stem: nnx.Module, width: int) -> nnx.Module:
    """Declare a modality's token beside the parameters of its stem, as `stems/MODALITY/modality_token`."""
    token = declare((width,), ("embed",), initializers.normal(0.02), decay=False)
    setattr(stem, NAME, token)
    return stem


def with_modality_token(stem: Any, stream: Stream) -> Stream:
    """Return the stem's stream with its modality token added, if it has one."""
    token = getattr(stem, NAME, None)
    if token is None:
        return stream
    return replace(stream, x_BSD=stream.x_BSD + token[...].astype(stream.x_BSD.dtype))

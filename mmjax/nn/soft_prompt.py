"""A soft prompt: learned tokens before those that a task reads (Lester et al. 2021)."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mmjax.core.parameters import declare
from mmjax.nn.stream import Stream


class SoftPrompt(nnx.Module):
    """`count` learned tokens `[count, width]`.

    They pass a tower as tokens of the modality that they stand before, so that its masks and the parts that it has of
    its own hold for them; positions are not added to them.
    """

    def __init__(self, count: int, width: int):
        self.tokens = declare(
            (count, width), (None, "embed"), initializers.normal(0.02), decay=False
        )

    def before(self, stream: Stream) -> Stream:
        """Return the stream of one modality with the prompt before its tokens.

        Raises:
          ValueError: its tokens have attributes or a context, which the prompt has not.
        """
        if stream.attributes or stream.context is not None or len(stream.layout) != 1:
            raise ValueError("a prompt stands before the plain tokens of one modality")
        prompt_KD = self.tokens[...].astype(stream.x_BSD.dtype)
        rows, (name, length), count = stream.x_BSD.shape[0], stream.layout[0], len(prompt_KD)
        prompt_BKD = jnp.broadcast_to(prompt_KD, (rows, *prompt_KD.shape))
        valid_BS = stream.valid_BS
        if valid_BS is not None:
            valid_BS = jnp.concatenate([jnp.ones((rows, count), bool), valid_BS], axis=1)
        return replace(
            stream,
            x_BSD=jnp.concatenate([prompt_BKD, stream.x_BSD], axis=1),
            valid_BS=valid_BS,
            coordinates={},
            layout=((name, count + length),),
        )

    def after(self, stream: Stream) -> Stream:
        """Return what a tower made of streams of which the first had the prompt, without the prompt's tokens."""
        count = self.tokens[...].shape[0]
        (name, length), *others = stream.layout
        valid_BS: jax.Array | None = stream.valid_BS
        return replace(
            stream,
            x_BSD=stream.x_BSD[:, count:],
            valid_BS=None if valid_BS is None else valid_BS[:, count:],
            layout=((name, length - count), *others),
        )

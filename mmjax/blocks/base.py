"""The interface of a block: a dataclass of keys, which builds a layer of a trunk."""

from __future__ import annotations

from typing import Protocol

import jax

from mmjax.nn.stream import Aux, Stream


class Layer(Protocol):
    """The module that a block builds, an `nnx.Module`.

    For generation it also has `init_cache` and `decode`, see those of `mmjax.nn.trunk.Trunk`.
    """

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        """Return the stream with other tokens, and auxiliary losses; without a key nothing is drawn."""


class Block(Protocol):
    """A config's block `{name: NAME, ...}`: the frozen dataclass of that name in `mmjax/blocks/NAME.py`.

    Its fields are the keys, with their types and defaults; `__post_init__` checks what the types do not express.
    """

    def build(self, width: int) -> Layer:
        """Return the layer for tokens of a width."""

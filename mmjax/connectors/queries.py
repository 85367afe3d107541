"""Learned queries that read a tower (Q-Former, Emu's causal former)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import jax
from flax import nnx
from jax.nn import initializers

from mmjax.blocks.transformer import LayerKeys
from mmjax.connectors.base import broadcast_rows, projection, remade
from mmjax.core.bounds import COUNT, SIZE, FieldError, check
from mmjax.core.parameters import declare
from mmjax.nn.masks import FULL, Causal
from mmjax.nn.stream import Aux, Stream
from mmjax.nn.trunk import GroupConfig, Trunk


@dataclass(frozen=True, kw_only=True)
class Queries(LayerKeys):
    """A decoder whose tokens are learned: each of `count` outputs may depend on all tokens that exist.

    Its layers are those of `cross_transformer`. In a row without tokens they add nothing to what the queries give by
    themselves, and none of the outputs exists. Bidirectional, it is a Q-Former (Li et al. 2023); causal, the causal
    former of Emu (Sun et al. 2023): output i does not depend on the queries after i.

    Attributes:
      count: learned queries, drawn from N(0, 0.02) at first; as many tokens come out, whatever the stream's length.
      depth: layers.
      causal: let a query attend to those before it alone.
      cross_every: read the tokens in one layer of so many, the first of them (BLIP-2: 2).
      context_norm: a norm of the tokens that are read.
      width: of the queries; 0 for that of the result. Tokens of another width are projected before they are read.
      out_bias: the bias of the last linear map.
      modality: the name of the tokens that come out; by default the stream's, which then has one.
    """

    count: int
    depth: int
    causal: bool = False
    cross_every: int = 1
    context_norm: bool = True
    width: int = 0
    out_bias: bool = True
    modality: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, count=COUNT, depth=COUNT, cross_every=COUNT, width=SIZE)
        if self.depth % self.cross_every:
            words = f"is {self.cross_every}; it must divide depth, {self.depth}."
            raise FieldError(self, "cross_every", words)

    def build(self, width_in: int, width_out: int) -> QueriesConnection:
        """Return the module from tokens of one width to tokens of another."""
        return QueriesConnection(width_in, width_out, self)

    def group(self) -> GroupConfig:
        """Return the layers."""
        keys = layer_keys(self)
        cross = {"name": "cross_transformer", **keys, "context_norm": self.context_norm}
        plain: dict[str, Any] = {"name": "transformer", **keys}
        pattern = (cross, *[plain] * (self.cross_every - 1))
        return GroupConfig(self.depth // self.cross_every, pattern)


def layer_keys(config: LayerKeys) -> dict[str, Any]:
    """Return those keys of a config that every block has."""
    return {field.name: getattr(config, field.name) for field in fields(LayerKeys)}


class QueriesConnection(nnx.Module):
    """The module that `Queries` describes."""

    def __init__(self, width_in: int, width_out: int, config: Queries):
        width = config.width or width_out
        self.into = None if width_in == width else projection(width_in, width, bias=True)
        init = initializers.normal(0.02)
        self.queries = declare((config.count, width), (None, "embed"), init, decay=False)
        self.trunk = Trunk(
            [config.group()],
            width,
            where="connector queries",
            norm=config.norm,
            norm_eps=config.eps,
        )
        self.out = projection(width, width_out, config.out_bias)
        self.mask = Causal() if config.causal else FULL
        self.modality = config.modality

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        read_BSD = stream.x_BSD if self.into is None else self.into(stream.x_BSD)
        context = Stream(read_BSD, stream.valid_BS, layout=stream.layout, rows_B=stream.rows_B)
        x_BQD = broadcast_rows(self.queries, stream)
        result = remade(stream, x_BQD, "queries", self.modality)
        # Every query attends, also in a row whose outputs do not exist.
        queries = replace(result, valid_BS=None, mask=self.mask, context=context)
        queries, aux = self.trunk(queries, key)
        return replace(result, x_BSD=self.out(queries.x_BSD)), aux

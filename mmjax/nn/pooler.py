"""Pooling: of a stream to one vector, or by learned queries that read it."""

from __future__ import annotations

import jax
from flax import nnx
from jax import numpy as jnp
from jax.nn import initializers

from mmjax.core.parameters import declare
from mmjax.nn.attention import Attention
from mmjax.nn.dense import Mlp, norm_of
from mmjax.nn.masks import FULL, Pairs
from mmjax.nn.stream import Stream, mean_pool


class Pooler(nnx.Module):
    """One cross-attention of `queries` learned vectors to a stream, then a norm (CoCa, Yu et al. 2022, section 3.2).

    The stream is read as it is: what comes from a trunk or another pooler ends with a norm.

    Args:
      width: size of a token.
      heads: attention heads.
      queries: tokens that come out, whatever the stream's length.
      bias: biases of the attention's projections.
      norms: normalise the queries, and the stream that they read (open_clip's CoCa).
      eps: of all its norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        queries: int,
        kernel: str = "auto",
        bias: bool = False,
        norms: bool = False,
        eps: float = 1e-6,
    ):
        # At the size of normed tokens: smaller ones would all read the plain mean.
        init = initializers.normal(1.0)
        self.queries = declare((queries, width), (None, "embed"), init, decay=False)
        self.attention = Attention(width, heads, kernel=kernel, bias=bias)
        self.query_norm, self.stream_norm = (
            norm_of("layer", width, eps=eps) if norms else None for _ in range(2)
        )
        self.norm = norm_of("layer", width, eps=eps)

    def __call__(self, stream: Stream) -> Stream:
        """Return `queries` tokens, all of which exist in the rows that do."""
        queries_QD, read_BSD = self.queries[...].astype(stream.x_BSD.dtype), stream.x_BSD
        if self.query_norm is not None and self.stream_norm is not None:
            queries_QD, read_BSD = self.query_norm(queries_QD), self.stream_norm(read_BSD)
        x_BQD = jnp.broadcast_to(queries_QD, (stream.x_BSD.shape[0], *queries_QD.shape))
        pairs = Pairs(FULL, valid_BT=stream.valid_BS)
        x_BQD = self.norm(self.attention(x_BQD, pairs, read_BSD))
        layout = ((stream.layout[0][0], x_BQD.shape[1]),)
        return Stream(x_BQD, layout=layout, rows_B=stream.rows_B)


class MapPooler(nnx.Module):
    """Multi-head attention pooling with a MLP, `[B, S, D] -> [B, D]` (Zhai et al. 2022, "Scaling ViT"; SigLIP).

    One learned query reads the stream: `y = attention(query, stream)`, then `y + mlp(norm(y))`.

    Args:
      width: size of a token.
      heads: attention heads.
      hidden: size of the MLP's hidden layer.
      eps: of the norm.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-6):
        init = initializers.xavier_uniform()
        self.query = declare((1, width), (None, "embed"), init, decay=False)
        self.attention = Attention(width, heads, bias=True, eps=eps)
        self.norm = norm_of("layer", width, eps=eps)
        self.mlp = Mlp(width, hidden)

    def __call__(self, stream: Stream) -> jax.Array:
        query_1D = self.query[...].astype(stream.x_BSD.dtype)
        x_B1D = jnp.broadcast_to(query_1D, (stream.x_BSD.shape[0], *query_1D.shape))
        y_B1D = self.attention(x_B1D, Pairs(FULL, valid_BT=stream.valid_BS), stream.x_BSD)
        return (y_B1D + self.mlp(self.norm(y_B1D)))[:, 0]


def first(stream: Stream) -> jax.Array:
    """Return the first token, `[B, D]`: a class token."""
    return stream.x_BSD[:, 0]


def last(stream: Stream) -> jax.Array:
    """Return the last token that exists, `[B, D]`: of a text, its end token; the last slot where none does."""
    if stream.valid_BS is None:
        return stream.x_BSD[:, -1]
    index_B = stream.valid_BS.shape[1] - 1 - jnp.argmax(stream.valid_BS[:, ::-1], axis=1)
    return jnp.take_along_axis(stream.x_BSD, index_B[:, None, None], axis=1)[:, 0]


POOLS = {"mean": mean_pool, "class": first, "last": last}

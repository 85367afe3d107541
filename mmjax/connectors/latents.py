"""An encoder of learned latents that reads its input again at several depths (Perceiver)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
from flax import nnx
from jax.nn import initializers

from mmjax.blocks.cross_transformer import ContextCache, ReadsContext
from mmjax.blocks.transformer import LayerKeys, Transformer
from mmjax.connectors.base import broadcast_rows, projection, remade
from mmjax.connectors.queries import layer_keys
from mmjax.core.bounds import COUNT, SIZE, FieldError, check
from mmjax.core.parameters import declare
from mmjax.nn.dense import norm_of
from mmjax.nn.stream import Aux, Stream, add_up, fold


@dataclass(frozen=True, kw_only=True)
class Latents(LayerKeys):
    """Learned latents that attend to each other in `depth` layers, and to the input before some (Jaegle et al. 2021).

    A read is `z += cross(norm(z), norm(x)); z += mlp(norm(z))`; between them are layers of `transformer`. In a row
    without tokens the cross-attention adds nothing, and none of the outputs exists.

    Attributes:
      count: latents, drawn from N(0, 0.02) at first; as many tokens come out, whatever the stream's length.
      depth: layers of self-attention.
      reads_at: the layers before which the input is read, in ascending order from 0.
      shared: let all reads after the first have the same weights, as the paper does.
      context_norm: a norm of the input in each read.
      width: of the latents; 0 for that of the result. Tokens of another width are projected before they are read.
      out_bias: the bias of the last linear map.
      modality: the name of the tokens that come out; by default the stream's, which then has one.
    """

    count: int
    depth: int
    reads_at: tuple[int, ...] = (0,)
    shared: bool = False
    context_norm: bool = True
    width: int = 0
    out_bias: bool = True
    modality: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, count=COUNT, depth=COUNT, width=SIZE)
        at = self.reads_at
        is_ascending = bool(at) and list(at) == sorted(set(at))
        if not is_ascending or at[0] < 0 or at[-1] >= self.depth:
            words = f"is {list(at)}; it names layers from 0 to {self.depth - 1} in ascending order, one at least."
            raise FieldError(self, "reads_at", words)

    def build(self, width_in: int, width_out: int) -> LatentsConnection:
        """Return the module from tokens of one width to tokens of another."""
        return LatentsConnection(width_in, width_out, self)


class Read(ReadsContext, nnx.Module):
    """A cross-attention to the input, and an MLP."""

    def __init__(self, width: int, config: Latents):
        self.declare_cross(width, config, config.context_norm)
        self.mlp_norm, self.mlp = config.make_norm(width), config.make_mlp(width)

    def __call__(self, stream: Stream, context: ContextCache) -> Stream:
        stream = self.add_cross(stream, context)
        return replace(stream, x_BSD=stream.x_BSD + self.mlp(self.mlp_norm(stream.x_BSD)))


class LatentsConnection(nnx.Module):
    """The module that `Latents` describes."""

    def __init__(self, width_in: int, width_out: int, config: Latents):
        width, count = config.width or width_out, len(config.reads_at)
        self.into = None if width_in == width else projection(width_in, width, bias=True)
        init = initializers.normal(0.02)
        self.latents = declare((config.count, width), (None, "embed"), init, decay=False)
        self.reads = nnx.List(
            [Read(width, config) for _ in range(min(count, 2) if config.shared else count)]
        )
        layer = Transformer(**layer_keys(config))
        self.blocks = nnx.List([layer.build(width) for _ in range(config.depth)])
        self.norm = norm_of(config.norm, width, eps=config.eps)
        self.out = projection(width, width_out, config.out_bias)
        self.reads_at, self.modality = config.reads_at, config.modality

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        read_BSD = stream.x_BSD if self.into is None else self.into(stream.x_BSD)
        context = Stream(read_BSD, stream.valid_BS, layout=stream.layout)
        contexts = [read.read_context(context) for read in self.reads]  # once for reads that share
        result = remade(stream, broadcast_rows(self.latents, stream), "latents", self.modality)
        latents, auxes = replace(result, valid_BS=None), []
        for depth, block in enumerate(self.blocks):
            if depth in self.reads_at:
                index = min(self.reads_at.index(depth), len(self.reads) - 1)
                latents = self.reads[index](latents, contexts[index])
            latents, aux = block(latents, fold(key, depth))
            auxes.append(aux)
        return replace(result, x_BSD=self.out(self.norm(latents.x_BSD))), add_up(auxes)

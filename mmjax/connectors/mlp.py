"""An MLP of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
from flax import nnx

from mmjax.connectors.base import passed_on
from mmjax.core.bounds import COUNT, POSITIVE, SIZE, check, check_choices
from mmjax.nn.dense import NORMS, Dense, norm_of
from mmjax.nn.stream import Aux, Stream, no_aux

NO_NORM = "none"
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Mlp:
    """`f(norm(x) W1 + b1) W2 + b2` of each token, and so on; two layers with `gelu_exact` are those of LLaVA 1.5.

    Attributes:
      depth: linear maps; the activation is between them.
      hidden: size of the hidden layers; 0 for the width of the result.
      activation: `gelu` (tanh form), `gelu_exact`, `relu` or `silu`.
      norm: of the tokens that are read: `none`, `layer` or `rms`.
      bias: biases of the maps and of a layer norm.
      eps: of the norm.
    """

    depth: int = 2
    hidden: int = 0
    activation: str = "gelu"
    norm: str = NO_NORM
    bias: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check(self, depth=COUNT, hidden=SIZE, eps=POSITIVE)
        check_choices(self, activation=ACTIVATIONS, norm=(NO_NORM, *NORMS))

    def build(self, width_in: int, width_out: int) -> MlpConnection:
        """Return the module from tokens of one width to tokens of another."""
        return MlpConnection(width_in, width_out, self)


class MlpConnection(nnx.Module):
    """The module that `Mlp` describes."""

    def __init__(self, width_in: int, width_out: int, config: Mlp):
        self.norm = (
            None
            if config.norm == NO_NORM
            else norm_of(config.norm, width_in, config.bias, config.eps)
        )
        widths = [width_in, *[config.hidden or width_out] * (config.depth - 1), width_out]
        axes = ("embed", "mlp"), ("mlp", "embed")
        self.maps = nnx.List(
            [Dense(n, m, axes[i % 2], config.bias) for i, (n, m) in enumerate(pairwise(widths))]
        )
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        del key
        x_BSD = stream.x_BSD if self.norm is None else self.norm(stream.x_BSD)
        x_BSD = self.maps[0](x_BSD)
        for layer in list(self.maps)[1:]:
            x_BSD = layer.of(self.activation, x_BSD)
        return passed_on(stream, x_BSD), no_aux()

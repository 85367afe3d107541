"""The loss of a causal router moves that router alone, whatever stands before its layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import layers
import numpy as np

from mmjax.core.parameters import Declaration
from mmjax.nn.stream import Stream

CAUSAL = {
    "count": 2,
    "router": {"name": "expert_choice", "score": "sigmoid", "capacity": 1.0},
    "causal": {"mlp_dim": 3, "weight": 1.0},
}


def test_its_gradient_does_not_reach_the_tokens() -> None:
    """MoMa (Lin et al. 2024) trains it on a trunk that it does not change."""
    declaration = Declaration(layers.experts(4, 5, CAUSAL))
    rng = np.random.default_rng(0)
    p = {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}
    tokens = jnp.asarray(rng.normal(size=(2, 6, 4)))

    def loss(x_BSD: jax.Array) -> jax.Array:
        return declaration.merge(p)(Stream(x_BSD, layout=(("text", 6),)), None)[1].loss

    value, gradient = jax.value_and_grad(loss)(tokens)
    assert value > 0.1
    np.testing.assert_array_equal(gradient, np.zeros_like(tokens))

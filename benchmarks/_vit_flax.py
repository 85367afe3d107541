"""A ViT in Flax's `linen` and its training step by Optax, written as one usually does; the peer of `vit.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Parameters = Any


class Block(nn.Module):
    """Attention and an MLP, a norm before each."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(use_bias=False)(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, use_bias=False)(y, y)
        y = nn.LayerNorm(use_bias=False)(x)
        y = nn.Dense(self.mlp_dim, use_bias=False)(y)
        return x + nn.Dense(x.shape[-1], use_bias=False)(nn.gelu(y))


class ViT(nn.Module):
    """Patches, learned positions, blocks, the mean of the tokens, classes."""

    width: int
    layers: int
    num_heads: int
    mlp_dim: int
    patch: int
    classes: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, name="patches")(pixels / 127.5 - 1)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for index in range(self.layers):
            x = Block(self.num_heads, self.mlp_dim, name=f"block_{index}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.classes, name="classes")(x.mean(axis=1))


def training(
    model: ViT, parameters: Parameters, rate: float
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a step on pixels (uint8 `[B, H, W, 3]`) and labels by AdamW, whose state it keeps; it gives the loss."""
    optimizer = optax.adamw(rate, weight_decay=0.0)

    def step(parameters: Parameters, state: Any, pixels: jax.Array, labels: jax.Array) -> Any:
        def loss(p: Parameters) -> jax.Array:
            logits = model.apply({"params": p}, pixels)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.device_put(parameters), optimizer.init(parameters)]

    def train(pixels: np.ndarray, labels: np.ndarray) -> float:
        held[0], held[1], value = step(held[0], held[1], pixels, labels)
        return float(value)

    return train


def parameters(ours: Mapping[str, Any], sizes: Mapping[str, int], side: int) -> Parameters:
    """Return the parameters of mmjax's model (names as in a checkpoint, layers apart), in this one's names and shapes.

    Args:
      side: patches on a side of the picture.
    """
    width, patch = sizes["width"], sizes["patch"]
    tree = {
        "patches": {
            "kernel": ours["stem"].reshape(patch, patch, 3, width),
            "bias": ours["stem_bias"],
        },
        "positions": ours["positions"].reshape(1, side * side, width),
        "norm": {"scale": ours["norm_scale"], "bias": ours["norm_bias"]},
        "classes": {"kernel": ours["classes"], "bias": ours["classes_bias"]},
    }
    for index, layer in enumerate(ours["layers"]):
        split = {name: {"kernel": layer[name]} for name in ("query", "key", "value", "out")}
        tree[f"block_{index}"] = {
            "LayerNorm_0": {"scale": layer["attention_norm"]},
            "MultiHeadDotProductAttention_0": split,
            "LayerNorm_1": {"scale": layer["mlp_norm"]},
            "Dense_0": {"kernel": layer["up"]},
            "Dense_1": {"kernel": layer["down"]},
        }
    return jax.tree.map(jnp.asarray, tree)

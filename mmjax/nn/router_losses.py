"""Auxiliary losses that keep routers from collapsing, in float32 or wider.

Tokens come in groups of T, as in `mmjax.nn.routers.base`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mmjax.nn.routers.base import widened


def importance_loss(scores_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return the squared coefficient of variation of each expert's summed score, mean over the groups.

    Shazeer et al. (2017), equations 6 and 7. A group without a valid token does not count, here and below.
    """
    summed_GE = jnp.where(valid_GT[..., None], scores_GTE, 0).sum(axis=1)
    return _over_groups(_variation(summed_GE), valid_GT)


def _variation(x_GE: jax.Array) -> jax.Array:
    """Return `variance / mean^2` over experts, `[G]`; its gradient at equal values is 0, where that of std is NaN."""
    mean_G1 = x_GE.mean(axis=-1, keepdims=True)
    variance_G = jnp.square(x_GE - mean_G1).mean(axis=-1)
    return variance_G / jnp.maximum(jnp.square(mean_G1[..., 0]), 1e-18)


def _over_groups(loss_G: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return the mean over the groups that have a valid token; 0 without any."""
    has_G = valid_GT.any(axis=1)
    return jnp.asarray(jnp.where(has_G, loss_G, 0).sum() / jnp.maximum(has_G.sum(), 1))


def load_loss(
    logits_GTE: jax.Array, noisy_GTE: jax.Array, deviation: float, top: int, valid_GT: jax.Array
) -> jax.Array:
    """Return V-MoE's load loss (Riquelme et al. 2021, appendix A), mean over the groups.

    It measures how uneven the load would be, were one expert's noise drawn again: the squared coefficient of variation
    over experts of `sum_t 1 - Phi((eta_t - logit_te) / deviation)`, `eta_t` being the token's `top_k`-th noisy logit.
    """
    eta_GT1 = jax.lax.top_k(noisy_GTE, top)[0][..., -1:]
    chance_GTE = 1 - jax.scipy.stats.norm.cdf((eta_GT1 - logits_GTE) / deviation)
    load_GE = jnp.where(valid_GT[..., None], chance_GTE, 0).sum(axis=1)
    return _over_groups(_variation(load_GE), valid_GT)


def balance_loss(scores_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return `E sum_e f_e p_e`, mean over the groups (Fedus et al. 2022).

    f_e is the share of tokens whose first choice an expert is, p_e the mean of its scores.
    """
    experts, there_GT1 = scores_GTE.shape[-1], valid_GT[..., None]
    first_GTE = jax.nn.one_hot(scores_GTE.argmax(axis=-1), experts, dtype=scores_GTE.dtype)
    count_G1 = jnp.maximum(valid_GT.sum(axis=1), 1)[:, None]
    share_GE, mean_GE = (
        jnp.where(there_GT1, x, 0).sum(axis=1) / count_G1 for x in (first_GTE, scores_GTE)
    )
    return _over_groups(experts * (share_GE * mean_GE).sum(axis=-1), valid_GT)


def z_loss(logits_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return `mean_t logsumexp(logits_t)^2` (Zoph et al. 2022, equation 5)."""
    sizes_GT = jnp.square(jax.nn.logsumexp(widened(logits_GTE), axis=-1))
    return _mean(sizes_GT[..., None], valid_GT)[0]


def entropy_losses(
    scores_GTE: jax.Array, own_GT: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Return LIMoE's losses of one modality (Mustafa et al. 2022, section 2.2): local, and global.

    The mean entropy of its tokens' scores, which is to be small; and `max(0, threshold - H)`, H being the entropy of
    their mean: its tokens use `exp(threshold)` experts at least. Both 0 where it has no tokens.

    Args:
      own_GT: which tokens are valid and of the modality.
    """
    local = _mean(_entropy(scores_GTE)[..., None], own_GT)[0]
    among = _entropy(_mean(scores_GTE, own_GT))
    return local, jnp.where(own_GT.any(), jnp.maximum(0, threshold - among), 0)


def _entropy(p: jax.Array) -> jax.Array:
    return -jax.scipy.special.xlogy(p, jnp.maximum(p, 1e-30)).sum(axis=-1)


def _mean(x_GTE: jax.Array, valid_GT: jax.Array) -> jax.Array:
    """Return the mean over the tokens that count, `[E]`."""
    total: Any = jnp.where(valid_GT[..., None], x_GTE, 0).sum(axis=(0, 1))
    return jnp.asarray(total / jnp.maximum(valid_GT.sum(), 1))

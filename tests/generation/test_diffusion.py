"""Diffusion against its formulas, and its sampler against data whose best prediction is known."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.generation.diffusion import TARGETS, Diffusion
from mmjax.nn.positions import time_features

pytestmark = pytest.mark.usefixtures("x64")


def levels(target: str, t: float) -> tuple[float, float]:
    if target == "flow":
        return 1 - t, t
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0.0)]
    return math.sqrt(f[0] / f[1]), math.sqrt(1 - f[0] / f[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_noise_and_what_is_predicted(target: str, t: float) -> None:
    x, e = np.random.default_rng(0).normal(size=(2, 3, 4))
    alpha, sigma = levels(target, t)
    process = Diffusion(target)
    x_t = process.noised(jnp.asarray(x), jnp.asarray(e), jnp.full(3, t))
    np.testing.assert_allclose(x_t, alpha * x + sigma * e, rtol=1e-12)
    wanted = process.target(jnp.asarray(x), jnp.asarray(e), jnp.full(3, t))
    expected = {"epsilon": e, "v": alpha * e - sigma * x, "flow": e - x}[target]
    np.testing.assert_allclose(wanted, expected, rtol=1e-12)
    for found, true in zip(process.resolved(wanted, x_t, jnp.full(3, t)), (x, e), strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-10)


def test_each_row_has_a_time_of_its_own() -> None:
    x = jnp.ones((2, 3, 3))
    x_t = Diffusion("flow").noised(x, jnp.zeros_like(x), jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(x_t[:, 0, 0], [0.75, 0.25])


@pytest.mark.parametrize("target", TARGETS)
def test_the_best_prediction_of_normal_data_leads_to_normal_data(target: str) -> None:
    """x ~ N(m, s^2): E[x | x_t] is linear, and the sampler must end in that distribution."""
    mean, spread, process = 0.3, 0.5, Diffusion(target)

    def predict(x_t: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        alpha, sigma = process.levels(t)
        variance = (alpha * spread) ** 2 + sigma**2
        x = mean + alpha * spread**2 / variance * (x_t - alpha * mean)
        e = (x_t - alpha * x) / jnp.maximum(sigma, 1e-12)
        return process.target(x, e, t)

    noise = np.random.default_rng(0).normal(size=20000)
    found = process.sample(predict, jnp.asarray(noise), steps=400)
    assert abs(found.mean() - mean) < 0.02 and abs(found.std() / spread - 1) < 0.02
    # Deterministic and monotone: another draw of the same noise is the same data.
    np.testing.assert_array_equal(np.argsort(noise), np.argsort(found))


def test_ancestral_sampling_against_the_posterior_of_ddpm() -> None:
    """Ho et al. 2020, eq. 7, in their discrete terms: betas and products of alphas, in a loop over steps."""
    steps, rng = 6, np.random.default_rng(1)
    noise, extra = rng.normal(size=(3, 4)), rng.normal(size=(steps, 3, 4))
    t = np.linspace(1, 0, steps + 1)
    bars = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    bars[0] = 1e-6  # the least alpha is 1e-3
    x = noise
    for at in range(steps):
        bar, before = bars[at], bars[at + 1]
        beta = 1 - bar / before
        e = np.tanh(x) + t[at]
        data = (x - np.sqrt(1 - bar) * e) / np.sqrt(bar)
        mean = np.sqrt(before) * beta / (1 - bar) * data
        mean += np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
        x = mean + np.sqrt((1 - before) / (1 - bar) * beta) * extra[at]
    found = Diffusion("epsilon", "ddpm").sample(
        lambda x, t, step: jnp.tanh(x) + t,
        jnp.asarray(noise),
        steps,
        fresh=lambda step: jnp.asarray(extra)[step],
    )
    np.testing.assert_allclose(found, x, rtol=1e-8)


@pytest.mark.parametrize("target", TARGETS)
def test_ancestral_sampling_leads_to_normal_data_too(target: str) -> None:
    mean, spread, process = 0.3, 0.5, Diffusion(target, "ddpm")

    def predict(x_t: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        alpha, sigma = process.levels(t)
        variance = (alpha * spread) ** 2 + sigma**2
        x = mean + alpha * spread**2 / variance * (x_t - alpha * mean)
        e = (x_t - alpha * x) / jnp.maximum(sigma, 1e-12)
        return process.target(x, e, t)

    def fresh(step: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (20000,))

    noise = jnp.asarray(np.random.default_rng(0).normal(size=20000))
    found = process.sample(predict, noise, steps=400, fresh=fresh)
    assert abs(found.mean() - mean) < 0.02 and abs(found.std() / spread - 1) < 0.02
    assert abs(np.corrcoef(found, noise)[0, 1]) < 0.1  # the noise that it began from is forgotten


def test_a_bound_holds_for_what_comes_out() -> None:
    noise = jnp.asarray(np.random.default_rng(0).normal(size=100))

    def predict(x_t: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        return -5 * jnp.ones_like(x_t)

    found = Diffusion("v").sample(predict, noise, 4, bound=1.0)
    assert jnp.abs(found).max() <= 1 + 1e-6
    assert jnp.abs(Diffusion("v").sample(predict, noise, 4)).max() > 1


def test_times_have_features_of_their_own() -> None:
    found = time_features(jnp.linspace(0, 1, 50), 16)
    assert found.shape == (50, 16)
    expected = [
        math.sin(1000 * 1 / 49 * 1e4 ** (-3 / 8)),
        math.cos(1000 * 1 / 49 * 1e4 ** (-3 / 8)),
    ]
    np.testing.assert_allclose(found[1, [3, 11]], expected, rtol=1e-9)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + 9 * np.eye(50)
    assert distances.min() > 0.1


def test_an_unknown_target() -> None:
    with pytest.raises(UserError, match="Unknown diffusion prediction 'eps'"):
        Diffusion("eps")

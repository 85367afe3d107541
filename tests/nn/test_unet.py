"""U-Net adapters against NumPy, and what a token reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.unet import Convolution, UNet, _doubled, _halved

pytestmark = pytest.mark.usefixtures("x64")


def random(declaration: Declaration) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        n: jnp.asarray(rng.normal(size=s.shape) / 3, jnp.float64)
        for n, s in declaration.specs.items()
    }


def test_a_convolution_is_the_sum_over_its_window() -> None:
    declaration = Declaration(Convolution(3, 2, 4))
    p = random(declaration)
    x = np.random.default_rng(1).normal(size=(1, 5, 4, 2))
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    kernel = np.asarray(p["kernel"])
    wanted = np.zeros((1, 5, 4, 4)) + np.asarray(p["bias"])
    for dy in range(3):
        for dx in range(3):
            wanted += padded[:, dy : dy + 5, dx : dx + 4] @ kernel[dy, dx]
    np.testing.assert_allclose(declaration.merge(p)(jnp.asarray(x)), wanted, rtol=1e-10)


def test_halving_gathers_two_by_two_and_doubling_undoes_it() -> None:
    x = np.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    halved = np.asarray(_halved(jnp.asarray(x)))
    np.testing.assert_array_equal(halved[0, 1, 0], x[0, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(_doubled(jnp.asarray(halved)), x)


def test_down_and_up_again() -> None:
    declaration = Declaration(UNet(4, 2, 6))
    model = declaration.merge(random(declaration))
    x, time = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.ones((2, 6))
    features = model.encode(x, time)
    assert features.tokens_BSD.shape == (2, 4, 6)
    assert [s.shape[1:3] for s in features.skips] == [(8, 8), (4, 4), (2, 2)]
    up = model.decode(features.tokens_BSD, features, time)
    assert up.shape == x.shape
    # Rows know nothing of each other, and the skips are read.
    other = model.encode(x.at[1].add(1), time)
    np.testing.assert_array_equal(other.tokens_BSD[0], features.tokens_BSD[0])
    assert not np.allclose(model.decode(features.tokens_BSD, other, time)[1], up[1])
    assert not np.allclose(model.decode(features.tokens_BSD, features, 2 * time), up)


def test_it_begins_as_nothing_on_the_way_up() -> None:
    declaration = Declaration(UNet(2, 2, 4))
    model = declaration.merge(jax.jit(declaration.initialise)(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 3), jnp.float32)
    time = jnp.ones((1, 4), jnp.float32)
    features = model.encode(x, time)
    assert float(jnp.abs(features.tokens_BSD).max()) > 0
    assert not model.decode(features.tokens_BSD, features, time).any()


@pytest.mark.parametrize("patch", [1, 3, 6])
def test_a_patch_that_is_no_power_of_two(patch: int) -> None:
    with pytest.raises(UserError, match=f"found patch {patch}"):
        UNet(patch, 4, 8)

"""Dense layers and norms against NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.parameters import Declaration
from mmjax.nn.dense import Dense, LayerNorm, Mlp, matmul, mlp_of, norm_of


def built(module: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the layer as a compiled function, and its parameters: random, so that biases count too."""
    declaration, rng = Declaration(module), np.random.default_rng(0)
    p = {name: rng.normal(size=spec.shape) for name, spec in declaration.specs.items()}
    call = jax.jit(lambda p, x: declaration.merge(p)(x))
    return lambda x: call(p, x), p


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(2.0, 1.5, size=shape)


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """Compute for each vector: less its mean, over the root of variance plus 1e-6."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        mean = sum(x[index]) / x.shape[-1]
        variance = sum((v - mean) ** 2 for v in x[index]) / x.shape[-1]
        out[index] = (x[index] - mean) / (variance + 1e-6) ** 0.5
    return out * scale + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_dense_is_x_w_plus_b(x64: None, lead: tuple[int, ...]) -> None:
    layer, p = built(Dense(4, 6, ("embed", "mlp")))
    x = inputs(*lead, 4)
    expected = np.einsum("...i,io->...o", x, p["kernel"]) + p["bias"]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12)


def test_dense_without_bias_has_none(x64: None) -> None:
    layer, p = built(Dense(4, 6, (None, "mlp"), bias=False))
    assert set(p) == {"kernel"}
    np.testing.assert_allclose(layer(inputs(3, 4)), inputs(3, 4) @ p["kernel"], rtol=1e-12)


def test_dense_begins_with_variance_one_over_its_inputs_and_no_bias() -> None:
    start = jax.jit(Declaration(Dense(400, 100, (None, None))).initialise)(0)
    # 40,000 draws: the standard deviation is known to about 0.4 %.
    np.testing.assert_allclose(np.std(start["kernel"]), 400**-0.5, rtol=0.02)
    assert abs(np.mean(start["kernel"])) < 4 * 400**-0.5 / 200
    assert not np.any(start["bias"])


def test_axes_follow_the_matrix_and_only_matrices_decay() -> None:
    specs = Declaration(Dense(4, 6, ("embed", "mlp"))).specs
    assert specs["kernel"].axes == ("embed", "mlp") and specs["bias"].axes == ("mlp",)
    assert specs["kernel"].decay and not specs["bias"].decay
    assert not specs["kernel"].keep_dtype and not specs["bias"].keep_dtype


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_against_its_definition(x64: None, bias: bool) -> None:
    layer, p = built(LayerNorm(6, bias))
    assert set(p) == ({"scale", "bias"} if bias else {"scale"})
    x = inputs(2, 3, 6) * [[[1.0], [1e-3], [1e3]]]  # eps counts in the small ones
    expected = layer_norm(x, p["scale"], p.get("bias", 0.0))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-9)


def test_layer_norm_of_a_constant_vector_is_its_bias(x64: None) -> None:
    layer, p = built(LayerNorm(6))
    out, gradient = jax.value_and_grad(lambda x: layer(x).sum())(np.full((6,), 7.0))
    np.testing.assert_allclose(out, p["bias"].sum(), rtol=1e-12)
    assert np.isfinite(gradient).all()


def test_layer_norm_of_bfloat16_computes_wider() -> None:
    layer, _ = built(LayerNorm(64))
    x = jnp.asarray(20 + inputs(16, 64), jnp.bfloat16)
    out = layer(x)
    assert out.dtype == jnp.bfloat16
    # One rounding at the end: half a unit in the last of 8 bits.
    exact = layer(np.asarray(x, np.float32))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8, atol=1e-6)


def test_norms_begin_as_one_and_zero_and_stay_in_the_parameter_dtype() -> None:
    declaration = Declaration(LayerNorm(6))
    start = declaration.initialise(0)
    np.testing.assert_array_equal(start["scale"], np.ones(6))
    np.testing.assert_array_equal(start["bias"], np.zeros(6))
    assert all(spec.keep_dtype and not spec.decay for spec in declaration.specs.values())
    small = Declaration(LayerNorm(6, scale=0.05)).initialise(0)
    np.testing.assert_allclose(small["scale"], np.full(6, 0.05), rtol=1e-6)


@pytest.mark.parametrize(("bias", "n_out"), [(True, None), (False, 3)])
def test_mlp_against_its_definition(x64: None, bias: bool, n_out: int | None) -> None:
    layer, p = built(Mlp(4, 7, bias, n_out))
    hidden = gelu(inputs(2, 5, 4) @ p["up/kernel"] + p.get("up/bias", 0.0))
    expected = hidden @ p["down/kernel"] + p.get("down/bias", 0.0)
    assert expected.shape[-1] == (n_out or 4)
    np.testing.assert_allclose(layer(inputs(2, 5, 4)), expected, rtol=1e-10)


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("kind", "function"), [("swiglu", swish), ("geglu", gelu)])
def test_gated_mlp_against_its_definition(x64: None, kind: str, function: Any) -> None:
    layer, p = built(mlp_of(kind, 4, 7, False))
    x = inputs(2, 5, 4)
    expected = (function(x @ p["gate/kernel"]) * (x @ p["up/kernel"])) @ p["down/kernel"]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-10)


@pytest.mark.parametrize(("n_in", "n_out"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("lead", [(), (7,), (2, 7)])
def test_a_product_and_its_gradients_are_those_of_matmul(
    x64: None, lead: tuple[int, ...], n_in: int, n_out: int
) -> None:
    rng = np.random.default_rng(0)
    x, kernel, g = (rng.normal(size=s) for s in ((*lead, n_in), (n_in, n_out), (*lead, n_out)))
    (y, back), (wanted, wanted_back) = (
        jax.vjp(f, jnp.asarray(x), jnp.asarray(kernel)) for f in (matmul, jnp.matmul)
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-13)
    for found, expected in zip(back(jnp.asarray(g)), wanted_back(jnp.asarray(g)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("n_in", "n_out", "first"), [(3, 5, 3), (5, 3, 3)])
def test_the_narrower_is_laid_out_by_columns(n_in: int, n_out: int, first: int) -> None:
    """It stands first in the product over the rows, which is the only one over them."""
    x, kernel = jnp.ones((7, n_in)), jnp.ones((n_in, n_out))
    traced = jax.make_jaxpr(lambda x, k, g: jax.vjp(matmul, x, k)[1](g))(
        x, kernel, jnp.ones((7, n_out))
    )
    lefts = [
        eqn.invars[0].aval.shape
        for eqn in traced.jaxpr.eqns
        if eqn.primitive.name == "dot_general"
        and eqn.params["dimension_numbers"][0] == ((0,), (0,))
    ]
    assert lefts == [(7, first)]


@pytest.mark.parametrize(("kind", "count"), [("gelu", 1), ("swiglu", 2), ("geglu", 2)])
def test_of_the_hidden_layer_only_products_are_kept(kind: str, count: int) -> None:
    mlp = mlp_of(kind, 4, 16, False)
    declaration = Declaration(mlp)
    parameters = declaration.initialise(0)

    def call(parameters: Any, x: Any) -> Any:
        return declaration.merge(parameters)(x)

    back = jax.vjp(call, parameters, jnp.ones((8, 4)))[1]
    kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "shape", ()) == (8, 16)]
    assert len(kept) == count


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_of_a_norm_only_what_goes_in_is_kept(kind: str) -> None:
    norm = norm_of(kind, 4)
    declaration = Declaration(norm)
    back = jax.vjp(
        lambda p, x: declaration.merge(p)(x), declaration.initialise(0), jnp.ones((8, 4))
    )[1]
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(back)]
    assert shapes.count((8, 4)) == 1 and (8, 1) not in shapes


def test_the_exact_gelu_and_clips_quick_one() -> None:
    """`x (1 + erf(x / sqrt 2)) / 2` and `x / (1 + exp(-1.702 x))`, by the standard library."""
    x = [-3.0, -1.0, -0.2, 0.0, 0.7, 2.5]
    expected = {
        "gelu_exact": [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x],
        "quick_gelu": [v / (1 + math.exp(-1.702 * v)) for v in x],
    }
    for kind, values in expected.items():
        mlp = mlp_of(kind, 1, 1, True)
        np.testing.assert_allclose(mlp.activation(np.asarray(x, np.float32)), values, atol=1e-6)

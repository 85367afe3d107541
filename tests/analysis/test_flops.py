"""FLOPs against hand counts, XLA's count where it has one, and the jaxpr of the real gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mmjax.analysis.flops import count, model_flops, train_flops

D, L = 8, 3
TOKENS = 10
DENSE = 2 * TOKENS * D * D  # one (tokens, D) @ (D, D)


def sd(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X = sd(TOKENS, D)


def of_real_gradient(loss: Callable[..., Any], params: Any, *args: Any) -> int:
    """Return the independent count: dot products in the jaxpr of the actual backward pass."""
    return model_flops(jax.value_and_grad(loss), params, *args)


# Forward counts.


def compiled_flops(compiled: Any) -> float:
    """Return XLA's own count for an executable without loops, rematerialisation and custom kernels."""
    analysis = compiled.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list | tuple) else analysis)["flops"])


def test_matmul_is_two_m_n_k() -> None:
    assert model_flops(jnp.matmul, sd(3, 5), sd(5, 7)) == 2 * 3 * 5 * 7
    assert model_flops(jnp.matmul, np.ones((3, 5)), np.ones(5)) == 2 * 3 * 5


@pytest.mark.parametrize(
    ("equation", "a", "b", "expected"),
    [
        ("bij,bjk->bik", (4, 2, 3), (4, 3, 5), 2 * 4 * 2 * 3 * 5),
        ("ij,jk->ki", (2, 3), (3, 5), 2 * 2 * 3 * 5),
        ("bshk,bthk->bhst", (2, 5, 3, 4), (2, 6, 3, 4), 2 * 2 * 3 * 5 * 6 * 4),
        ("ij,ij->", (2, 3), (2, 3), 2 * 6),
        ("i,j->ij", (2,), (3,), 2 * 6),
    ],
)
def test_einsum(equation: str, a: Any, b: Any, expected: int) -> None:
    assert model_flops(lambda a, b: jnp.einsum(equation, a, b), sd(*a), sd(*b)) == expected


def test_only_dot_products_count() -> None:
    assert model_flops(lambda x: jnp.sort(jnp.exp(x) + jnp.cumsum(x)).sum(), sd(8)) == 0


def test_complex_products_are_four_real_ones() -> None:
    z = sd(3, 3, dtype=jnp.complex64)
    assert model_flops(jnp.matmul, z, z) == 4 * model_flops(jnp.matmul, sd(3, 3), sd(3, 3))


def test_dead_products_do_not_count() -> None:
    def fun(x: Any, w: Any) -> Any:
        x @ w
        return jax.jit(lambda x: (x @ w, x))(x)[1]

    assert model_flops(fun, X, sd(D, D)) == 0


def test_scan_is_the_unrolled_loop() -> None:
    def rolled(x: Any, ws: Any) -> Any:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def unrolled(x: Any, ws: Any) -> Any:
        for i in range(L):
            x = jnp.tanh(x @ ws[i])
        return x

    ws = sd(L, D, D)
    assert model_flops(rolled, X, ws) == model_flops(unrolled, X, ws) == L * DENSE


def test_scans_nest_and_leave_out_what_no_iteration_needs() -> None:
    def fun(x: Any, w: Any) -> Any:
        def inner(carry: Any, _: None) -> Any:
            return (carry[0] @ w, carry[1] @ w), None

        def outer(x: Any, _: None) -> Any:
            return lax.scan(inner, (x, x), None, length=4)[0][0], None

        return lax.scan(outer, x, None, length=5)[0]

    assert model_flops(fun, X, sd(D, D)) == 5 * 4 * DENSE


def test_vmap() -> None:
    def fun(x: Any, w: Any) -> Any:
        return jax.vmap(jnp.matmul, in_axes=(0, None))(x, w)

    assert model_flops(fun, sd(7, 3, 5), sd(5, 2)) == 2 * 7 * 3 * 5 * 2


def test_ragged_dot_sends_each_row_to_one_group() -> None:
    sizes = sd(3, dtype=jnp.int32)
    assert model_flops(lax.ragged_dot, sd(10, 4), sd(3, 4, 6), sizes) == 2 * 10 * 4 * 6


@pytest.mark.parametrize("length", [0, 10])
def test_fori_loop_with_constant_bounds(length: int) -> None:
    found = count(lambda x, w: lax.fori_loop(0, length, lambda i, x: x @ w, x), X, sd(D, D))
    assert (found.flops, found.uncounted) == (length * DENSE, ())


WHILES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Any, int]] = {
    "below": (lambda i: i < 10, lambda i: i + 1, 0, 10),
    "up to": (lambda i: i <= 10, lambda i: 1 + i, 0, 11),
    "in threes": (lambda i: i < 10, lambda i: i + 3, 1, 3),
    "never": (lambda i: i < 10, lambda i: i + 1, 12, 0),
}


@pytest.mark.parametrize("case", sorted(WHILES))
def test_while_loops_with_a_constant_count(case: str) -> None:
    again, step, start, trips = WHILES[case]

    def fun(x: Any, w: Any) -> Any:
        return lax.while_loop(lambda c: again(c[0]), lambda c: (step(c[0]), c[1] @ w), (start, x))

    found = count(fun, X, sd(D, D))
    assert (found.flops, found.uncounted) == (trips * DENSE, ())
    ran = jax.jit(lambda: lax.while_loop(lambda c: again(c[0]), lambda c: (step(c[0]), c[1] + 1),
                                         (start, 0)))()[1]  # fmt: skip
    assert trips == ran


def test_a_while_loop_bounded_by_an_operand_it_does_not_change() -> None:
    def fun(x: Any, w: Any) -> Any:
        return lax.fori_loop(jnp.int32(2), jnp.int32(9), lambda i, x: x @ w, x)

    assert model_flops(fun, X, sd(D, D)) == 7 * DENSE


UNKNOWN: dict[str, Callable[[Any, Any, Any], Any]] = {
    "bound": lambda x, w, n: lax.fori_loop(0, n, lambda i, x: x @ w, x),
    "start": lambda x, w, n: lax.fori_loop(n, 9, lambda i, x: x @ w, x),
    "step": lambda x, w, n: lax.while_loop(
        lambda c: c[0] < 9, lambda c: (c[0] + n, c[1] @ w), (0, x)
    )[1],
    "backwards": lambda x, w, n: lax.while_loop(
        lambda c: c[0] < 9, lambda c: (c[0] + -1, c[1] @ w), (0, x)
    )[1],
    "product": lambda x, w, n: lax.while_loop(
        lambda c: c[0] < 9, lambda c: (c[0] * 2, c[1] @ w), (1, x)
    )[1],
    "moving bound": lambda x, w, n: lax.while_loop(
        lambda c: c[0] < c[2], lambda c: (c[0] + 1, c[1] @ w, c[2] - 1), (0, x, 9)
    )[1],
    "value": lambda x, w, n: lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ w, x),
}


@pytest.mark.parametrize("case", sorted(UNKNOWN))
def test_a_while_loop_of_unknown_length_counts_once_and_says_so(case: str) -> None:
    found = count(UNKNOWN[case], X, sd(D, D), sd(dtype=jnp.int32))
    assert found.flops == DENSE
    assert found.uncounted == ("while loop of unknown length: counted once",)


def test_cond_counts_its_largest_branch() -> None:
    def fun(i: Any, x: Any, w: Any) -> Any:
        return lax.switch(i, [lambda: x, lambda: x @ w @ w, lambda: x @ w])

    assert model_flops(fun, sd(dtype=jnp.int32), X, sd(D, D)) == 2 * DENSE


def test_linear_algebra_inside_an_unknown_equation_counts_once_and_says_so() -> None:
    def fun(a: Any, x: Any) -> Any:
        return lax.custom_linear_solve(lambda x: a @ x, x, lambda _, b: a @ b, symmetric=True)

    found = count(fun, sd(D, D), sd(D))
    assert found.flops > 0
    assert found.uncounted == ("custom_linear_solve: counted once",)


def test_custom_partitioning_counts_its_inside() -> None:
    from jax.experimental.custom_partitioning import custom_partitioning

    fun = custom_partitioning(lambda x, w: x @ w)
    fun.def_partition(partition=lambda *_: None, sharding_rule="i j, j k -> i k")
    assert model_flops(fun, X, sd(D, D)) == DENSE


def test_kernels_count_what_they_state() -> None:
    from jax.experimental import pallas as pl

    def kernel(a: Any, b: Any, out: Any) -> None:
        out[...] = a[...] @ b[...]

    def fun(cost: Any) -> Any:
        call = pl.pallas_call(kernel, out_shape=sd(4, 4), name="mine", cost_estimate=cost)
        return count(call, sd(4, 4), sd(4, 4))

    silent = fun(None)
    assert silent.flops == 0 and silent.uncounted[0].startswith("pallas_call")
    stated = fun(pl.CostEstimate(flops=128, transcendentals=0, bytes_accessed=1))
    assert (stated.flops, stated.uncounted) == (128, ())


# Convolutions.

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "valid": {"padding": "VALID"},
    "same": {"padding": "SAME"},
    "patches": {"padding": "VALID", "window_strides": (3, 3)},
    "stride": {"padding": "SAME", "window_strides": (2, 2)},
    "grouped": {"padding": "SAME", "feature_group_count": 2},
    "depthwise": {"padding": "SAME", "feature_group_count": 4},
    "batch groups": {"padding": "SAME", "batch_group_count": 2},
    "dilated": {"padding": "SAME", "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((2, 2), (1, 3)), "lhs_dilation": (2, 3)},
    "cropped": {"padding": ((-1, 2), (0, -2)), "window_strides": (2, 1)},
    "everything": {
        "padding": ((2, 1), (-1, 3)),
        "window_strides": (2, 3),
        "lhs_dilation": (3, 2),
        "rhs_dilation": (2, 2),
        "feature_group_count": 2,
    },
}
NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(case: str, x: Any, kernel: Any) -> Any:
    settings = {"window_strides": (1, 1)} | CONVOLUTIONS[case]
    return lax.conv_general_dilated(x, kernel, dimension_numbers=NHWC, **settings)


def kernel_of(case: str) -> jax.ShapeDtypeStruct:
    return sd(3, 2, 4 // CONVOLUTIONS[case].get("feature_group_count", 1), 8)


IMAGE = sd(2, 11, 9, 4)


def test_convolution_without_padding_by_hand() -> None:
    """Output (9, 8); 3 * 2 taps."""
    assert model_flops(lambda x, k: convolve("valid", x, k), IMAGE, kernel_of("valid")) == (
        2 * 2 * (9 * 8) * (3 * 2) * 4 * 8
    )


def test_patches_are_a_matrix_product() -> None:
    """Windows (3, 2) at stride 3: 3 rows and 3 columns of patches."""
    found = model_flops(lambda x, k: convolve("patches", x, k), IMAGE, kernel_of("patches"))
    assert found == 2 * (2 * 3 * 3) * (3 * 2 * 4) * 8


def test_grouped_convolution_by_hand() -> None:
    """No padding in one dimension: 9 outputs of 3 taps over 2 of the 4 features each."""

    def fun(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(
            x, k, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
        )

    assert model_flops(fun, sd(2, 11, 4), sd(3, 2, 6)) == 2 * 2 * 9 * 3 * 2 * 6


def test_padding_is_no_work() -> None:
    """Three taps over 5 elements, padded by one at both ends: 3 * 5 - 2 pairs meet."""

    def fun(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    assert model_flops(fun, sd(1, 5, 1), sd(3, 1, 1)) == 2 * (3 * 5 - 2)


@pytest.mark.parametrize("case", sorted(CONVOLUTIONS))
def test_convolutions_agree_with_the_compiler_and_with_their_gradient(case: str) -> None:
    def fun(x: Any, kernel: Any) -> Any:
        return convolve(case, x, kernel)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(convolve(case, x @ params["mix"], params["kernel"]) ** 2)

    kernel = kernel_of(case)
    forward = model_flops(fun, IMAGE, kernel)
    assert forward == compiled_flops(jax.jit(fun).lower(IMAGE, kernel).compile())
    params = {"mix": sd(4, 4), "kernel": kernel}
    mix = 2 * 2 * 11 * 9 * 4 * 4
    expected = 3 * forward + 2 * mix
    assert train_flops(loss, params, IMAGE) == expected == of_real_gradient(loss, params, IMAGE)


# The compiler's own count.


def test_compiled_flops_counts_a_loop_body_once() -> None:
    """The limitation that its docstring states; a compiler that fixes it should be noticed."""

    def fun(x: Any, ws: Any) -> Any:
        return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    found = [
        compiled_flops(jax.jit(fun).lower(X, sd(length, D, D)).compile()) for length in (4, 32)
    ]
    assert found[0] == found[1]
    assert DENSE <= (found[0] or 0) < 2 * DENSE


def test_compiled_flops_of_a_product() -> None:
    compiled = jax.jit(jnp.matmul).lower(sd(16, 32), sd(32, 8)).compile()
    assert compiled_flops(compiled) == 2 * 16 * 32 * 8

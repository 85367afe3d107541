"""Dead-code elimination over jaxprs, against what the functions plainly need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mmjax.analysis.jaxprs import Liveness, opened, scan_split


def needed(fun: Callable[..., Any], inputs: int, *wanted: bool) -> tuple[bool, ...]:
    """Return which of `inputs` scalars the wanted outputs of `fun` need."""
    jaxpr = opened(jax.make_jaxpr(fun)(*[jax.ShapeDtypeStruct((), jnp.float32)] * inputs))
    return Liveness().inputs(jaxpr, wanted)


def test_an_unwanted_output_needs_nothing() -> None:
    def fun(a: Any, b: Any) -> Any:
        return jnp.sin(a), b * 2.0

    assert needed(fun, 2, True, False) == (True, False)
    assert needed(fun, 2, False, True) == (False, True)


def test_a_call_is_followed_output_by_output() -> None:
    @jax.jit
    def inner(a: Any, b: Any) -> Any:
        return a + 1.0, b + 1.0

    assert needed(lambda a, b: inner(a, b)[1], 2, True) == (False, True)


def test_a_carry_reaches_the_result_through_several_iterations() -> None:
    """c <- d, b <- c, a <- b: three iterations bring d to a, and the analysis must walk them."""

    def fun(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            a, b, c, d, e = carry
            return (a + b, c, d, d, e), None

        return lax.scan(body, (a, b, c, d, e), None, length=5)[0][0]

    assert needed(fun, 5, True) == (True, True, True, True, False)


def test_a_scan_needs_the_carry_that_its_scanned_result_reads() -> None:
    def fun(a: Any, b: Any, c: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            a, b = carry
            return (a, b * 2.0), (a + x, b)

        return lax.scan(body, (a, b), jnp.stack([c, c]))[1]

    assert needed(fun, 3, True, False) == (True, False, True)
    assert needed(fun, 3, False, True) == (False, True, False)


def test_a_scan_of_no_length_returns_its_carries() -> None:
    def fun(a: Any, b: Any, c: Any) -> Any:
        return lax.scan(lambda carry, _: ((c, carry[1]), None), (a, b), None, length=0)[0]

    assert needed(fun, 3, True, False) == (True, False, False)


def test_a_while_loop_needs_what_its_condition_reads() -> None:
    def fun(a: Any, b: Any, c: Any, limit: Any) -> Any:
        def body(carry: Any) -> Any:
            a, b, c = carry
            return a + 1.0, b * 2.0, c * 3.0

        return lax.while_loop(lambda carry: carry[0] < limit, body, (a, b, c))[1]

    assert needed(fun, 4, True) == (True, True, False, True)


def test_a_conditional_needs_what_any_branch_needs() -> None:
    def fun(p: Any, a: Any, b: Any, c: Any) -> Any:
        return lax.cond(p > 0, lambda a, b, c: a, lambda a, b, c: b, a, b, c)

    assert needed(fun, 4, True) == (True, True, True, False)


def test_a_barrier_keeps_its_operands_apart() -> None:
    assert needed(lambda a, b: lax.optimization_barrier((a, b))[0], 2, True) == (True, False)


def test_a_print_is_needed_though_nobody_reads_it() -> None:
    def fun(a: Any, b: Any) -> Any:
        jax.debug.print("{}", b * 2.0)
        return a

    assert needed(fun, 2, True) == (True, True)


def test_needed_equations_come_in_order_and_leave_out_the_dead() -> None:
    def fun(a: Any) -> Any:
        jnp.cos(a)
        return jnp.tanh(jnp.sin(a))

    jaxpr = opened(jax.make_jaxpr(fun)(1.0))
    names = [eqn.primitive.name for eqn, _ in Liveness().equations(jaxpr, (True,))]
    assert names == ["sin", "tanh"]


def test_a_blocked_primitive_lets_no_need_pass() -> None:
    jaxpr = opened(jax.make_jaxpr(lambda a, b: jnp.sin(a) + b)(1.0, 1.0))
    assert Liveness(blocked=frozenset({"sin"})).inputs(jaxpr, (True,)) == (False, True)


@pytest.mark.parametrize(("consts", "carries", "scanned"), [(0, 1, 2), (2, 3, 0), (1, 1, 1)])
def test_scan_split(consts: int, carries: int, scanned: int) -> None:
    captured = [jnp.full((2,), float(i)) for i in range(consts)]

    def fun(captured: Any, init: Any, xs: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            extra = sum((c.sum() for c in captured), 0.0)
            return tuple(c + extra + sum(x, 0.0) for c in carry), x

        return lax.scan(body, init, xs, length=4)

    jaxpr = opened(
        jax.make_jaxpr(fun)(captured, (jnp.zeros(4),) * carries, (jnp.zeros(4),) * scanned)
    )
    eqn = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    assert scan_split(eqn) == (consts, carries)

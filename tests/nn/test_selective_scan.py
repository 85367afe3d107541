"""The selective scan against the plain recurrence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.nn import selective_scan as selective_scan_module
from mmjax.nn.selective_scan import Tokens, selective_scan

pytestmark = pytest.mark.usefixtures("x64")


def recurrence(a_EN: Any, t: Tokens) -> jax.Array:
    """Return the recurrence as it is written."""
    begins = jnp.zeros(t.x_BSE.shape[:2], bool) if t.begins_BS is None else t.begins_BS
    state, out = jnp.zeros((t.x_BSE.shape[0], *a_EN.shape)), []
    for s in range(t.x_BSE.shape[1]):
        state = jnp.where(begins[:, s, None, None], 0.0, state)
        write = (t.step_BSE[:, s] * t.x_BSE[:, s])[..., None] * t.in_BSN[:, s, None]
        state = jnp.exp(t.step_BSE[:, s, :, None] * a_EN) * state + write
        out.append(jnp.einsum("ben,bn->be", state, t.out_BSN[:, s]))
    return jnp.stack(out, axis=1)


def drawn(length: int) -> tuple[Any, Tokens]:
    rng = np.random.default_rng(length)
    x, step = (rng.normal(size=(2, length, 3)) for _ in range(2))
    b, c = (rng.normal(size=(2, length, 2)) for _ in range(2))
    begins = jnp.asarray(rng.random((2, length)) < 0.3)
    a = -jnp.exp(jnp.asarray(rng.normal(size=(3, 2))))
    return a, Tokens(*map(jnp.asarray, (x, np.abs(step), b, c)), begins)


@pytest.mark.parametrize("way", ["parallel", "serial"])
@pytest.mark.parametrize(("length", "chunk"), [(7, 3), (8, 4), (5, 16), (3, 1)])
def test_chunks_are_the_recurrence_forward_and_backward(length: int, chunk: int, way: str) -> None:
    a, given = drawn(length)
    floats = (a, given.x_BSE, given.step_BSE, given.in_BSN, given.out_BSN)

    def loss(scan: Any) -> Any:
        def value(floats: Any) -> Any:
            y = scan(floats[0], Tokens(*floats[1:], given.begins_BS))
            return jnp.sin(y).sum(), y

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    (_, plain), expected = loss(recurrence)(floats)
    (_, y), found = loss(lambda a, t: selective_scan(a, t, chunk, way))(floats)
    np.testing.assert_allclose(y, plain, rtol=1e-10, atol=1e-12)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)
        assert np.abs(two).max() > 0


def test_a_cpu_goes_one_by_one_and_another_platform_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, given = drawn(6)

    def traced() -> str:
        return str(jax.make_jaxpr(lambda a, t: selective_scan(a, t, 4))(a, given))

    serial = traced()
    monkeypatch.setattr(selective_scan_module, "platform", lambda: "tpu")
    parallel = traced()
    assert serial.count("scan[") == 2 and parallel.count("scan[") == 1
    with pytest.raises(ValueError, match="way is 'both'"):
        selective_scan(a, given, way="both")


@pytest.mark.parametrize("way", ["parallel", "serial"])
def test_gradients_hold_where_a_state_is_forgotten_at_once(way: str) -> None:
    """Steps so large that exp(step a) is 0: nothing divides by it."""
    a, given = drawn(6)
    given = given.replace(step_BSE=given.step_BSE + 2000.0)  # type: ignore[attr-defined]
    gradient = jax.grad(lambda a: selective_scan(a, given, 4, way).sum())(a)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("way", ["parallel", "serial"])
def test_states_of_one_chunk_at_a_time_are_held(way: str) -> None:
    """What the forward pass leaves for the backward one is a state per chunk, not one per token."""
    length, chunk, inner, state = 64, 8, 5, 7
    x, b = jnp.ones((1, length, inner)), jnp.ones((1, length, state))

    def largest(chunk: int) -> int:
        def left(x: Any) -> Any:
            return jax.vjp(
                lambda x: selective_scan(-jnp.ones((inner, state)), Tokens(x, x, b, b), chunk, way),
                x,
            )[1]

        return max(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(left, x)))

    assert largest(chunk) <= max(length * state, length // chunk * inner * state)
    assert largest(1) >= length * inner * state, "a chunk of one token holds every state"

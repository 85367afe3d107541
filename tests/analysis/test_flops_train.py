"""FLOPs of training steps, against hand counts and against the jaxpr of the real gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mmjax.analysis.flops import count, count_train, model_flops, train_flops
from mmjax.core.errors import UserError

B, S, D, F, L, H, K = 2, 5, 8, 12, 3, 2, 4
TOKENS = B * S
DENSE = 2 * TOKENS * D * D  # one (tokens, D) @ (D, D)


def sd(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X = sd(TOKENS, D)


def of_real_gradient(loss: Callable[..., Any], params: Any, *args: Any) -> int:
    """Return the independent count: dot products in the jaxpr of the actual backward pass."""
    return model_flops(jax.value_and_grad(loss), params, *args)


# Training counts.


def mlp(params: Any, x: Any) -> Any:
    return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"]) ** 2)


MLP = {"up": sd(D, F), "down": sd(F, D)}


def test_mlp_is_six_n_t_less_the_gradient_of_the_inputs() -> None:
    parameters = 2 * D * F
    inputs = 2 * TOKENS * D * F
    assert train_flops(mlp, MLP, X) == 6 * parameters * TOKENS - inputs


def test_mlp_is_six_n_t_when_the_inputs_depend_on_parameters() -> None:
    def loss(params: Any, x: Any) -> Any:
        return mlp(params["mlp"], x + params["position"])

    assert train_flops(loss, {"mlp": MLP, "position": sd(D)}, X) == 6 * 2 * D * F * TOKENS


def test_a_frozen_layer_by_hand() -> None:
    """Three layers of equal size; each runs forward; the last gives a gradient to its inputs and
    its kernel, the middle one, frozen, to its inputs alone, the first to its kernel alone."""

    def loss(params: Any, x: Any) -> Any:
        x = jnp.tanh(x @ params["first"])
        x = jnp.tanh(x @ lax.stop_gradient(params["middle"]))
        return jnp.sum(x @ params["last"])

    params = {name: sd(D, D) for name in ("first", "middle", "last")}
    assert train_flops(loss, params, X) == (3 + 2 + 1 + 1) * DENSE
    frozen = {"middle": params.pop("middle")}
    assert train_flops(lambda p, x: loss(p | frozen_ones(frozen), x), params, X) == 7 * DENSE


def frozen_ones(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return {name: jnp.ones(s.shape, s.dtype) for name, s in shapes.items()}


def test_a_frozen_encoder_has_no_backward_pass() -> None:
    def loss(params: Any, x: Any) -> Any:
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["encoder"])
        return jnp.sum(lax.stop_gradient(x) @ params["head"])

    params = {"encoder": sd(L, D, D), "head": sd(D, D)}
    assert train_flops(loss, params, X) == L * DENSE + 2 * DENSE


def test_frozen_leaves_of_a_scan_are_left_out_exactly() -> None:
    """Each layer: trained, frozen. Forward 2; both give a gradient to their inputs; one kernel."""

    def loss(params: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(jnp.tanh(x @ w["a"]) @ lax.stop_gradient(w["b"])), None

        return jnp.sum(lax.scan(layer, x * params["scale"], params["layers"])[0])

    params = {"scale": sd(D), "layers": {"a": sd(L, D, D), "b": sd(L, D, D)}}
    assert train_flops(loss, params, X) == L * (2 + 2 + 1) * DENSE
    assert of_real_gradient(loss, params, X) == L * (2 + 2 + 1) * DENSE


def layers_of(transform: Callable[[Any], Any], unroll: bool = False) -> Callable[..., Any]:
    def layer(x: Any, w: Any) -> Any:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    def loss(params: Any, x: Any) -> Any:
        x = x @ params["stem"]
        if unroll:
            for i in range(L):
                x, _ = transform(layer)(x, jax.tree.map(lambda w, i=i: w[i], params["layers"]))
        else:
            x, _ = lax.scan(transform(layer), x, params["layers"])
        return jnp.sum(x**2)

    return loss


LAYERS = {"stem": sd(D, D), "layers": {"up": sd(L, D, F), "down": sd(L, F, D)}}
REMATS: dict[str, Callable[[Any], Any]] = {
    "none": lambda f: f,
    "all": jax.checkpoint,
    "dots saved": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "twice": lambda f: jax.checkpoint(jax.checkpoint(f)),
    "no cse": lambda f: jax.checkpoint(f, prevent_cse=False),
    "jit": lambda f: jax.checkpoint(jax.jit(f)),
}


@pytest.mark.parametrize("remat", sorted(REMATS))
@pytest.mark.parametrize("unroll", [False, True])
def test_rematerialisation_and_unrolling_change_nothing(remat: str, unroll: bool) -> None:
    stem, layer = DENSE, 2 * 2 * TOKENS * D * F
    expected = 2 * stem + 3 * L * layer
    loss = layers_of(REMATS[remat], unroll)
    found = count_train(loss, LAYERS, X)
    assert (found.flops, found.as_written) == (expected, ())
    plain = layers_of(REMATS["none"], unroll)
    assert of_real_gradient(plain, LAYERS, X) == expected


def test_remat_around_the_scan_of_rematerialised_layers() -> None:
    outer = jax.checkpoint(layers_of(jax.checkpoint))
    assert train_flops(outer, LAYERS, X) == train_flops(layers_of(REMATS["none"]), LAYERS, X)


def test_a_gradient_counted_as_it_is_written_recomputes_and_says_so() -> None:
    """The counterpart: the backward pass of a rematerialised scan does hold the forward again."""
    found = count(jax.value_and_grad(layers_of(jax.checkpoint)), LAYERS, X)
    assert found.flops > train_flops(layers_of(jax.checkpoint), LAYERS, X)
    assert found.as_written == ("gradient of a rematerialised function inside the function",)


def attention(params: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, params[name]) for name in "qkv")
    logits = jnp.einsum("bshk,bthk->bhst", q, k) / K**0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((S, S), bool)), logits, -1e9))
    return jnp.einsum("bshk,hkd->bsd", jnp.einsum("bhst,bthk->bshk", weights, v), params["o"])


def test_attention_by_hand() -> None:
    """Three projections of the inputs (2 passes each: no gradient to the inputs), the logits, the
    weighted sum and the output projection (3 passes each)."""
    params = {name: sd(D, H, K) for name in "qkv"} | {"o": sd(H, K, D)}
    x = sd(B, S, D)
    projection = 2 * TOKENS * D * H * K
    product = 2 * B * H * S * S * K
    expected = 2 * 3 * projection + 3 * (2 * product + projection)

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(attention(params, x) ** 2)

    assert train_flops(loss, params, x) == expected == of_real_gradient(loss, params, x)
    assert model_flops(attention, params, x) == 4 * projection + 2 * product


def test_auxiliary_outputs_count_forward_only() -> None:
    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(x @ params["w"]), {"seen": x @ params["w"] @ params["w"]}

    params = {"w": sd(D, D)}
    forward = 3  # two of them equal; XLA may merge them, a count does not
    assert train_flops(loss, params, X, has_aux=True) == (forward + 1) * DENSE


def test_integer_leaves_are_not_differentiated() -> None:
    params = MLP | {"steps": sd(dtype=jnp.int32)}
    assert train_flops(mlp, params, X) == train_flops(mlp, MLP, X)


def test_mixture_of_experts() -> None:
    """Each token to one expert: 3 passes over (tokens, D, F) whatever the number of experts."""

    def loss(params: Any, x: Any, sizes: Any) -> Any:
        return jnp.sum(lax.ragged_dot(x * params["scale"], params["experts"], sizes))

    params = {"scale": sd(D), "experts": sd(4, D, F)}
    sizes = sd(4, dtype=jnp.int32)
    assert train_flops(loss, params, X, sizes) == 3 * 2 * TOKENS * D * F
    assert of_real_gradient(loss, params, X, sizes) == 3 * 2 * TOKENS * D * F


@jax.custom_vjp
def chunked(x: jax.Array, w: jax.Array) -> jax.Array:
    """Return sum(tanh(x @ w)), whose rule saves the inputs and repeats the product."""
    return jnp.sum(jnp.tanh(x @ w))


def _chunked_backward(saved: Any, g: Any) -> Any:
    x, w = saved
    slope = g * (1 - jnp.tanh(x @ w) ** 2)
    return slope @ w.T, x.T @ slope


chunked.defvjp(lambda x, w: (chunked(x, w), (x, w)), _chunked_backward)


def test_a_custom_backward_rule_counts_as_written_and_says_so() -> None:
    def loss(params: Any, x: Any) -> Any:
        return chunked(x * params["scale"], params["w"])

    found = count_train(loss, {"scale": sd(D), "w": sd(D, D)}, X)
    assert found.flops == (1 + 1 + 2) * DENSE
    assert found.as_written == ("backward rule _chunked_backward",)


def test_a_custom_rule_counts_only_the_gradients_somebody_needs() -> None:
    frozen = train_flops(lambda p, x: chunked(x, p["w"]), {"w": sd(D, D)}, X)
    assert frozen == (1 + 1 + 1) * DENSE
    unused = train_flops(
        lambda p, x: chunked(x, lax.stop_gradient(p["w"])) + jnp.sum(p["w"]), {"w": sd(D, D)}, X
    )
    assert unused == DENSE


def test_a_custom_rule_in_bfloat16_that_saves_a_key() -> None:
    @jax.custom_vjp
    def noisy(x: Any, w: Any, key: Any) -> Any:
        return x @ w + jax.random.normal(key, (), x.dtype)

    noisy.defvjp(
        lambda x, w, key: (noisy(x, w, key), (x, w, key)),
        lambda saved, g: (g @ saved[1].T, saved[0].T @ g * jax.random.uniform(saved[2]), None),
    )

    def loss(params: Any, x: Any, key: Any) -> Any:
        return jnp.sum(noisy(x * params["scale"], params["w"], key).astype(jnp.float32))

    params = {"scale": sd(D, dtype=jnp.bfloat16), "w": sd(D, D, dtype=jnp.bfloat16)}
    x, key = sd(TOKENS, D, dtype=jnp.bfloat16), jax.eval_shape(lambda: jax.random.key(0))
    assert train_flops(loss, params, x, key) == 3 * DENSE
    assert of_real_gradient(loss, params, x, key) == 3 * DENSE


def test_a_custom_rule_within_scan_vmap_remat_and_beside_integers() -> None:
    @jax.custom_vjp
    def product(x: Any, w: Any) -> Any:
        return x @ w, jnp.argmax(x)

    product.defvjp(
        lambda x, w: (product(x, w), (x, w)),
        lambda saved, g: (g[0] @ saved[1].T, saved[0].T @ g[0]),
    )

    def loss(params: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jax.checkpoint(jax.vmap(product, in_axes=(0, None)))(x, w)

        return jnp.sum(lax.scan(layer, x * params["scale"], params["w"])[0])

    params = {"scale": sd(D), "w": sd(L, D, D)}
    x = sd(B, S, D)
    assert train_flops(loss, params, x) == L * 3 * DENSE == of_real_gradient(loss, params, x)


# Manual sharding.

MESH = AbstractMesh((2, 4, 3), ("data", "tensor", "idle"), axis_types=(AxisType.Auto,) * 3)
P = PartitionSpec


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("custom", [False, True])
def test_shard_map_counts_every_shard_once(check_vma: bool, custom: bool) -> None:
    """Split over two axes and repeated over a third: the work of the whole product."""

    @jax.custom_vjp
    def own(x: Any, w: Any) -> Any:
        return x @ w

    own.defvjp(
        lambda x, w: (x @ w, (x, w)), _own_backward if check_vma else _own_backward_unchecked
    )

    def local(x: Any, w: Any) -> Any:
        return lax.psum(own(x, w) if custom else x @ w, "tensor")

    def loss(params: Any, x: Any) -> Any:
        mapped = jax.shard_map(
            local,
            mesh=MESH,
            in_specs=(P("data", "tensor"), P("tensor", None)),
            out_specs=P("data", None),
            check_vma=check_vma,
        )
        return jnp.sum(mapped(x * params["scale"], params["w"]))

    params = {"scale": sd(D), "w": sd(D, F)}
    found = count_train(loss, params, X)
    assert (found.flops, found.uncounted) == (3 * 2 * TOKENS * D * F, ())


def _own_backward(saved: Any, g: Any) -> Any:
    x, w = saved
    return g @ w.T, lax.psum(x.T @ g, "data")


def _own_backward_unchecked(saved: Any, g: Any) -> Any:
    x, w = saved
    return g @ w.T, x.T @ g


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_custom_rule_under_nested_shard_maps(check_vma: bool) -> None:
    """It is counted where values have no types, and otherwise reported rather than lost."""

    @jax.custom_vjp
    def own(x: Any, w: Any) -> Any:
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), _own_backward_unchecked)

    def nested(x: Any, w: Any) -> Any:
        specs: Any = {"in_specs": (P("tensor"), P()), "out_specs": P("tensor")}
        return jax.shard_map(own, **specs, axis_names={"tensor"}, check_vma=check_vma)(x, w)

    def loss(params: Any, x: Any) -> Any:
        specs: Any = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        mapped = jax.shard_map(nested, mesh=MESH, **specs, axis_names={"data"}, check_vma=check_vma)
        return jnp.sum(mapped(x * params["scale"], jnp.ones((D, D))))

    product = 2 * 16 * D * D
    found = count_train(loss, {"scale": sd(D)}, sd(16, D))
    if check_vma:
        assert found.flops == product
        assert found.uncounted == ("backward rule _own_backward_unchecked inside a shard_map",)
    else:
        assert (found.flops, found.uncounted) == (2 * product, ())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(UserError, match="scalar"):
        train_flops(lambda p, x: x @ p["w"], {"w": sd(D, D)}, X)


# Random chains against the real backward pass.

BLOCKS: dict[str, Callable[[Any, Any], Any]] = {
    "dense": lambda x, w: jnp.tanh(x @ w),
    "frozen": lambda x, w: jnp.tanh(x @ lax.stop_gradient(w)),
    "stopped": lambda x, w: lax.stop_gradient(x @ w),
    "gram": lambda x, w: jax.nn.softmax(x @ x.T) @ (x @ w),
    "twice": lambda x, w: (x @ w) * jax.nn.sigmoid(x @ w.T),
    "where": lambda x, w: jnp.where(x @ w > 0, x @ w @ w, 0.0),
    "argmax": lambda x, w: x[:, jnp.argmax(x @ w, axis=-1)[:D] % D] @ w,
    "scan": lambda x, w: lax.scan(lambda c, _: (jnp.sin(c @ w), c @ w), x, None, length=3)[0],
    "scanned sum": lambda x, w: lax.scan(lambda c, r: (c + r @ w, None), x[0], x)[0] + x,
    "cond": lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w),
    "solve": lambda x, w: x @ jnp.linalg.inv(w + 9 * jnp.eye(D)),
    "vmap": lambda x, w: jax.vmap(lambda r: r @ w)(x),
}


@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    chosen=st.sets(st.integers(0, 3)),
    shared=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_train_flops_is_the_count_of_the_real_gradient(
    blocks: list[str], chosen: set[int], shared: bool
) -> None:
    """Without rematerialisation the two agree; with it the one stays."""
    ones = jnp.ones((D, D))

    def loss(params: Any, x: Any, wrap: Callable[[Any], Any] = lambda f: f) -> Any:
        for i, block in enumerate(blocks):
            name = "w0" if shared else f"w{i}"
            x = x + wrap(BLOCKS[block])(x, params.get(name, ones))
        return jnp.mean(x**2)

    params = {f"w{i}": sd(D, D) for i in range(4) if i in chosen or i == 0}
    plain = train_flops(loss, params, X)
    assert plain == of_real_gradient(loss, params, X)
    assert plain == train_flops(lambda p, x: loss(p, x, jax.checkpoint), params, X)

"""The optimizer against an independent statement of AdamW in NumPy, leaf by leaf."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

from mmjax.core.errors import UserError
from mmjax.core.parameters import LayerStack, Spec, to_canonical
from mmjax.optim.algorithms.adafactor import Adafactor
from mmjax.optim.algorithms.adamw import Adamw
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.algorithms.lion import Lion
from mmjax.optim.algorithms.muon import Muon
from mmjax.optim.config import OptimizerConfig
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.views import UpdateScope

STEPS = 20
Values = dict[str, np.ndarray]


pytestmark = pytest.mark.usefixtures("x64")


def spec(name: str, shape: tuple[int, ...], decay: bool, stack: LayerStack | None = None) -> Spec:
    return Spec(name, shape, (None,) * len(shape), initializers.zeros, False, decay, stack)


LAYERS = LayerStack(first=0, stride=1, repeat=3, prefix="trunk/layers", inner="w")
SPECS = {
    "matrix": spec("matrix", (4, 5), True),
    "bias": spec("bias", (5,), False),
    "scale": spec("scale", (), False),
    "layers": spec("layers", (3, 4, 4), True, LAYERS),
}
CONFIG = OptimizerConfig(
    algorithm=Adamw(b1=0.8, b2=0.95, eps=1e-3),
    learning_rate=0.1, warmup=5, end_lr_ratio=0.1, weight_decay=0.3, clip=2.0,
)  # fmt: skip


def draws(seed: int, scale: float = 1.0) -> Values:
    rng = np.random.default_rng(seed)
    return {name: scale * rng.normal(size=s.shape) for name, s in SPECS.items()}


def gradients(step: int) -> Values:
    """Return gradients of norms on both sides of the bound of clipping."""
    grads = draws(100 + step)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    return {n: g * (3.0 if step % 3 else 0.5) / norm for n, g in grads.items()}


def made(config: OptimizerConfig, specs: Mapping[str, Spec] = SPECS) -> Optimizer:
    """Return an optimizer for one task that moves everything."""
    return Optimizer(
        config, specs, lambda _: STEPS, {"task": UpdateScope("shared", frozenset(specs))}
    )


def stepper(optimizer: Optimizer) -> Any:
    """Return `(grads, state, parameters, step) -> Updated`, compiled."""

    def update(grads: Any, state: Any, parameters: Any, step: Any) -> Any:
        return optimizer.update(grads, state, parameters, optimizer.rate("task", {"step": step}))

    return jax.jit(update)


def run(
    config: OptimizerConfig, steps: int = STEPS, specs: Mapping[str, Spec] = SPECS,
    grads: Any = gradients, start: Values | None = None,
) -> tuple[list[Values], dict[str, Any], list[dict[str, float]]]:  # fmt: skip
    """Return parameters after each step, the last state, and the metrics of each step."""
    optimizer = made(config, specs)
    parameters = {n: jnp.asarray(p) for n, p in (draws(0) if start is None else start).items()}
    state, update = optimizer.init(parameters), stepper(optimizer)
    path, metrics = [], []
    for step in range(steps):
        given = {n: jnp.asarray(g) for n, g in grads(step).items()}
        updated = update(given, state, parameters, jnp.int32(step))
        parameters, state = updated.parameters, updated.optimizer
        path.append({n: np.asarray(p) for n, p in parameters.items()})
        metrics.append({n: float(m) for n, m in updated.metrics.items()})
    return path, state, metrics


def rate(config: OptimizerConfig, step: int) -> float:
    """Return linear warm-up from 1/warmup of the peak, then half a cosine to `final` of it."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    part = min((step - config.warmup) / (STEPS - config.warmup), 1.0)
    if config.decay == "linear":
        return config.learning_rate * (1 + (config.end_lr_ratio - 1) * part)
    cosine = (1 + math.cos(math.pi * part)) / 2
    return config.learning_rate * (config.end_lr_ratio + (1 - config.end_lr_ratio) * cosine)


def adamw(config: OptimizerConfig, rates: Sequence[float]) -> list[Values]:
    """Compute as Loshchilov and Hutter (2019), algorithm 2, with the gradient's norm bounded first."""
    parameters, path = draws(0), []
    b1, b2, eps = 0.8, 0.95, 1e-3
    m = {n: np.zeros(s.shape) for n, s in SPECS.items()}
    v = {n: np.zeros(s.shape) for n, s in SPECS.items()}
    for t, rate in enumerate(rates, 1):
        grads = gradients(t - 1)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        if config.clip and norm > config.clip:
            grads = {n: g * config.clip / norm for n, g in grads.items()}
        for n, g in grads.items():
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g**2
            direction = (m[n] / (1 - b1**t)) / (np.sqrt(v[n] / (1 - b2**t)) + eps)
            decay = config.weight_decay * parameters[n] if n in ("matrix", "layers") else 0
            parameters[n] = parameters[n] - rate * (direction + decay)
        path.append(dict(parameters))
    return path


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"clip": 0.0},
        {"weight_decay": 0.0},
        {"warmup": 0},
        {"decay": "constant"},
        {"decay": "linear"},
    ],
    ids=str,
)
def test_adamw_is_the_published_one(changed: dict[str, Any]) -> None:
    config = OptimizerConfig(**{**vars(CONFIG), **changed})
    path, _, metrics = run(config)
    # Optax computes the rate in float32, so it is checked to that, and the rest with it to float64.
    rates = [m["learning_rate"] for m in metrics]
    np.testing.assert_allclose(rates, [rate(config, t) for t in range(STEPS)], rtol=1e-6)
    expected = adamw(config, rates)
    for step, name in itertools.product(range(STEPS), SPECS):
        found = path[step][name]
        np.testing.assert_allclose(found, expected[step][name], rtol=1e-11, atol=1e-12)
    # The control: each setting matters, so none of them can be ignored.
    if changed:
        other = adamw(CONFIG, [rate(CONFIG, t) for t in range(STEPS)])[-1]
        assert any(np.abs(path[-1][n] - other[n]).max() > 1e-3 for n in SPECS)


def test_weight_decay_is_on_matrices_only() -> None:
    """Without a gradient only the decay moves anything."""

    def still(_: int) -> Values:
        return {n: np.zeros(s.shape) for n, s in SPECS.items()}

    path, _, [metrics] = run(CONFIG, 1, grads=still)
    before = draws(0)
    for name in ("matrix", "layers"):
        factor = 1 - metrics["learning_rate"] * CONFIG.weight_decay
        np.testing.assert_allclose(path[0][name], before[name] * factor, rtol=1e-14)
    for name in ("bias", "scale"):
        assert np.array_equal(path[0][name], before[name])


def test_the_norm_is_over_all_leaves_and_before_clipping() -> None:
    _, _, metrics = run(CONFIG, 4)
    for step, reported in enumerate(metrics):
        flat = np.concatenate([g.ravel() for g in gradients(step).values()])
        np.testing.assert_allclose(reported["grad_norm"], np.linalg.norm(flat), rtol=1e-12)
    assert min(m["grad_norm"] for m in metrics) < CONFIG.clip < max(m["grad_norm"] for m in metrics)


def test_a_leaf_has_its_own_count_and_a_layer_too() -> None:
    _, state, metrics = run(CONFIG, 3)
    for name, s in SPECS.items():
        fields = {k: v.shape for k, v in state[name].items()}
        assert fields == {"count": s.shape[:1] if s.stack else (), "mu": s.shape, "nu": s.shape}
        assert np.array_equal(state[name]["count"], np.full(fields["count"], 3))
    assert len(metrics) == 3


def test_a_stacked_leaf_is_updated_as_its_layers_alone() -> None:
    """Another grouping of the layers must train the same model."""
    apart = {c: spec(c, (4, 4), True) for c in SPECS["layers"].canonical}
    rest = {n: s for n, s in SPECS.items() if n != "layers"}

    def split(values: Values) -> Values:
        return {n: np.asarray(x) for n, x in to_canonical(SPECS, values).items()}

    stacked, state, _ = run(CONFIG)
    alone, states, _ = run(
        CONFIG, specs=apart | rest, grads=lambda step: split(gradients(step)), start=split(draws(0))
    )
    for name, value in split(stacked[-1]).items():
        np.testing.assert_allclose(value, alone[-1][name], rtol=1e-13)
    held = to_canonical(SPECS, state)
    assert held.keys() == states.keys()
    for name in held:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), held[name], states[name]
        )


def test_adding_a_leaf_leaves_the_state_of_the_others_as_it_is() -> None:
    """Without clipping, which couples all gradients by design."""
    config = OptimizerConfig(**{**vars(CONFIG), "clip": 0.0})
    few = {n: s for n, s in SPECS.items() if n != "matrix"}

    def without(values: Values) -> Values:
        return {n: x for n, x in values.items() if n in few}

    _, all_states, _ = run(config)
    path, states, _ = run(
        config, specs=few, grads=lambda step: without(gradients(step)), start=without(draws(0))
    )
    for name in few:
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), all_states[name], states[name])
        assert all(same.values())
    assert path[-1].keys() == few.keys()


def test_a_state_that_is_put_away_and_taken_out_goes_on_in_the_same_bits() -> None:
    whole, state, _ = run(CONFIG)
    half, held, _ = run(CONFIG, 9)
    update = stepper(made(CONFIG))
    parameters = {n: jnp.asarray(p) for n, p in half[-1].items()}
    held = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), held)
    for step in range(9, STEPS):
        grads = {n: jnp.asarray(g) for n, g in gradients(step).items()}
        updated = update(grads, held, parameters, jnp.int32(step))
        parameters, held = updated.parameters, updated.optimizer
    assert all(np.array_equal(parameters[n], whole[-1][n]) for n in SPECS)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, held, state)))


def test_parameters_and_state_keep_their_dtype() -> None:
    """The rate is float64 here; float32 parameters must not become it."""
    optimizer = made(CONFIG)
    parameters = {n: jnp.asarray(p, jnp.float32) for n, p in draws(0).items()}
    state = jax.jit(optimizer.init)(parameters)
    grads = {n: jnp.asarray(g, jnp.float32) for n, g in gradients(0).items()}
    updated = stepper(optimizer)(grads, state, parameters, jnp.int32(0))
    assert {p.dtype for p in updated.parameters.values()} == {jnp.dtype(jnp.float32)}
    before, after = (jax.tree.map(lambda x: x.dtype, s) for s in (state, updated.optimizer))
    assert before == after


@pytest.mark.parametrize(
    "algorithm", [Adamw(), Adafactor(min_dim_to_factor=8), Muon(), Lion()], ids=str
)
def test_bfloat16_parameters_keep_second_moments_and_counts_wide(algorithm: Algorithm) -> None:
    """And first moments in their own dtype, unless `moments_dtype` is set."""
    specs = {**SPECS, "wide": spec("wide", (8, 8), True)}
    optimizer = made(replace(CONFIG, algorithm=algorithm), specs)
    with jax.enable_x64(False):
        parameters = {n: jnp.ones(s.shape, jnp.bfloat16) for n, s in specs.items()}
        state = jax.jit(optimizer.init)(parameters)
        updated = stepper(optimizer)(parameters, state, parameters, jnp.int32(0))
    assert {p.dtype for p in updated.parameters.values()} == {jnp.dtype(jnp.bfloat16)}
    for held in (state, updated.optimizer):
        dtypes = {(field, x.dtype.name) for leaf in held.values() for field, x in leaf.items()}
        assert dtypes <= {
            ("count", "int32"), ("mu", "bfloat16"), ("nu", "float32"), ("v", "float32"),
            ("v_row", "float32"), ("v_col", "float32"),
        }  # fmt: skip
    assert updated.metrics["grad_norm"].dtype == jnp.float32


def test_a_second_moment_of_bfloat16_parameters_does_not_stand_still() -> None:
    """Of a gradient of 1: `1 - 0.999^t` after t steps; in bfloat16 it stops where a step is below half a place."""
    specs = {"bias": SPECS["bias"]}
    optimizer = made(OptimizerConfig(Adamw(b2=0.999), learning_rate=0.0, clip=0.0), specs)
    with jax.enable_x64(False):
        ones = {"bias": jnp.ones(5, jnp.bfloat16)}

        def step(_: Any, state: Any) -> Any:
            return optimizer.update(ones, state, ones, jnp.float32(0)).optimizer

        state = jax.lax.fori_loop(0, 2000, step, optimizer.init(ones))
    np.testing.assert_allclose(state["bias"]["nu"], 1 - 0.999**2000, rtol=1e-3)


def test_the_norm_of_bfloat16_gradients_is_summed_wide() -> None:
    """Of 5,000 ones: in bfloat16 their sum stops at 256."""
    specs = {"w": spec("w", (5000,), False)}
    with jax.enable_x64(False):
        ones = {"w": jnp.ones(5000, jnp.bfloat16)}
        optimizer = made(replace(CONFIG, clip=0.0), specs)
        updated = optimizer.update(ones, optimizer.init(ones), ones, jnp.float32(0.1))
    assert float(updated.metrics["grad_norm"]) == pytest.approx(np.sqrt(5000), rel=1e-6)


def test_what_a_bfloat16_parameter_loses() -> None:
    """A step is added in float32, then the sum is rounded: below half a last place (here 1/256) nothing is left."""
    specs = {"scale": SPECS["scale"]}
    optimizer = made(OptimizerConfig(clip=0.0), specs)
    with jax.enable_x64(False):
        one = {"scale": jnp.ones((), jnp.bfloat16)}
        for rate, after in ((0.9 / 512, 1.0), (1.1 / 512, 1 - 1 / 256), (3.9 / 512, 1 - 4 / 512)):
            # AdamW's first step is the rate itself.
            updated = optimizer.update(one, optimizer.init(one), one, jnp.float32(rate))
            assert float(updated.parameters["scale"]) == after


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("decay", "cosin", "cosine"),
        ("decay", "liner", "linear"),
        ("unit", "step", "steps"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(key: str, value: str, near: str) -> None:
    with pytest.raises(UserError, match=f"optimizer.{key}: no '{value}'. Did you mean '{near}'"):
        made(OptimizerConfig(**{key: value}))

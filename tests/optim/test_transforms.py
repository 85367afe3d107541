"""Each optimizer against an independent statement of its published update in NumPy, and where its state lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from jax.sharding import PartitionSpec
from toyrun import bits, parts, run

from mmjax.core.errors import UserError
from mmjax.core.parameters import Spec, Stack
from mmjax.optim.config import OptimizerConfig
from mmjax.optim.optimizer import Optimizer
from mmjax.optim.transforms import as_matrix
from mmjax.optim.views import View

STEPS, RATE, DECAY = 7, 0.05, 0.3
Values = dict[str, np.ndarray]


pytestmark = pytest.mark.usefixtures("x64")


def spec(name: str, shape: tuple[int, ...], axes: Any = None, stacked: bool = False) -> Spec:
    axes = (None,) * len(shape) if axes is None else axes
    if not stacked:
        return Spec(name, shape, axes, initializers.zeros, False, len(shape) > 1, None)
    stack = Stack(first=0, stride=1, repeat=2, prefix="trunk/layers", inner=name)
    init = initializers.zeros
    return Spec(name, (2, *shape), ("layers", *axes), init, False, len(shape) > 1, stack)


SPECS = {
    s.name: s
    for s in (
        spec("mlp", (4, 6), ("embed", "mlp"), stacked=True),
        spec("query", (4, 2, 3), ("embed", "heads", None), stacked=True),
        spec("out", (2, 3, 4), ("heads", None, "embed"), stacked=True),
        spec("experts", (3, 5, 4), (None, "embed", "mlp"), stacked=True),
        spec("scale", (4,), ("embed",), stacked=True),
        spec("table", (7, 4), ("vocabulary", "embed")),
        spec("bias", (4,)),
    )
}
# Layers' matrices by hand: `[layers * experts, inputs, outputs]`.
MATRICES = {"mlp": (2, 4, 6), "query": (2, 4, 6), "out": (2, 6, 4), "experts": (6, 5, 4)}


def draws(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s.shape) for name, s in SPECS.items()}


def made(config: OptimizerConfig) -> Optimizer:
    """An optimizer for one task that moves everything."""
    return Optimizer(config, SPECS, lambda _: STEPS, {"task": View("shared", frozenset(SPECS))})


def found(**settings: Any) -> tuple[Values, dict[str, Any]]:
    """Parameters and state after `STEPS` steps."""
    config = OptimizerConfig(weight_decay=DECAY, clip=0.0, **settings)
    optimizer = made(config)
    parameters = {n: jnp.asarray(p) for n, p in draws(0).items()}
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        grads = {n: jnp.asarray(g) for n, g in draws(100 + step).items()}
        updated = update(grads, state, parameters, jnp.float64(RATE))
        parameters, state = updated.parameters, updated.optimizer
    return {n: np.asarray(p) for n, p in parameters.items()}, state


def expected(directions: Callable[[str], Callable[[np.ndarray, np.ndarray], np.ndarray]]) -> Values:
    """`p -= rate (direction + decay p)`; `directions(name)` is a fresh `(gradient, parameter) -> direction`."""
    parameters = draws(0)
    for name, s in SPECS.items():
        direction, decay = directions(name), DECAY if s.decay else 0.0
        for step in range(STEPS):
            p = parameters[name]
            parameters[name] = p - RATE * (direction(draws(100 + step)[name], p) + decay * p)
    return parameters


def agree(have: Values, want: Values, tolerance: float = 1e-9) -> None:
    for name in SPECS:
        np.testing.assert_allclose(have[name], want[name], rtol=tolerance, err_msg=name)


def adam(b1: float, b2: float, eps: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    held: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

    def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
        held["t"] += 1
        held["m"] = b1 * held["m"] + (1 - b1) * g
        held["v"] = b2 * held["v"] + (1 - b2) * g**2
        root = np.sqrt(held["v"] / (1 - b2 ** held["t"])) + eps
        return held["m"] / (1 - b1 ** held["t"]) / root

    return direction


# --- Muon --------------------------------------------------------------------------------------


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Five steps of Jordan's quintic iteration from `X / |X|_F`, on the wide side."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    a, b, c = np.float32([3.4445, -4.7750, 2.0315]).astype(np.float64)
    x = x / (np.sqrt((x**2).sum()) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def muon(name: str, beta: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Jordan (2024) with Nesterov's momentum, unbiased as in NAdam; the size of Liu et al. (2025), eq. 4."""
    held: dict[str, Any] = {"m": 0.0, "t": 0}
    shape = MATRICES[name]

    def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
        held["t"] += 1
        t, held["m"] = held["t"], beta * held["m"] + (1 - beta) * g
        ahead = beta * held["m"] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        turned = np.stack([orthogonal(x) for x in ahead.reshape(shape)])
        return 0.2 * math.sqrt(max(shape[1:])) * turned.reshape(g.shape)

    return direction


def test_muon_is_the_published_one_and_adamw_elsewhere() -> None:
    have, _ = found(name="muon", b1=0.8, b2=0.95, eps=1e-3, momentum=0.9)
    agree(
        have,
        expected(lambda n: muon(n, 0.9) if n in MATRICES else adam(0.8, 0.95, 1e-3)),
        1e-6,  # the coefficients are float32
    )
    # The control: each of them was treated otherwise under AdamW.
    plain, _ = found(name="adamw", b1=0.8, b2=0.95, eps=1e-3)
    differs = {n for n in SPECS if not np.allclose(have[n], plain[n], rtol=1e-3)}
    assert differs == set(MATRICES)


def test_muons_update_has_the_size_of_adams() -> None:
    """Singular values near 1, so a root mean square near 0.2, whatever the matrix's shape."""
    optimizer = made(OptimizerConfig(name="muon", clip=0.0))
    before = {n: jnp.asarray(p) for n, p in draws(0).items()}
    grads = {n: jnp.asarray(g) for n, g in draws(1).items()}
    updated = optimizer.update(grads, optimizer.init(before), before, jnp.float64(1))
    for name in MATRICES:
        assert 0.1 < rms(np.asarray(updated.parameters[name] - before[name])) < 0.3, name


# --- Lion, Adafactor ---------------------------------------------------------------------------


def test_lion_is_the_published_one() -> None:
    def lion(_: str) -> Any:
        held: dict[str, Any] = {"m": 0.0}

        def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
            turned = np.sign(0.7 * held["m"] + 0.3 * g)
            held["m"] = 0.9 * held["m"] + 0.1 * g
            return turned

        return direction

    have, state = found(name="lion", b1=0.7, b2=0.9)
    agree(have, expected(lion))
    assert set(state["mlp"]) == {"count", "mu"}


def rms(x: np.ndarray) -> float:
    return math.sqrt((x**2).mean())


def adafactor(name: str, least: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Algorithms 4 (matrices) and 5 (all else) layer by layer: `beta2_t = 1 - t^-0.8`, d = 1, eps = (1e-30, 1e-3)."""
    shape = {**{n: s.shape[1:] for n, s in SPECS.items() if s.stack}, "table": (7, 4)}
    inner = {"mlp": (4, 6), "query": (4, 6), "out": (6, 4)}.get(name, shape.get(name, (4,)))
    repeat = 2 if SPECS[name].stack else 1
    held: dict[str, Any] = {"r": 0.0, "c": 0.0, "v": 0.0, "t": 0}

    def direction(g: np.ndarray, p: np.ndarray) -> np.ndarray:
        held["t"] += 1
        beta = 1 - held["t"] ** -0.8
        g, p = g.reshape(repeat, *inner), p.reshape(repeat, *inner)
        square = g**2 + 1e-30
        if len(inner) > 1 and sorted(inner)[-2] >= least:
            held["r"] = beta * held["r"] + (1 - beta) * square.mean(axis=-1)
            held["c"] = beta * held["c"] + (1 - beta) * square.mean(axis=-2)
            mean = held["r"].mean(axis=-1)[..., None, None]
            second = held["r"][..., :, None] * held["c"][..., None, :] / mean
        else:
            held["v"] = beta * held["v"] + (1 - beta) * square
            second = held["v"]
        turned = g / np.sqrt(second)
        sized = [u / max(1.0, rms(u)) * max(1e-3, rms(x)) for u, x in zip(turned, p, strict=True)]
        return np.stack(sized).reshape(SPECS[name].shape)

    return direction


@pytest.mark.parametrize("least", [4, 128])
def test_adafactor_is_the_published_one(least: int) -> None:
    have, state = found(name="adafactor", min_dim_to_factor=least)
    agree(have, expected(lambda n: adafactor(n, least)), 1e-6)  # its decay is a float32 power
    factored = {n for n in SPECS if set(state[n]) == {"count", "v_row", "v_col"}}
    assert factored == ({"mlp", "query", "out", "experts", "table"} if least == 4 else set())
    assert all(set(state[n]) == {"count", "v"} for n in SPECS if n not in factored)


def test_factored_state_is_small() -> None:
    _, state = found(name="adafactor", min_dim_to_factor=4)
    assert {k: v.shape for k, v in state["query"].items()} == {
        "count": (2,), "v_row": (2, 4), "v_col": (2, 6)
    }  # fmt: skip


# --- moments -----------------------------------------------------------------------------------


def test_first_moments_in_bfloat16() -> None:
    """Rounded between steps, not within one."""

    def rounded(_: str) -> Any:
        held: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

        def direction(g: np.ndarray, _: np.ndarray) -> np.ndarray:
            held["t"] += 1
            m = 0.9 * held["m"] + (1 - 0.9) * g
            held["v"] = 0.999 * held["v"] + (1 - 0.999) * g**2
            held["m"] = m.astype(jnp.bfloat16).astype(np.float64)
            root = np.sqrt(held["v"] / (1 - 0.999 ** held["t"])) + 1e-8
            return m / (1 - 0.9 ** held["t"]) / root

        return direction

    have, state = found(moments_dtype="bfloat16")
    agree(have, expected(rounded), 1e-8)
    assert state["mlp"]["mu"].dtype == jnp.bfloat16 and state["mlp"]["nu"].dtype == jnp.float64
    assert not np.allclose(have["mlp"], found()[0]["mlp"], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moments_dtype": "float16"}, "moments_dtype is 'float16'"),
        ({"name": "adafactor", "moments_dtype": "bfloat16"}, "adafactor keeps no first moment"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        found(**settings)


# --- shapes, shardings, resuming ---------------------------------------------------------------


def test_attention_as_the_matrices_it_is() -> None:
    assert as_matrix(SPECS["query"]) == ((4, 6), ("embed", "heads"))
    assert as_matrix(SPECS["out"]) == ((6, 4), ("heads", "embed"))
    assert as_matrix(SPECS["experts"]) == ((3, 5, 4), (None, "embed", "mlp"))
    assert as_matrix(SPECS["table"]) == ((7, 4), ("vocabulary", "embed"))


def test_state_lies_by_the_axes_that_it_keeps() -> None:
    """The layers' kernel is [layers, embed, mlp]: rows follow `embed`, columns `mlp`."""
    with jax.enable_x64(False):
        toy = parts(
            "model.width=16", "optimizer.name=adafactor", "optimizer.algorithm.min_dim_to_factor=8",
            "mesh.fsdp=2", "mesh.tensor=2", devices=8,
        )  # fmt: skip
    kernel = toy.state.optimizer["trunk/groups/0/blocks/0/inner/kernel"]
    lies = {field: leaf.sharding.spec for field, leaf in kernel.items()}
    assert lies["v_row"] == PartitionSpec(None, ("fsdp",))
    assert lies["v_col"] == PartitionSpec(None, ("tensor",))
    assert lies["count"] == PartitionSpec(None)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.name=muon", "optimizer.moments_dtype=bfloat16"),
        ("optimizer.name=adafactor", "optimizer.algorithm.min_dim_to_factor=8"),
    ],
    ids=["muon", "adafactor"],
)
def test_a_run_goes_on_in_the_same_bits(tmp_path: Any, overrides: tuple[str, ...]) -> None:
    with jax.enable_x64(False):
        run(tmp_path / "straight", *overrides)
        run(tmp_path / "halved", *overrides, "steps=8")
        run(tmp_path / "halved", *overrides)
        assert bits(tmp_path / "straight") == bits(tmp_path / "halved")

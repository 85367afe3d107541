"""Low-rank deltas: what they add, against loops of NumPy, and which patterns are refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers

from mmjax.core.errors import UserError
from mmjax.core.low_rank import LowRankConfig, adapt, adapters_of, fold, merged
from mmjax.core.parameters import Declaration, LayerStack, Spec
from mmjax.nn.dense import Dense

RNG = np.random.default_rng(0)


def spec(name: str, shape: tuple[int, ...], axes: Any, inner: str = "") -> Spec:
    stack = LayerStack(2, 1, shape[0], "trunk/layers", inner) if inner else None
    return Spec(name, shape, axes, initializers.ones, False, True, stack)


SPECS = {
    s.name: s
    for s in (
        spec("g/query", (2, 4, 3, 5), ("layers", "embed", "heads", None), "query"),
        spec("g/out", (2, 3, 5, 4), ("layers", "heads", None, "embed"), "out"),
        spec("g/up", (2, 3, 4, 6), ("layers", "experts", "embed", "mlp"), "up"),
        spec("stems/text/table", (7, 4), ("vocabulary", "embed")),
        spec("g/scale", (2, 4), ("layers", "embed"), "scale"),
        spec("stems/image/kernel", (2, 2, 3, 4), (None, None, None, "embed")),
    )
}
ALL = (LowRankConfig((".*/(query|out|up)", "stems/text/table"), 2, 3.0),)


def test_a_delta_is_the_product_of_its_factors_matrix_by_matrix() -> None:
    adapters = adapters_of(SPECS, ALL, "lora")
    arrays = {n: RNG.normal(size=s.shape).astype(np.float32) for n, s in SPECS.items()}
    for one in adapters.values():
        arrays |= {s.name: RNG.normal(size=s.shape).astype(np.float32) for s in (one.a, one.b)}
    whole = fold(adapters, arrays)
    sizes = {"g/query": (4, 15), "g/out": (15, 4), "g/up": (4, 6), "stems/text/table": (7, 4)}
    assert adapters.keys() == sizes.keys()
    for name, (n_in, n_out) in sizes.items():
        matrices = arrays[name].reshape(-1, n_in, n_out)
        a = arrays[f"{name}_lora_a"].reshape(-1, n_in, 2)
        b = arrays[f"{name}_lora_b"].reshape(-1, 2, n_out)
        after = np.asarray(whole[name]).reshape(-1, n_in, n_out)
        assert len(after) == len(a) == len(b) == {"g/up": 6, "stems/text/table": 1}.get(name, 2)
        for m in range(len(matrices)):
            expected = matrices[m] + 1.5 * (a[m] @ b[m])
            np.testing.assert_allclose(after[m], expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(whole["g/scale"], arrays["g/scale"])
    base = merged(adapters, {n: jnp.asarray(v) for n, v in arrays.items()})
    assert base.keys() == SPECS.keys()
    assert all(np.array_equal(base[n], whole[n]) for n in SPECS)


def test_factors_lie_and_are_called_like_their_matrix() -> None:
    adapters = adapters_of(SPECS, ALL, "lora")
    query, out, up = (adapters[f"g/{name}"] for name in ("query", "out", "up"))
    assert (query.a.shape, query.a.axes) == ((2, 4, 2), ("layers", "embed", None))
    assert (query.b.shape, query.b.axes) == ((2, 2, 3, 5), ("layers", None, "heads", None))
    assert (out.a.axes, out.b.axes) == (
        ("layers", "heads", None, None), ("layers", None, "embed"),
    )  # fmt: skip
    assert up.a.axes == ("layers", "experts", "embed", None)
    assert query.a.canonical == ["trunk/layers/002/query_lora_a", "trunk/layers/003/query_lora_a"]


def test_factors_begin_as_a_normal_one_and_zero() -> None:
    config = LowRankConfig(("stems/text/table",), 64)
    wide = spec("stems/text/table", (400, 64), ("vocabulary", "embed"))
    one = adapters_of({wide.name: wide}, (config,), "lora")[wide.name]
    a = np.asarray(one.a.init(jax.random.key(0), one.a.shape, jnp.float32))
    assert abs(a.std() - 400**-0.5) < 1e-3 and abs(a.mean()) < 1e-3
    assert not np.any(one.b.init(jax.random.key(0), one.b.shape, jnp.float32))
    assert one.scale == 16 / 64


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LowRankConfig(()), r"lora\[0\].match is empty"),
        (LowRankConfig((".*/quary",)), r"lora\[0\].match: '.*/quary' matches .* nearest: .*query"),
        (LowRankConfig(("(",)), "is no regular expression"),
        (LowRankConfig((".*/scale",)), r"'trunk/layers/002/scale' \[2, 4\] is no matrix"),
        (LowRankConfig(("stems/image/kernel",)), "is no matrix"),
        (LowRankConfig((".*/002/query",)), "matches trunk/layers/002/query, but not the other"),
        (LowRankConfig((".*/query",), 5), r"lora\[0\].rank is 5, more than"),
    ],
)
def test_what_no_delta_can_have_is_refused(config: LowRankConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        adapters_of(SPECS, (config,), "lora")


def test_a_matrix_has_one_delta() -> None:
    twice = (LowRankConfig((".*/query",), 2), LowRankConfig((".*/(out|query)",), 2))
    with pytest.raises(UserError, match=r"lora\[1\].match: 'g/query' has a delta already"):
        adapters_of(SPECS, twice, "lora")


def test_a_narrow_matrix_is_added_to_in_float32() -> None:
    """A delta below the last place of bfloat16 must not be lost before the model computes."""
    one = adapters_of(SPECS, (LowRankConfig((".*/query",), 1, 1.0),), "lora")
    arrays = {
        "g/query": jnp.ones((2, 4, 3, 5), jnp.bfloat16),
        "g/query_lora_a": jnp.full((2, 4, 1), 2.0**-5, jnp.bfloat16),
        "g/query_lora_b": jnp.full((2, 1, 3, 5), 2.0**-5, jnp.bfloat16),
    }
    whole = fold(one, arrays)["g/query"]
    assert whole.dtype == jnp.float32 and np.all(np.asarray(whole) == 1 + 2.0**-10)
    assert merged(one, arrays)["g/query"].dtype == jnp.bfloat16


class Pair(nnx.Module):
    """Two matrices of a kind, of which a teacher copies one."""

    def __init__(self) -> None:
        self.copied = Dense(3, 2, ("embed", None), bias=False)
        self.other = Dense(3, 2, ("embed", None), bias=False)


def test_a_teacher_has_each_delta_once() -> None:
    declaration = Declaration(Pair())
    adapt(declaration, (LowRankConfig((".*/kernel",), 1, 2.0),), "lora")
    declaration.teach({"old": frozenset(n for n in declaration.specs if n.startswith("copied"))})
    arrays = {n: jnp.asarray(RNG.normal(size=s.shape)) for n, s in declaration.read.items()}
    taught = declaration.merge(arrays).teacher_of("old")
    for part, prefix in (("copied", "teacher/old/"), ("other", "")):
        w, a, b = (arrays[f"{prefix}{part}/kernel{end}"] for end in ("", "_lora_a", "_lora_b"))
        np.testing.assert_allclose(getattr(taught, part).kernel[...], w + 2 * a @ b, rtol=1e-5)

"""Check what stands between trunk and outputs: the token of a beginning, times, and heads by modality."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.nn.adapter import Adapter
from mmjax.nn.packing import Region
from mmjax.nn.stream import Stream

WIDTH = 4


@pytest.fixture(scope="module")
def declaration() -> Declaration:
    return Declaration(Adapter(WIDTH, {"text": 7}, {"image": 12}, channels=0))


def drawn(declaration: Declaration) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {n: jnp.asarray(rng.normal(size=s.shape)) for n, s in declaration.specs.items()}


def test_each_modality_has_the_parameters_of_its_kind(declaration: Declaration) -> None:
    shapes = {name: spec.shape for name, spec in declaration.specs.items()}
    assert shapes["begin/text"] == (WIDTH,) and shapes["logits/text/kernel"] == (WIDTH, 7)
    assert shapes["features/image/kernel"] == (128, WIDTH)
    assert shapes["values/image/kernel"] == (WIDTH, 12)
    assert not [
        n for n in shapes if n.startswith(("begin/image", "values/text", "unet", "logits/image"))
    ]
    assert "logits/text/bias" not in shapes and not declaration.specs["begin/text"].decay


def test_continuous_outputs_begin_at_zero(declaration: Declaration) -> None:
    def start(name: str) -> Any:
        return declaration.specs[name].init(jax.random.key(0), (WIDTH,), jnp.float32)

    assert not np.any(start("values/image/kernel")) and np.any(start("begin/text"))


def test_a_time_is_its_sines_and_cosines_through_two_maps(
    declaration: Declaration, x64: None
) -> None:
    p = drawn(declaration)
    t = np.array([0.0, 0.3, 1.0])
    result = declaration.merge(p).times("image", jnp.asarray(t))
    rates = np.exp(-np.log(1e4) * np.arange(64) / 64)
    angles = 1000 * t[:, None] * rates
    features = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    x = features @ p["features/image/kernel"] + p["features/image/bias"]
    up = x @ p["time/image/up/kernel"] + p["time/image/up/bias"]
    hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    expected = hidden @ p["time/image/down/kernel"] + p["time/image/down/bias"]
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_a_span_begins_with_its_token_and_a_row_that_is_not_kept_has_nothing_else(
    declaration: Declaration,
) -> None:
    p = drawn(declaration)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, WIDTH)))
    stream = Stream(
        x, jnp.asarray([[True, True, False]] * 2), {"t": jnp.zeros((1, 3))}, (("text", 3),)
    )
    begun = declaration.merge(p).begun("text", stream, jnp.asarray([True, False]))
    np.testing.assert_array_equal(begun.x_BSD[:, 1:], x)
    np.testing.assert_allclose(begun.x_BSD[:, 0], np.tile(p["begin/text"], (2, 1)), rtol=1e-6)
    assert begun.valid_BS is not None and begun.layout == (("text", 4),) and not begun.coordinates
    valid = [[True, True, True, False], [True, False, False, False]]
    np.testing.assert_array_equal(begun.valid_BS, valid)


def test_shared_slots_begin_where_each_span_does(declaration: Declaration) -> None:
    p = drawn(declaration)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, WIDTH)))
    index = jnp.asarray([[0, 1, 0, 1, 2]])
    valid = jnp.asarray([[True, True, True, True, False]])
    nothing = jnp.zeros((1, 5), jnp.int32)
    region = Region(nothing, index, nothing, valid, nothing, nothing)
    result = declaration.merge(p).begun_in("text", Stream(x), region)
    expected = np.array(x)
    expected[0, [0, 2]] = p["begin/text"]
    np.testing.assert_allclose(result.x_BSD, expected, rtol=1e-6)
    np.testing.assert_array_equal(result.valid_BS, valid)


def test_a_unet_is_there_where_it_has_channels_and_takes_patches_of_a_power_of_two() -> None:
    names = Declaration(Adapter(WIDTH, {}, {"image": 12}, channels=2)).specs
    assert names["unet/image/enter/kernel"].shape == (3, 3, 3, 2)
    with pytest.raises(UserError, match="found patch 3"):
        Adapter(WIDTH, {}, {"image": 27}, channels=2)

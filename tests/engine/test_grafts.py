"""Transforms of arrays from other models: each against loops of NumPy, and there and back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.nn import initializers

from mmjax.core.config import build
from mmjax.core.errors import UserError
from mmjax.core.parameters import LayerStack, Spec
from mmjax.engine.grafts import TransformConfig, initial_value
from mmjax.engine.warm_start import WarmStartConfig, warm_start

RNG = np.random.default_rng(0)


def transform(**block: Any) -> Any:
    return build(TransformConfig, {"match": ".*", **block}, "t")


def applied(value: np.ndarray, **block: Any) -> np.ndarray:
    result: np.ndarray = transform(**block)(value, lambda: None)
    return result


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_heads_become_an_axis_and_are_joined_again() -> None:
    value = numbers(5, 6)
    heads = applied(value, split_heads={"count": 3})
    assert heads.shape == (5, 3, 2)
    for d in range(5):
        for h in range(3):
            for k in range(2):
                assert heads[d, h, k] == value[d, h * 2 + k]
    assert np.array_equal(applied(heads, join_heads={}), value)
    out = applied(value.T, split_heads={"count": 3, "axis": 0})
    assert out.shape == (3, 2, 5) and np.array_equal(out[1, 0], value.T[2])
    assert np.array_equal(applied(out, join_heads={"axis": 0}), value.T)


def test_interleaved_rotary_heads_turn_as_they_did() -> None:
    """The angles of pairs (2i, 2i + 1), applied in the order of the source, are those of halves after the transform."""
    query, key = numbers(7, 2, 8), numbers(7, 2, 8)

    def turned(x: np.ndarray, place: int, is_halves: bool) -> np.ndarray:
        result = np.array(x)
        for i in range(4):
            angle = place * 100.0 ** (-2 * i / 8)
            one, two = (i, i + 4) if is_halves else (2 * i, 2 * i + 1)
            a, b = x[..., one], x[..., two]
            result[..., one] = a * np.cos(angle) - b * np.sin(angle)
            result[..., two] = b * np.cos(angle) + a * np.sin(angle)
        return result

    before = (turned(query, 5, False) * turned(key, 2, False)).sum(-1)
    halves = [applied(x, rotary={"to": "halves"}) for x in (query, key)]
    after = (turned(halves[0], 5, True) * turned(halves[1], 2, True)).sum(-1)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    without = (turned(query, 5, True) * turned(key, 2, True)).sum(-1)
    assert not np.allclose(without, before, atol=1e-2)
    assert np.array_equal(applied(halves[0], rotary={"to": "pairs"}), query)


def test_only_a_part_of_each_joined_head_turns() -> None:
    value = np.arange(12.0)
    block = {"to": "halves", "size": 6, "rotated": 4, "axis": 0}
    expected = [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert applied(value, rotary=block).tolist() == expected
    assert np.array_equal(applied(np.array(expected), rotary={**block, "to": "pairs"}), value)


def test_key_value_heads_are_repeated_and_averaged_back() -> None:
    value = numbers(4, 2, 3)
    repeated = applied(value, repeat_heads={"times": 3})
    assert repeated.shape == (4, 6, 3)
    for head in range(6):
        assert np.array_equal(repeated[:, head], value[:, head // 3])
    means = applied(numbers(4, 6, 3), mean_heads={"times": 3})
    assert means.shape == (4, 2, 3)
    twice = applied(value, repeat_heads={"times": 2})
    assert np.array_equal(applied(twice, mean_heads={"times": 2}), value)
    three = numbers(4, 6, 3)
    expected = (three[:, 3] + three[:, 4] + three[:, 5]) / 3
    np.testing.assert_allclose(applied(three, mean_heads={"times": 3})[:, 1], expected, rtol=1e-6)


def test_fused_kernels_are_split() -> None:
    query, key, value = numbers(4, 6), numbers(4, 2), numbers(4, 2)
    fused = np.concatenate([query, key, value], axis=1)
    for index, part in enumerate((query, key, value)):
        block = {"sizes": [6, 2, 2], "index": index}
        assert np.array_equal(applied(fused, split=block), part)
    # By head: [q0, k0, q1, k1].
    heads = [query[:, :3], key[:, :1], query[:, 3:], key[:, 1:]]
    fused = np.concatenate(heads, axis=1)
    for index, part in enumerate((query, key)):
        block = {"sizes": [3, 1], "index": index, "groups": 2}
        assert np.array_equal(applied(fused, split=block), part)
    up, gate = numbers(3, 4), numbers(3, 4)
    block = {"sizes": [3, 3], "index": 1, "axis": 0}
    assert np.array_equal(applied(np.concatenate([up, gate]), split=block), gate)


def test_new_rows_are_the_mean_or_initial_values() -> None:
    table = numbers(5, 3)
    grown = applied(table, new_rows={"count": 2})
    assert np.array_equal(grown[:5], table) and grown.dtype == table.dtype
    for row in grown[5:]:
        np.testing.assert_allclose(row, sum(table) / 5, rtol=1e-6)
    initial = numbers(7, 3)
    grown = transform(new_rows={"count": 2, "fill": "init"})(table, lambda: initial)
    assert np.array_equal(grown, np.concatenate([table, initial[5:]]))
    assert np.array_equal(applied(table.T, new_rows={"count": 2, "axis": 1})[:, :5], table.T)
    with pytest.raises(UserError, match="5 old entries and 3 new ones are none of"):
        transform(new_rows={"count": 3, "fill": "init"})(table, lambda: initial)


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_a_grid_is_interpolated_between_the_centres_of_its_cells(method: str) -> None:
    old, new, keep = (3, 4), (5, 2), 1
    table = RNG.normal(size=(keep + 12, 2))
    block = {"old": list(old), "new": list(new), "method": method, "keep": keep}
    result = applied(table, resize_grid=block)

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if method == "linear":
            return max(0.0, 1 - x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    expected = np.zeros((10, 2))
    for row in range(5):
        for column in range(2):
            y, x = (row + 0.5) * 3 / 5 - 0.5, (column + 0.5) * 4 / 2 - 0.5
            for j in range(-3, 7):
                for i in range(-3, 8):
                    cell = min(max(j, 0), 2) * 4 + min(max(i, 0), 3)
                    weight = kernel(y - j) * kernel(x - i)
                    expected[row * 2 + column] += weight * table[keep + cell]
    np.testing.assert_allclose(result[keep:], expected, rtol=1e-12, atol=1e-12)
    assert np.array_equal(result[:keep], table[:keep])


def test_a_grid_of_the_same_size_stays_to_the_bit() -> None:
    table = numbers(12, 3)
    for method in ("linear", "cubic"):
        block = {"old": [3, 4], "new": [3, 4], "method": method}
        assert np.array_equal(applied(table, resize_grid=block), table)
    line = np.arange(4.0)[:, None]
    finer = applied(line, resize_grid={"old": [4], "new": [8]})
    assert finer[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({}, "t.match has none beside it; set one of split, "),
        ({"rotary": {}, "join_heads": {}}, "t.match has join_heads, rotary beside it"),
        ({"rotery": {}}, "'t.rotery'. Did you mean 't.rotary'|rotary"),
        ({"rotary": {"to": "half"}}, "to is 'half'.*halves"),
        ({"split": {"sizes": [1, 2], "index": 2}}, "t.split.index is 2; there are 2 parts"),
        ({"resize_grid": {"old": [4], "new": [2, 2]}}, r"t.resize_grid.new is \[2, 2\]"),
        ({"new_rows": {"count": 0}}, "t.new_rows.count is 0"),
    ],
)
def test_a_transform_that_cannot_be_is_refused(block: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        transform(**block)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"split_heads": {"count": 4}}, r"split_heads: axis -1 of \[5, 6\] does not hold 4 x 1"),
        ({"split": {"sizes": [2, 2], "index": 0}}, r"split: axis -1 of \[5, 6\] .* 1 x 4 numbers"),
        ({"join_heads": {"axis": 1}}, r"join_heads: axis 1 of \[5, 6\]"),
        ({"repeat_heads": {"times": 2, "axis": 2}}, r"repeat_heads: \[5, 6\] has no axis 2"),
        ({"mean_heads": {"times": 4, "axis": 1}}, "mean_heads: axis 1"),
        ({"rotary": {"size": 4}}, "rotary: 4 of 4 numbers of a head turn, of 6 on the axis"),
        ({"rotary": {"rotated": 8}}, "rotary: 8 of 6 numbers"),
        ({"resize_grid": {"old": [2, 2], "new": [3, 3]}}, "has 5 rows, not 0 [+] 2 x 2"),
    ],
)
def test_an_array_that_does_not_fit_its_transform_is_refused(block: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        applied(numbers(5, 6), **block)


LAYERS = LayerStack(first=0, stride=1, repeat=2, prefix="trunk/layers", inner="query")


def test_a_fused_interleaved_projection_becomes_each_layers_query(tmp_path: Path) -> None:
    """A file's `[3 H K, D]` in pairs, as PyTorch has it, becomes `[D, H, K]` in halves."""
    spec = Spec(
        "trunk/groups/0/query", (2, 4, 2, 6), ("layers", "embed", "heads", None),
        initializers.zeros, False, True, LAYERS,
    )  # fmt: skip
    fused = [numbers(36, 4), numbers(36, 4)]
    np.savez(tmp_path / "a.npz", **{f"h.{i}.qkv": x for i, x in enumerate(fused)})
    match = r"trunk/layers/00(\d)/query"
    block = {
        "path": str(tmp_path / "a.npz"),
        "names": [{"match": match, "name": r"h.\1.qkv", "transpose": True}],
        "transforms": [
            {"match": match, "split": {"sizes": [12, 12, 12], "index": 0}},
            {"match": match, "split_heads": {"count": 2}},
            {"match": match, "rotary": {}},
        ],
    }
    said: list[str] = []
    values = warm_start(build(WarmStartConfig, block, "i"), {spec.name: spec}, said.append)
    for layer in range(2):
        for h in range(2):
            for k, source in enumerate([0, 2, 4, 1, 3, 5]):
                expected = fused[layer][h * 6 + source]
                assert np.array_equal(values[f"trunk/layers/00{layer}/query"][:, h, k], expected)
    assert "adapted (2): trunk/layers/*/query [4, 36] -> [4, 2, 6] (2)" in "\n".join(said)
    block["transforms"] = block["transforms"][1:]  # type: ignore[index]
    words = r"transforms of 'trunk/layers/000/query': \[4, 36\] became \[4, 2, 18\]; expected \[4, 2, 6\]"
    with pytest.raises(UserError, match=words):
        warm_start(build(WarmStartConfig, block, "i"), {spec.name: spec}, said.append)


def test_new_rows_may_be_those_that_a_run_would_begin_with(tmp_path: Path) -> None:
    init = initializers.normal(1.0)
    spec = Spec("stems/text/table", (6, 4), ("vocabulary", "embed"), init, False, True, None)
    np.savez(tmp_path / "a.npz", **{spec.name: numbers(4, 4)})
    rule = {"match": ".*", "new_rows": {"count": 2, "fill": "init"}}
    block = {"path": str(tmp_path / "a.npz"), "transforms": [rule]}
    config = build(WarmStartConfig, block, "i")
    values = warm_start(config, {spec.name: spec}, print, seed=3)[spec.name]
    assert np.array_equal(values[4:], initial_value(spec.name, spec, 3)[4:])
    assert not np.array_equal(values[4:], initial_value(spec.name, spec, 4)[4:])

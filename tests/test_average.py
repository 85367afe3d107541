"""`mmjax average`: means of checkpoints, read again by every other command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from mains import refused, run

import mmjax
from mmjax import average, evaluate, show
from mmjax.core.errors import UserError
from mmjax.engine import checkpoint
from mmjax.engine.warm_start import WarmStartConfig, warm_start

EXTRA = f"--extra={toyrun.EXTRA}"
COMMON = ("steps=2", "evaluation.every=0", "optimizer.ema=0.5", "optimizer.accumulate=2")
Values = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return two runs of one config with different seeds, in folders `a` and `b`."""
    folder = tmp_path_factory.mktemp("soup")
    toyrun.run(folder / "a", *COMMON)
    toyrun.run(folder / "b", *COMMON, "seed=1")
    return folder


def arrays(workdir: Path, part: str) -> Values:
    folder = epath.Path(workdir)
    step = checkpoint.steps(folder)[0]
    shapes = checkpoint.read_shapes(folder, step)
    state = checkpoint.read_state(folder, step, {part: shapes.get(part, {})})[part]
    return {name: np.asarray(value) for name, value in state.items()}


def averaged(out: Path, *words: Any) -> str:
    ended = run(average.main, *map(str, words), f"--out={out}", EXTRA)
    assert (ended.status, ended.err) == (0, ""), ended.err
    return ended.out


def test_the_average_of_two_runs_is_their_mean(runs: Path, tmp_path: Path) -> None:
    out = averaged(tmp_path / "soup", runs / "a", f"{runs / 'b'}@2")
    assert f" 0.500  {runs / 'b'}@2\n" in out
    for part in ("parameters", "buffers"):
        one, two, soup = (arrays(w, part) for w in (runs / "a", runs / "b", tmp_path / "soup"))
        sums = {name for name in one if name.startswith("sum")}
        assert soup.keys() == one.keys() - sums and bool(sums) == (part == "buffers")
        for name, value in soup.items():
            assert value.dtype == one[name].dtype == np.float32
            np.testing.assert_allclose(value, (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-7)
        kernels = [n for n in soup if n.endswith("kernel")]
        assert kernels and all(not np.array_equal(one[n], two[n]) for n in kernels)


def test_weights_are_those_of_the_runs_in_order(runs: Path, tmp_path: Path) -> None:
    averaged(tmp_path / "soup", runs / "a", runs / "b", "--weights=1,3")
    one, two, soup = (arrays(w, "parameters") for w in (runs / "a", runs / "b", tmp_path / "soup"))
    for name in soup:
        expected = 0.25 * one[name].astype(np.float64) + 0.75 * two[name].astype(np.float64)
        np.testing.assert_allclose(soup[name], expected, rtol=1e-6, atol=1e-7)


def test_a_run_averaged_with_itself_stays_to_the_bit(runs: Path, tmp_path: Path) -> None:
    a = runs / "a"
    averaged(tmp_path / "soup", a, a, a, "--weights=0.1,0.7,0.3")
    for part in ("parameters", "buffers"):
        before, after = arrays(a, part), arrays(tmp_path / "soup", part)
        assert all(after[name].tobytes() == before[name].tobytes() for name in after)


def test_what_reads_a_run_reads_the_average(runs: Path, tmp_path: Path) -> None:
    soup = tmp_path / "soup"
    averaged(soup, runs / "a", runs / "b")
    mean = arrays(soup, "buffers")
    model = mmjax.load(str(soup))
    assert all(np.array_equal(v, mean[f"ema/{n}"]) for n, v in model.parameters.items())
    ended = run(evaluate.main, f"--workdir={soup}", EXTRA)
    assert (ended.status, ended.err) == (0, "")
    lines = [json.loads(x) for x in (soup / "evaluations.jsonl").read_text().splitlines()]
    [one] = [line for line in lines if line["task"] == "one"]
    own = toyrun.run(
        tmp_path / "same", f"init_from.path={soup}", "init_from.average=True", "steps=1",
        "optimizer.learning_rate=0.0", "optimizer.weight_decay=0.0", "optimizer.ema=0.0",
    )  # fmt: skip
    assert own is not None
    [same] = [record for record in own if record["task"] == "one"]
    assert one["value"] == pytest.approx(same["value"], rel=1e-6)
    ended = run(show.main, str(soup))
    assert ended.status == 0 and f"Average of {runs / 'b'}@2, weight 1." in ended.out
    specs = toyrun.parts().experiment.declaration.specs
    values = warm_start(WarmStartConfig(str(soup)), specs, print)
    parameters = arrays(soup, "parameters")
    assert values.keys() == parameters.keys()
    assert all(np.array_equal(values[n], parameters[n]) for n in values)


def test_a_run_is_not_resumed_from_an_average(runs: Path, tmp_path: Path) -> None:
    averaged(tmp_path / "soup", runs / "a", runs / "b")
    with pytest.raises(UserError, match="is an average of runs .* init_from.path="):
        toyrun.run(tmp_path / "soup", *COMMON, "steps=4")


def test_what_is_no_run_of_the_same_config_is_refused(runs: Path, tmp_path: Path) -> None:
    """A parameter of another shape or dtype, and one that is there once: each by name, with both runs."""
    a, b = (average.ingredient(str(runs / name)) for name in "ab")
    name = ("parameters", "heads/one/out/bias")
    other = jax.ShapeDtypeStruct((2,), np.float32)
    narrow = jax.ShapeDtypeStruct((1,), np.float16)
    less = {key: leaf for key, leaf in b.shapes.items() if key != name}
    for shapes, words in (
        ({**b.shapes, name: other}, "is float32[1] in '{a}' and float32[2] in '{b}'"),
        ({**b.shapes, name: narrow}, "is float32[1] in '{a}' and float16[1] in '{b}'"),
        (less, "is float32[1] in '{a}' and missing in '{b}'"),
        ({**b.shapes, ("buffers", "stat/new"): other}, "stat/new is missing in '{a}'"),
    ):
        with pytest.raises(UserError) as raised:
            average.average([a, replace(b, shapes=shapes)], [1, 1], epath.Path(tmp_path))
        assert words.format(a=f"{runs / 'a'}@2", b=f"{runs / 'b'}@2") in str(raised.value)
        assert "These are no runs of one config" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights=1"], "--weights=1 are 1 numbers for 2 runs"),
        (["--weights=1,x"], "expected numbers, such as"),
        (["--weights=0,0"], "not all of them 0"),
        (["--weights=-1,2"], "at least 0"),
        (["--weights=nan,2"], "at least 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(
    runs: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out = f"--out={tmp_path / 'soup'}"
    said = refused(average.main, str(runs / "a"), str(runs / "b"), out, *words, EXTRA)
    assert message in said


def test_a_folder_with_checkpoints_and_a_step_that_is_not_there_are_refused(
    runs: Path, tmp_path: Path
) -> None:
    a = str(runs / "a")
    assert "holds checkpoints" in refused(average.main, a, a, f"--out={runs / 'b'}", EXTRA)
    out = f"--out={tmp_path / 'soup'}"
    assert "No checkpoint of step 7" in refused(average.main, a, f"{a}@7", out, EXTRA)


def test_integers_must_be_equal_and_values_finite(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of buffers that count; a float buffer is averaged like a parameter, whatever its name."""
    a, b = (average.ingredient(str(runs / name)) for name in "ab")
    counts = [
        {("buffers", "stat/n"): np.int32(n), ("buffers", "stat/m"): np.float32(n)} for n in (1, 2)
    ]
    values = {id(a): counts[0], id(b): counts[1]}
    monkeypatch.setattr(average.Ingredient, "read", lambda self: dict(values[id(self)]))
    with pytest.raises(UserError, match="buffers/stat/n is an array of int32, and differs"):
        average.mean([a, b], [1, 1])
    values[id(b)] = {**counts[1], ("buffers", "stat/n"): np.int32(1)}
    mean = average.mean([a, b], [1, 1])
    assert mean["buffers", "stat/m"] == 1.5 and mean["buffers", "stat/n"] == 1
    values[id(b)] = {**values[id(b)], ("buffers", "stat/m"): np.float32(np.nan)}
    with pytest.raises(UserError, match="stat/m has values that are not finite"):
        average.mean([a, b], [1, 1])


def test_another_tokenizer_is_refused_by_name(runs: Path) -> None:
    a, b = (average.ingredient(str(runs / name)) for name in "ab")
    for one, digest in ((a, "1" * 64), (b, "2" * 64)):
        one.meta["identities"]["modalities.text/t.model"] = digest
    with pytest.raises(UserError, match=r"different files of modalities.text/t.model: .* 1{12}"):
        average.check_alike(a, b)
    b.meta["identities"]["modalities.text/t.model"] = "1" * 64
    average.check_alike(a, b)
    b.meta["config"]["modalities"]["toy"]["scale"] = 2
    with pytest.raises(UserError, match="modalities.toy.scale is None in .* and 2 in"):
        average.check_alike(a, b)

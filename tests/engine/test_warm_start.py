"""Parameters to begin with: what matches, what is adapted, what is refused, and that it happens once."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from jax.nn import initializers
from toyrun import parts, run

import mmjax
from mmjax.core.config import build, check_compatible, key_class
from mmjax.core.errors import UserError
from mmjax.core.migrations import upgrade
from mmjax.core.parameters import LayerStack, Spec
from mmjax.engine import checkpoint
from mmjax.engine.state import EMA
from mmjax.engine.warm_start import (
    NameConfig,
    WarmStartConfig,
    check_files,
    pin,
    pin_all,
    resample,
    sources_of,
    warm_start,
    warm_starts,
)
from mmjax.run_config import RunConfig
from mmjax.training.initial_state import initial_state
from mmjax.training.session import begin

Values = dict[str, np.ndarray]
LAYERS = LayerStack(first=0, stride=1, repeat=2, prefix="trunk/layers", inner="query")


def spec(name: str, shape: tuple[int, ...], axes: Any, stack: LayerStack | None = None) -> Spec:
    return Spec(name, shape, axes, initializers.zeros, False, True, stack)


SPECS = {
    s.name: s
    for s in (
        spec("trunk/groups/0/query", (2, 4, 2, 3), ("layers", "embed", "heads", None), LAYERS),
        spec("stems/image/table", (6, 4), ("positions", "embed")),
        spec("stems/image/kernel", (5, 4), (None, "embed")),
        spec("heads/one/out", (4, 3), ("embed", None)),
    )
}
NAMES = ["trunk/layers/000/query", "trunk/layers/001/query", *list(SPECS)[1:]]
SHAPES = [(4, 2, 3), (4, 2, 3), (6, 4), (5, 4), (4, 3)]


def whole() -> Values:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in zip(NAMES, SHAPES, strict=True)}


def npz(folder: Path, values: Values) -> str:
    np.savez(folder / "weights.npz", **values)
    return str(folder / "weights.npz")


def safetensors(folder: Path, values: Values) -> str:
    """Write a file by the format's own words: length, header, bytes."""
    names = {"float32": "F32", "bfloat16": "BF16", "float64": "F64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in values.items():
        raw = value.tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {
            "dtype": names[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets
        }  # fmt: skip
        body += raw
    text = json.dumps(header).encode()
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return str(path)


def start(path: str, **settings: Any) -> tuple[Values, str]:
    said: list[str] = []
    return warm_start(WarmStartConfig(path, **settings), SPECS, said.append), "\n".join(said)


def test_without_a_path_nothing_is_read_or_said() -> None:
    assert start("") == ({}, "")


@pytest.mark.parametrize("write", [npz, safetensors])
def test_a_file_of_arrays(tmp_path: Path, write: Any) -> None:
    values = whole()
    found, said = start(write(tmp_path, values))
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[n], values[n]) for n in values)
    assert said.startswith("Initialised 5 of 5 parameters from ") and "random" not in said


def test_what_is_missing_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    """As of a file with the names that parameters have while a model is built: all layers as one."""
    values = whole()
    layers = np.stack([values.pop(NAMES[0]), values.pop(NAMES[1])])
    path = npz(tmp_path, {**values, "trunk/groups/0/query": layers})
    with pytest.raises(UserError) as raised:
        start(path)
    assert (
        "  2 of the 5 parameters are not there:\n"
        "    trunk/layers/*/query (2) (the nearest there: trunk/groups/0/query)\n"
    ) in str(raised.value)
    assert "  1 of the arrays there have no parameter here:\n    trunk/groups/0/query" in str(
        raised.value
    )
    found, said = start(path, strict=False)
    assert found.keys() == set(NAMES[2:])
    assert "initialised randomly (2): trunk/layers/*/query (2)\n" in said
    assert said.endswith("unused (1): trunk/groups/0/query")
    found, _ = start(path, skip=("trunk/.*",), ignore=("trunk/groups/.*",))
    assert found.keys() == set(NAMES[2:])


def test_every_array_that_is_not_used_is_named(tmp_path: Path) -> None:
    more = {f"decoder/{i}/kernel": np.zeros(1) for i in range(40)}
    more |= {f"part_{c}": np.zeros(1) for c in "abcdefghijklmnopqrst"}
    path = npz(tmp_path, {**whole(), **more})
    with pytest.raises(UserError) as raised:
        start(path)
    words = str(raised.value)
    assert "holds more than this config has:\n  60 of the arrays there" in words
    assert "decoder/*/kernel (40)" in words and "init_from.ignore" in words
    with pytest.raises(UserError, match="20 of the arrays there have no parameter here"):
        start(path, ignore=("decoder/.*",))
    with pytest.raises(UserError, match=r"init_from.ignore\[0\] = 'encoder/.\*' matches"):
        start(path, ignore=("encoder/.*",))
    _, said = start(path, ignore=("decoder/.*", "part_."))
    assert "unused (60): decoder/*/kernel (40), part_a, part_b" in said
    assert all(f"part_{c}" in said for c in "abcdefghijklmnopqrst")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    values = {n: v.astype(np.float64) for n, v in whole().items()}
    values["heads/one/out"][1, 2] = value
    path = npz(tmp_path, values)
    with pytest.raises(UserError, match="'heads/one/out' has 1 of 12 values that are not finite"):
        start(path)
    assert start(path, skip=("heads/.*",))[0].keys() == set(NAMES[:4])
    held = start(path, non_finite=True)[0]["heads/one/out"]
    np.testing.assert_array_equal(held, values["heads/one/out"])


def test_what_is_no_number_with_a_point_is_refused_only_where_it_is_needed(tmp_path: Path) -> None:
    values = {**whole(), "heads/one/out": np.ones((4, 3), np.int64), "step": np.array(3)}
    path = npz(tmp_path, values)
    with pytest.raises(UserError, match="'heads/one/out' is int64"):
        start(path, ignore=("step",))
    found, said = start(path, skip=("heads/.*",), ignore=("step",))
    assert len(found) == 4 and "unused (2): heads/one/out, step" in said


def test_bfloat16_is_read(tmp_path: Path) -> None:
    values = {n: v.astype(jnp.bfloat16) for n, v in whole().items()}
    found, _ = start(safetensors(tmp_path, values))
    assert found[NAMES[0]].dtype == jnp.bfloat16
    assert all(np.array_equal(found[n], values[n]) for n in values)


def test_names_by_pattern_and_matrices_the_other_way_round(tmp_path: Path) -> None:
    values = whole()
    theirs = {
        "blocks.0.q": values[NAMES[0]].reshape(4, 6).T,
        "blocks.1.q": values[NAMES[1]].reshape(4, 6).T,
        "patch": values["stems/image/kernel"],
        "classifier": np.zeros((9, 9), np.float32),
    }
    names = (
        NameConfig(r"trunk/layers/00(\d)/query", r"blocks.\1.q", transpose=True),
        NameConfig("stems/image/kernel", "patch"),
        NameConfig("stems/.*", "lost"),  # the first that matches counts
    )
    path = npz(tmp_path, theirs)
    with pytest.raises(
        UserError, match=r"2 of the 5 parameters are not there:\n    stems/image/table"
    ):
        start(path, names=names)
    skip = ("stems/image/table", "heads/.*")
    with pytest.raises(UserError, match=r"1 of the arrays there .*:\n    classifier\nGive"):
        start(path, names=names, skip=skip)
    found, said = start(path, names=names, skip=skip, ignore=("classifier",))
    assert found.keys() == {NAMES[0], NAMES[1], "stems/image/kernel"}
    assert all(np.array_equal(found[n], values[n]) for n in found)
    assert "adapted (2): trunk/layers/*/query [4, 6] -> [4, 2, 3] (2)" in said
    assert "initialised randomly (2): stems/image/table, heads/one/out" in said
    assert "unused (1): classifier" in said


def test_a_head_of_another_shape_begins_at_random_and_a_stem_is_refused(tmp_path: Path) -> None:
    values = {**whole(), "heads/one/out": np.zeros((4, 7), np.float32)}
    found, said = start(npz(tmp_path, values), strict=False)
    assert "heads/one/out" not in found and len(found) == 4
    assert "initialised randomly (1): heads/one/out (there [4, 7])" in said
    with pytest.raises(UserError, match=r"heads/one/out: expected \[4, 3\], found \[4, 7\]"):
        start(npz(tmp_path, values))
    assert start(npz(tmp_path, values), skip=("heads/one/out",))[0].keys() == found.keys()
    values["stems/image/kernel"] = np.zeros((8, 4), np.float32)
    for strict in (True, False):
        with pytest.raises(
            UserError, match=r"stems/image/kernel: expected \[5, 4\], found \[8, 4\]"
        ):
            start(npz(tmp_path, values), strict=strict)
    found, _ = start(npz(tmp_path, values), skip=("stems/image/kernel", "heads/.*"))
    assert "stems/image/kernel" not in found and len(found) == 3


def test_position_tables_are_resampled(tmp_path: Path) -> None:
    values = {**whole(), "stems/image/table": np.arange(12, dtype=np.float32).reshape(3, 4)}
    found, said = start(npz(tmp_path, values))
    expected = [0, 2, 4, 6, 8, 8]  # the first column: 0, 4, 8, and half way between
    assert found["stems/image/table"][:, 0].tolist() == expected
    assert "stems/image/table [3, 4] -> [6, 4]" in said


@given(old=st.integers(1, 40), factor=st.integers(1, 5))
def test_what_stands_in_both_tables_stays(old: int, factor: int) -> None:
    table = np.random.default_rng(old).normal(size=(old, 3)).astype(np.float32)
    fine = resample(table, old * factor)
    assert np.array_equal(fine[::factor], table)
    assert np.array_equal(resample(fine, old), table)


# --- what is refused ---------------------------------------------------------------------------


def test_what_is_not_there_or_no_arrays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        start(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        start(str(tmp_path))
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="may hold code"):
        start(str(tmp_path / "model.pt"))


def test_a_pickle_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    traps = np.full((4, 2, 3), Trap(), dtype=object)
    np.savez(tmp_path / "trap.npz", **{**whole(), NAMES[0]: traps})
    with pytest.raises(UserError, match=f"cannot be read: '{NAMES[0]}' has the dtype object"):
        start(str(tmp_path / "trap.npz"))
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "trap.npz", allow_pickle=True)[NAMES[0]]  # the control
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("size", [3, 20, -5])
def test_a_torn_file_is_refused(tmp_path: Path, size: int) -> None:
    path = Path(safetensors(tmp_path, whole()))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"weights.safetensors' cannot be read"):
        start(str(path))


def test_a_file_of_other_names_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, {"w": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"none of the 5 parameters is in .* which holds w\."):
        start(path)


def test_a_pattern_that_matches_nothing_here_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, whole())
    with pytest.raises(UserError, match=r"init_from\.skip\[0\].*The nearest: .*stems/image/kernel"):
        start(path, skip=("stems/image/kernl",))
    with pytest.raises(UserError, match=r"init_from\.names\[0\]\.match"):
        start(path, names=(NameConfig("stem/.*", "x"),))
    with pytest.raises(
        UserError, match=r"init_from\.names: '.2' is no name for what 'stems/\(\.\*\)'"
    ):
        start(path, names=(NameConfig("stems/(.*)", r"\2"),))


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [npz, safetensors])
def test_the_parameters_of_a_loaded_run_are_a_source(tmp_path: Path, write: Any) -> None:
    """Every one of them, the layers of the trunk too, under the name that the checkpoint has."""
    run(tmp_path / "run", "steps=2", "evaluation.every=0")
    model = mmjax.load(str(tmp_path / "run"))
    file = write(tmp_path, {name: np.asarray(value) for name, value in model.parameters.items()})
    specs, said = parts().experiment.declaration.specs, list[str]()
    found = warm_start(WarmStartConfig(file), specs, said.append)
    held = toyrun.parameters(tmp_path / "run")
    assert found.keys() == held.keys() >= {"trunk/layers/001/inner/kernel"}
    assert all(np.array_equal(found[name], held[name]) for name in held)
    assert said == [f"Initialised {len(held)} of {len(held)} parameters from {file}."]


def test_a_run_that_began_before_names_were_strict_keeps_what_it_began_with() -> None:
    """Restarted before its first checkpoint, or replayed: what was missing is random, and NaN is taken."""
    config = {"init_from": {"path": "x.npz"}, "optimizer": {}}
    assert upgrade(config, 1) == {
        "init_from": {"path": "x.npz", "strict": False, "non_finite": True, "ignore": [".*"]},
        "optimizer": {},
    }
    assert upgrade(config, 2) == {
        "init_from": {"path": "x.npz", "ignore": [".*"]}, "optimizer": {},
    }  # fmt: skip
    for plain in ({}, {"init_from": {"path": ""}}):
        assert upgrade(plain, 1) == plain
    old = upgrade(config, 1)
    assert not check_compatible(old, old, False, RunConfig)
    # Neither key matters for a run that has a checkpoint.
    assert {d.kind for d in check_compatible(old, config, False, RunConfig)} == {"free"}


def test_a_run_begins_where_another_ended_and_never_looks_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "first", "steps=2", "optimizer.ema=0.5", "evaluation.every=0")
    first = toyrun.parameters(tmp_path / "first")
    warm = [
        f"init_from.path={tmp_path / 'first'}", "init_from.skip=['heads/two/.*']", "seed=1",
        "optimizer.ema=0.9", "evaluation.every=0",
    ]  # fmt: skip
    toy = parts(*warm)
    session = begin(toy.experiment, epath.Path(_folder(tmp_path / "look")), toy.mesh, False, print)
    held = session.canonical(initial_state(toy.experiment, toy.mesh, session.start))
    for name, value in first.items():
        if name.startswith("heads/two/out/kernel"):
            assert not np.array_equal(held["parameters"][name], value)
        elif not name.startswith("heads/two"):
            assert np.array_equal(held["parameters"][name], value)
            assert np.array_equal(held["buffers"][EMA + name], value)
            assert not np.any(held["optimizer"][name]["mu"])
    assert "Initialised" in capsys.readouterr().out
    # Straight, and stopped after it has begun, with nothing there to look at any more.
    run(tmp_path / "straight", *warm, "steps=4")
    run(tmp_path / "halved", *warm, "steps=2")
    shutil.rmtree(tmp_path / "first")
    capsys.readouterr()
    run(tmp_path / "halved", *warm, "steps=4")
    assert "Initialised" not in capsys.readouterr().out
    assert toyrun.bits(tmp_path / "halved") == toyrun.bits(tmp_path / "straight")


def test_begun_again_a_run_takes_the_step_that_it_took_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other run continues between two beginnings of this one, of which the first left no checkpoint."""
    source, workdir = tmp_path / "first", tmp_path / "second"
    run(source, "steps=2", "evaluation.every=0", "checkpoint.every=1")
    early = toyrun.parameters_of(source, 2)
    toy = parts(f"init_from.path={source}")
    begin(toy.experiment, epath.Path(_folder(workdir)), toy.mesh, False, print)
    run(source, "steps=4", "evaluation.every=0", "checkpoint.every=1", "checkpoint.keep=3")
    given = begin(toy.experiment, epath.Path(workdir), toy.mesh, False, print).start.parameters
    assert given.keys() == early.keys()
    assert all(np.array_equal(given[name], early[name]) for name in given)
    assert "step 2 of" in capsys.readouterr().out
    # Where that step is no longer kept, it takes the newest with leave only, and logs it.
    shutil.rmtree(source / "checkpoints" / "2")
    with pytest.raises(UserError, match="init_from has changed since"):
        begin(toy.experiment, epath.Path(workdir), toy.mesh, False, print)
    given = begin(toy.experiment, epath.Path(workdir), toy.mesh, True, print).start.parameters
    late = toyrun.parameters_of(source, 4)
    assert all(np.array_equal(given[name], late[name]) for name in given)
    assert any(not np.array_equal(early[name], late[name]) for name in late)
    assert "init_from has changed since this run first began" in capsys.readouterr().out
    assert json.loads((workdir / "init_from.json").read_text())["step"] == 4


def test_a_file_that_changes_between_two_beginnings_is_told(tmp_path: Path) -> None:
    path, said = npz(tmp_path, whole()), list[str]()
    config, workdir = WarmStartConfig(path), epath.Path(_folder(tmp_path / "run"))
    for _ in range(2):
        assert pin(config, workdir, said.append, False) is None
    assert not said
    npz(tmp_path, {**whole(), "more": np.zeros(1)})
    with pytest.raises(UserError, match="init_from has changed since .* --allow_change"):
        pin(config, workdir, said.append, False)
    pin(config, workdir, said.append, True)
    assert len(said) == 1 and said[0].startswith("init_from has changed")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_averages_to_begin_with(tmp_path: Path) -> None:
    run(tmp_path, "steps=2", "optimizer.ema=0.9", "evaluation.every=0")
    toy = parts()
    specs = toy.experiment.declaration.specs
    found = warm_start(WarmStartConfig(str(tmp_path), average=True), specs, print)
    shapes = checkpoint.read_shapes(epath.Path(tmp_path), 2)
    assert found.keys() == shapes["parameters"].keys()
    last = toyrun.parameters(tmp_path)
    assert any(not np.array_equal(found[n], last[n]) for n in found)
    with pytest.raises(UserError, match="none of the"):
        warm_start(WarmStartConfig(str(tmp_path)), SPECS, print)


TABLE = spec("stems/text/embedding", (8, 4), ("vocabulary", "embed"))


@pytest.mark.parametrize(
    ("taken", "there", "refused"),
    [
        (["stems/text/embedding"], {"modalities.text/a.model": "1" * 64}, True),
        (["stems/text/embedding"], {"modalities.text/b.model": "2" * 64}, False),
        (["stems/image/kernel"], {"modalities.text/a.model": "1" * 64}, False),
        (["stems/text/embedding"], {"modalities.sound/a.model": "1" * 64}, False),
    ],
)
def test_a_table_of_another_tokenizers_pieces_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[str], there: Any, refused: bool
) -> None:
    """The same file under another name is the same."""
    monkeypatch.setattr(checkpoint, "read_meta", lambda path, step: {"identities": there})
    specs = {**SPECS, TABLE.name: TABLE}
    values = {name: np.zeros(2, np.float32) for name in taken}
    here = {"modalities.text/my.model": "2" * 64, "tasks.one.source": "3" * 64}
    config = WarmStartConfig(str(tmp_path))
    check_files(config, None, specs, values, here)
    words = r"1{12}.*2{12}.*skip=\['stems/text/embedding'\]"
    with pytest.raises(UserError, match=words) if refused else nullcontext():
        check_files(config, 4, specs, values, here)


def test_several_sources_give_each_its_own_part(tmp_path: Path) -> None:
    values, other = whole(), {n: -v for n, v in whole().items()}
    one = npz(_folder(tmp_path / "one"), values)
    two = npz(_folder(tmp_path / "two"), {n: other[n] for n in NAMES[:3]})
    layers = WarmStartConfig(two, only=("trunk/.*",))
    stems = WarmStartConfig(one, only=("stems/.*",), skip=("stems/image/kernel",))
    said: list[str] = []
    parts = warm_starts([layers, stems], SPECS, said.append, [None, None])
    assert [sorted(part) for part in parts] == [NAMES[:2], ["stems/image/table"]]
    assert np.array_equal(parts[0][NAMES[0]], other[NAMES[0]])
    assert np.array_equal(parts[1]["stems/image/table"], values["stems/image/table"])
    assert said[0].startswith("Initialised 2 of 2 parameters from ")
    assert "No source has a part in (2): stems/image/kernel, heads/one/out" in said
    # What one excludes, another may have.
    rest = WarmStartConfig(one, skip=("trunk/.*", "stems/image/table"))
    table = WarmStartConfig(two, only=("stems/image/table",))
    parts = warm_starts([layers, rest, table], SPECS, said.append, [None] * 3)
    assert set().union(*parts) == set(NAMES)


def test_two_sources_of_one_parameter_are_refused_by_name(tmp_path: Path) -> None:
    one = npz(_folder(tmp_path / "one"), whole())
    two = npz(_folder(tmp_path / "two"), whole())
    sources = [WarmStartConfig(one, only=("stems/.*",)), WarmStartConfig(two)]
    words = f"'{one}' and '{two}' both claim 'stems/image/table'"
    with pytest.raises(UserError, match=words):
        warm_starts(sources, SPECS, print, [None, None])


def test_every_parameter_of_a_part_must_be_there(tmp_path: Path) -> None:
    values = whole()
    del values[NAMES[1]]
    path = npz(tmp_path, values)
    assert start(path, only=("stems/.*",))[0].keys() == set(NAMES[2:4])
    words = "1 of the 2 parameters are not there:\n    trunk/layers/001/query"
    with pytest.raises(UserError, match=words):
        start(path, only=("trunk/.*",))
    with pytest.raises(UserError, match=r"init_from.only\[0\] = 'tronk/.\*' matches"):
        start(path, only=("tronk/.*",))


def test_a_list_of_sources_is_checked_like_one() -> None:
    def read(value: Any) -> Any:
        return build(RunConfig, {**toyrun.block(), "init_from": value}, "config").init_from

    two = read([{"path": "a", "only": ["stems/.*"]}, {"path": "b"}])
    assert [source.path for source in sources_of(two)] == ["a", "b"]
    assert sources_of(read({})) == () and len(sources_of(read({"path": "a"}))) == 1
    with pytest.raises(UserError, match=r"'config.init_from\[1\].pth'.*path"):
        read([{"path": "a"}, {"pth": "b"}])
    with pytest.raises(UserError, match=r"init_from\[1\].path is missing"):
        sources_of(read([{"path": "a"}, {}]))
    listed = {"init_from": [{"path": "a", "strict": False}]}
    assert key_class("init_from.0.strict", RunConfig, listed) == "free"
    assert key_class("init_from.0.path", RunConfig, listed) == "structural"


def test_the_step_of_each_source_is_settled_once(tmp_path: Path) -> None:
    """A file's digest and a run's step are recorded together."""
    path = npz(tmp_path, whole())
    source, workdir = tmp_path / "first", epath.Path(_folder(tmp_path / "run"))
    for step in (2, 3):
        _folder_all(source / "checkpoints" / str(step))
    sources = [WarmStartConfig(str(source)), WarmStartConfig(path)]
    assert pin_all(sources, workdir, print, False) == [3, None]
    _folder_all(source / "checkpoints" / "4")
    assert pin_all(sources, workdir, print, False) == [3, None]
    record = json.loads((workdir / "init_from.json").read_text())
    assert [one["path"] for one in record["sources"]] == [str(source), path]
    npz(tmp_path, {**whole(), "more": np.zeros(1)})
    with pytest.raises(UserError, match="init_from has changed since"):
        pin_all(sources, workdir, print, False)


def _folder_all(path: Path) -> None:
    path.mkdir(parents=True)

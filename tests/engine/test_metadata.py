"""The meta data of a checkpoint: what is refused, and that hostile ones end in words and not in a traceback."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
import toyrun
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmjax.core.errors import UserError
from mmjax.core.sharding import make_mesh
from mmjax.engine import checkpoint, metadata
from mmjax.engine.integrity import Damaged, seal
from mmjax.experiment import Experiment, make_experiment
from mmjax.training.session import Session, begin

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "format1.zip"
META: dict[str, Any] = {
    "clock": {
        "step": 4,
        "segments": [
            {"start": 0, "rule": "shares", "weights": [["one", 2], ["two", 1]], "base": {}, "seed": 0}
        ],
        "positions": {"one": 24, "two": 16},
        "skipped": {"one": 0, "two": 0},
        "invalid": {"one": 1, "two": 0},
        "health": {"one": {"bad": 0, "first": [1.5, 2.5], "last": [0.25]}},
        "quarantined": {},
    },
    "config": {
        "steps": 8,
        "tasks": {n: {"objective": {"name": "toy"}, "inputs": {"toy": {}}} for n in ("one", "two")},
    },
    "identities": {"tasks.one.source": "ab"},
    "environment": {"jax": "0.10.2", "mesh": {"data": 1}},
}  # fmt: skip


def write(workdir: Path, document: Any, step: str = "4") -> epath.Path:
    path = workdir / "checkpoints" / step / "meta" / "metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return epath.Path(workdir)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    workdir = write(tmp_path, metadata.document(4, META))
    read = checkpoint.read_meta(workdir, 4)
    assert {key: read[key] for key in META} == META
    assert read["format"] == 2 and read["step"] == 4 and "sha256" not in read
    assert checkpoint.is_verified(read)


def test_a_document_of_format_1_is_read_and_not_verified(tmp_path: Path) -> None:
    workdir = write(tmp_path, {"format": 1, **META})
    read = checkpoint.read_meta(workdir, 4)
    assert {key: read[key] for key in META} == META and not checkpoint.is_verified(read)


def changed(path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy({"format": 1, **META})
    *parents, last = path.split(".")
    block: Any = document
    for key in parents:
        block = block[int(key) if isinstance(block, list) else key]
    if value is None:
        del block[last]
    else:
        block[int(last) if isinstance(block, list) else last] = value
    return document


WRONG: dict[str, tuple[Any, str]] = {
    "no clock": (changed("clock", None), "its clock cannot be read"),
    "a clock that is a list": (changed("clock", [1]), "its clock cannot be read"),
    "another step": (changed("clock.step", 3), "its clock is at step 3"),
    "a step that is a text": (changed("clock.step", "4"), "its clock.step"),
    "a step that is true": (changed("clock.step", True), "its clock.step"),
    "no segments": (changed("clock.segments", []), "its clock cannot be read"),
    "a rule that is none": (
        changed("clock.segments.0.rule", 3),
        "its clock cannot be read",
    ),
    "weights without end": (changed("clock.segments.0.weights.0", ["one", 1e9]), "cannot be read"),
    "a task that is none": (changed("clock.segments.0.weights.0", ["onf", 2]), "names tasks"),
    "positions that are texts": (changed("clock.positions.one", "24"), "its clock.positions"),
    "positions below 0": (changed("clock.positions.one", -1), "its clock.positions"),
    "losses that are texts": (changed("clock.health.one.last.0", "1"), "its clock.health"),
    "quarantined tasks in a list": (changed("clock.quarantined", ["one"]), "its clock.quarantined"),
    "no config": (changed("config", None), "no config"),
    "a config that is a text": (changed("config", "toy"), "no config"),
    "tasks in a list": (changed("config.tasks", ["one"]), "its config"),
    "a task that is a number": (changed("config.tasks.one", 5), "its config"),
    "an objective that is a text": (changed("config.tasks.one.objective", "toy"), "its config"),
    "an optimizer that is a list": (changed("config.optimizer", [1]), "its config"),
    "identities in a list": (changed("identities", ["a"]), "no identities"),
    "a version that is a text": (changed("config_version", "2"), "config_version"),
    "no format": (changed("format", None), "no format"),
    "a format that is a text": (changed("format", "1"), "no format"),
    "format 0": (changed("format", 0), "no format"),
    "format 2 without a seal": (changed("format", 2), "no SHA-256"),
    "a seal that is another's": (seal(META) | {"format": 1}, "does not match"),
    "a list": ([META], "no format"),
    "nothing": ("", "JSONDecodeError"),
    "brackets without end": ("[" * 100_000, "Recursion"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_damage_and_named(tmp_path: Path, what: str) -> None:
    document, cause = WRONG[what]
    with pytest.raises(Damaged, match=cause):
        checkpoint.read_meta(write(tmp_path, document), 4)


def test_a_folder_under_another_name_is_damage(tmp_path: Path) -> None:
    write(tmp_path, metadata.document(10, {**META, "clock": {**META["clock"], "step": 10}}), "10")
    assert checkpoint.read_meta(epath.Path(tmp_path), 10)["step"] == 10
    shutil.move(tmp_path / "checkpoints" / "10", tmp_path / "checkpoints" / "15")
    with pytest.raises(Damaged, match="15' is damaged: it was saved as step 10"):
        checkpoint.read_meta(epath.Path(tmp_path), 15)
    write(tmp_path, metadata.document(10, {**META, "clock": {**META["clock"], "step": 9}}), "10")
    with pytest.raises(Damaged, match="its clock is at step 9"):
        checkpoint.read_meta(epath.Path(tmp_path), 10)


def test_every_changed_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    workdir = write(tmp_path, metadata.document(4, META))
    expected = checkpoint.read_meta(workdir, 4)
    path = tmp_path / "checkpoints" / "4" / "meta" / "metadata"
    content = path.read_bytes()
    for at in range(len(content)):
        bit = 1 << at % 8
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            assert checkpoint.read_meta(workdir, 4) == expected
        except UserError as error:
            # A format above 2 is not known to be damage: it is refused.
            assert isinstance(error, Damaged) or "Install a newer mmjax" in str(error)


# --- hostile ones, in a run --------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Experiment]]:
    """Yield a run of format 1, whose arrays are read once."""
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN) as file:
        file.extractall(folder)
    toyrun.block()
    workdir = epath.Path(folder)
    experiment = make_experiment(checkpoint.read_meta(workdir, 4)["config"])
    shapes = checkpoint.read_shapes(workdir, 4)
    state = checkpoint.read_state(
        workdir, 4, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), shapes)
    )
    with (
        mock.patch.object(checkpoint, "read_shapes", lambda *_: shapes),
        mock.patch.object(checkpoint, "read_state", lambda *_: dict(state)),
    ):
        yield folder, experiment


def start(folder: Path, experiment: Experiment, document: Any) -> Session | None:
    """Begin the run with these meta data; None where it is refused."""
    write(folder, document)
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:1])
    try:
        session = begin(experiment, epath.Path(folder), mesh, True, lambda _: None)
        _ = session.was_evaluated, session.clock.schedule.sequence(session.clock.step, 20)
        return session
    except UserError:
        return None
    finally:
        aside = folder / "torn" / "4"
        if aside.exists():
            shutil.move(aside, folder / "checkpoints" / "4")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield from places(inner, (*path, key))


ORIGINAL = json.loads(zipfile.ZipFile(GOLDEN).read("checkpoints/4/meta/metadata"))
PLACES = list(places(ORIGINAL))[1:]
VALUES: Any = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3,
        2**70,
        0.5,
        1e300,
        "",
        "one",
        "toy",
        [],
        [1],
        [[]],
        {},
        {"one": 1},
        {"": {}},
    ]
)
DELETED = object()


@given(place=st.sampled_from(PLACES), value=VALUES | st.just(DELETED), sealed=st.booleans())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_meta_data_end_in_words(
    golden: tuple[Path, Experiment], place: tuple[Any, ...], value: Any, sealed: bool
) -> None:
    """Anything in the place of anything, under no seal and under one that is right."""
    document = copy.deepcopy(ORIGINAL)
    block = document
    for key in place[:-1]:
        block = block[key]
    if value is DELETED:
        del block[place[-1]]
    else:
        block[place[-1]] = value
    if sealed and isinstance(document.get("format"), int):
        document = seal({**document, "format": 2, "step": 4})
    session = start(*golden, document)
    if json.dumps(document) == json.dumps(ORIGINAL):  # to Python, 1 is True
        assert session is not None and session.clock.step == 4


def test_a_change_of_the_schedule_may_go_with_a_run_of_format_1(
    golden: tuple[Path, Experiment],
) -> None:
    """The control of the test above: it does not refuse everything."""
    assert start(*golden, ORIGINAL) is not None
    other = copy.deepcopy(ORIGINAL)
    other["clock"]["positions"]["one"] = 32
    session = start(*golden, other)
    assert session is not None and session.clock.positions["one"] == 32

"""What a checkpoint or a config holds, in tables; and a digest that depends on the parameters alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toyrun
from etils import epath
from mains import refused, run

from mmjax import show
from mmjax.core.parameters import digest
from mmjax.engine import checkpoint
from mmjax.engine.checkpoint import CheckpointConfig, Checkpoints
from mmjax.engine.state import Clock, init_state, state_to_canonical
from mmjax.experiment import make_experiment

TINY = Path(__file__).resolve().parent / "configs" / "tiny.py"

# The tiny config counted by hand: width 32, heads of 16, two layers of hidden size 64.
_LAYER = 4 * 32 * 32 + 2 * 32 * 64 + 2 * 32
_DECODER = 4 * 32 * 32 + 2 * 32 * 128 + 2 * 32
PARTS = {
    "trunk": 2 * _LAYER + 2 * 32,
    "stems/image": (8 * 8 * 3 + 1) * 32 + 2 * 64 * 32 + 2 * 32,
    "stems/text": 2048 * 32 + 128 * 32 + 2 * 32,
    "heads/image_text": 2 * 32 * 16 + 1,
    "heads/masked_image": 33 * 32 + 32 + (2 * 64 + 2) * 32 + _DECODER + 2 * 32 + 33 * 8 * 8 * 3,
}
# One token meets one row of each table that is looked up.
ACTIVE = {
    **PARTS,
    "stems/image": (8 * 8 * 3 + 1) * 32 + 2 * 32 + 2 * 32,
    "stems/text": 32 + 32 + 2 * 32,
    "heads/masked_image": PARTS["heads/masked_image"] - 2 * 63 * 32,
}


def cells(text: str) -> list[list[str]]:
    return [line.replace(",", "").split() for line in text.splitlines()]


def totals(text: str) -> dict[str, int]:
    """Part -> total of the table of parameters."""
    parts = {*PARTS, "all"}
    return {row[0]: int(row[1]) for row in cells(text) if row and row[0] in parts}


def shown(*arguments: str) -> str:
    ended = run(show.main, *arguments)
    assert (ended.status, ended.err) == (0, "")
    return ended.out


# --- a checkpoint ------------------------------------------------------------------------------


def test_a_checkpoint_shows_where_the_run_stands(tiny_run):
    out = shown(str(tiny_run))
    first = out.splitlines()[0]
    assert str(tiny_run) in first and "step 14 of 14" in first
    # Shares 2 to 1 over 14 steps; batches of 16 and 8.
    assert ["image_text", "9", str(9 * 16), "0", "0"] in cells(out)
    assert ["masked_image", "5", str(5 * 8), "0", "0"] in cells(out)
    assert ["0", "shares", "image_text", "2", "masked_image", "1"] in cells(out)
    assert totals(out) == {**PARTS, "all": sum(PARTS.values())}
    # Adam holds two arrays of each parameter's size, and a count.
    held = {row[0]: row for row in cells(out) if row and row[0] in ("parameters", "optimizer")}
    kib = sum(PARTS.values()) * 4 / 1024
    assert float(held["parameters"][2]) == pytest.approx(kib, rel=0.01)
    assert float(held["optimizer"][2]) == pytest.approx(2 * kib, rel=0.01)


def test_an_older_checkpoint_by_its_step(tiny_run):
    out = shown(str(tiny_run), "--step=12")
    assert "step 12 of 14" in out.splitlines()[0]
    assert ["image_text", "8", "128", "0", "0"] in cells(out)


def test_every_word_fits_80_columns(tiny_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(str(tiny_run)).splitlines()[1:]
    assert max(map(len, lines)) <= 80


# --- the digest --------------------------------------------------------------------------------


def last_line(*arguments: str) -> str:
    return shown(*arguments, "--digest").splitlines()[-1]


def test_the_digest_is_the_last_line_and_of_the_parameters(tiny_run):
    shapes = checkpoint.read_shapes(tiny_run, 14)["parameters"]
    sha = hashlib.sha256()
    for name, array in sorted(show.read_arrays(tiny_run, 14, shapes).items()):
        assert array.dtype == np.dtype("<f4")
        sha.update(f"{name} float32 {array.shape}\n".encode() + array.tobytes("C"))
    assert last_line(str(tiny_run)) == sha.hexdigest()
    assert last_line(str(tiny_run), "--step=12") != sha.hexdigest()
    assert sha.hexdigest() not in shown(str(tiny_run))


def test_with_all_the_digest_is_of_the_whole_state(tiny_run):
    shapes, sha = checkpoint.read_shapes(tiny_run, 14), hashlib.sha256()
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), dict(shapes))
    state = checkpoint.read_state(tiny_run, 14, abstract)
    arrays = {f"parameters/{n}": x for n, x in state["parameters"].items()}
    for name, fields in state["optimizer"].items():
        arrays |= {f"optimizer/{name}/{field}": x for field, x in fields.items()}
    assert set(state) == {"parameters", "optimizer"}
    for name, x in sorted(arrays.items()):
        sha.update(f"{name} {x.dtype} {x.shape}\n".encode() + np.asarray(x).tobytes("C"))
    assert last_line(str(tiny_run), "--all") == sha.hexdigest() != last_line(str(tiny_run))
    assert "give --digest --all" in refused(show.main, str(tiny_run), "--all")


def test_the_digest_outlives_the_place_and_the_process(tiny_run, tmp_path, command):
    shutil.copytree(tiny_run, tmp_path / "moved")
    done = command("show", str(tmp_path / "moved"), "--digest")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == last_line(str(tiny_run))


def test_the_digest_tells_a_bit_a_name_and_a_shape():
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.zeros((), np.float32)}
    other = {**arrays, "a": np.nextafter(arrays["a"], np.float32(9))}
    renamed = {"a": arrays["a"], "c": arrays["b"]}
    reshaped = {**arrays, "a": arrays["a"].reshape(2, 3)}
    found = [digest(each) for each in (arrays, other, renamed, reshaped)]
    assert len(set(found)) == 4
    assert digest(dict(reversed(arrays.items()))) == found[0]


def initial(folder: Path, *overrides: str) -> str:
    """The digest of a checkpoint of the toy config's initial state."""
    experiment = make_experiment(toyrun.block(*overrides))
    zeros = dict.fromkeys(experiment.tasks, 0)
    clock = Clock(0, experiment.planned.schedule(), zeros, zeros, zeros)
    state = jax.jit(
        lambda: init_state(
            experiment.declaration, experiment.optimizers.whole, experiment.run.seed, jnp.float32
        )
    )()
    with Checkpoints(epath.Path(folder), CheckpointConfig()) as checkpoints:
        tree = state_to_canonical(experiment.declaration.specs, state)
        checkpoints.save(0, tree, {"clock": clock.to_json(), "config": experiment.block})
        checkpoints.wait()
    return last_line(str(folder))


def test_the_digest_does_not_depend_on_how_layers_are_grouped(tmp_path):
    layer = "{'name': 'toy'}"
    groups = {
        "one": f"[{{'repeat': 2, 'blocks': [{layer}]}}]",
        "two": f"[{{'repeat': 1, 'blocks': [{layer}]}}, {{'repeat': 1, 'blocks': [{layer}]}}]",
        "blocks": f"[{{'repeat': 1, 'blocks': [{layer}, {layer}]}}]",
    }
    found = {n: initial(tmp_path / n, f"model.layers={g}") for n, g in groups.items()}
    assert len(set(found.values())) == 1, found
    assert initial(tmp_path / "seed", "seed=1") not in found.values()


# --- a config ----------------------------------------------------------------------------------


def test_a_config_shows_its_parameters_without_a_checkpoint(tiny_run):
    out = shown(f"--config={TINY}")
    rows = {row[0]: [int(n) for n in row[1:3]] for row in cells(out) if row and row[0] in PARTS}
    assert rows == {part: [PARTS[part], ACTIVE[part]] for part in PARTS}
    everything = next(row for row in cells(out) if row and row[0] == "all")
    assert everything[1:3] == [str(sum(PARTS.values())), str(sum(ACTIVE.values()))]
    assert totals(out) == totals(shown(str(tiny_run)))


def test_names_are_those_of_the_checkpoint_with_shapes_and_dtypes(tiny_run, tmp_path):
    """One line for each parameter, the same of the run, of its config, and of a file of them."""
    lines = shown(str(tiny_run), "--names").splitlines()
    shapes = checkpoint.read_shapes(tiny_run, 14)["parameters"]
    assert [line.split(None, 1) for line in lines] == [
        [name, f"float32{list(shapes[name].shape)}"] for name in sorted(shapes)
    ]
    assert shown(f"--config={TINY}", "--names").splitlines() == lines
    assert "bfloat16[32, 2, 16]" in shown(
        f"--config={TINY}", "--names", "--config.dtype.parameters=bfloat16"
    )
    file = tmp_path / "w.npz"
    np.savez(file, **{name: np.zeros(s.shape, np.float32) for name, s in shapes.items()})
    assert shown(str(file), "--names").splitlines() == lines


def test_overrides_count():
    wider = totals(shown(f"--config={TINY}", "--config.tasks.image_text.objective.embed_dim=24"))
    assert wider["heads/image_text"] == 2 * 32 * 24 + 1
    assert wider["trunk"] == PARTS["trunk"]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give a run's folder, or --config=CONFIG"),
        (["{run}", f"--config={TINY}"], "Give a run's folder, or --config=CONFIG"),
        (["{run}/nothing"], "No checkpoint in '{run}/nothing'. Train first"),
        (["{run}", "--step=3"], "No checkpoint of step 3 in '{run}'. There are: 14, 12."),
        ([f"--config={TINY}", "--config.model.widht=3"], "Did you mean 'width'?"),
        (["--config=nowhere.py"], "No config file 'nowhere.py'"),
    ],
)
def test_what_cannot_be_shown(tiny_run, arguments, words):
    message = refused(show.main, *(a.format(run=tiny_run) for a in arguments))
    assert words.format(run=tiny_run) in message and "\n" not in message


@pytest.mark.parametrize("fault", ["gone", "cut", "newer"])
def test_a_torn_checkpoint_is_one_line(tiny_run, tmp_path, fault):
    shutil.copytree(tiny_run, tmp_path / "run")
    meta = epath.Path(tmp_path / "run" / "checkpoints" / "14" / "meta" / "metadata")
    text = meta.read_text()
    if fault == "gone":
        meta.unlink()
    else:
        meta.write_text(
            text[:50] if fault == "cut" else json.dumps({**json.loads(text), "format": 99})
        )
    message = refused(show.main, str(tmp_path / "run"))
    assert "14" in message and "\n" not in message
    assert ("newer mmjax" if fault == "newer" else "Choose another step") in message
    assert "step 12 of 14" in shown(str(tmp_path / "run"), "--step=12")

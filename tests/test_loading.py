"""Three lines anywhere: a run's vectors, without its data, its mesh, its place or any code in it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from metafile import edited
from PIL import Image

import mmjax
from mmjax import evaluate
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import from_canonical, to_canonical
from mmjax.core.sharding import make_mesh
from mmjax.data.tokenizer import train
from mmjax.engine import checkpoint
from mmjax.engine.checkpoint import CheckpointConfig, Checkpoints
from mmjax.engine.state import shardings
from mmjax.experiment import make_experiment
from mmjax.loading import TrainedModel
from mmjax.modalities.base import asset_name
from mmjax.nn import trunk
from mmjax.report import page
from mmjax.sources.tfds import Tfds

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16  # of the tiny config's joint space

THREE_LINES = """
import mmjax
model = mmjax.load("elsewhere/run")
vectors = model.embed(text=["a red apple", "dog"])

import sys
import jax
import numpy as np
pixels = np.load("pixels.npy")
np.savez("vectors.npz", text=vectors, image=model.embed(image=list(pixels)), devices=len(jax.devices()))
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def model(tiny_run: epath.Path) -> TrainedModel:
    return mmjax.load(str(tiny_run))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Return `[5, 24, 20, 3]` uint8."""
    return np.random.default_rng(0).integers(0, 256, (5, 24, 20, 3), np.uint8)


@pytest.fixture
def copy(tiny_run: epath.Path, tmp_path: Path) -> Path:
    """Return a copy of the run to change."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


# --- three lines anywhere ----------------------------------------------------------------------


def test_a_fresh_process_elsewhere_without_the_data(model, pictures, copy, tmp_path):
    """One device there, eight here; the run moved, its data folder out of reach."""
    (tmp_path / "elsewhere").mkdir()
    shutil.move(copy, tmp_path / "elsewhere" / "run")
    np.save(tmp_path / "pixels.npy", pictures)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "MMJAX_DATA_DIR": str(tmp_path / "no_data"),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", THREE_LINES],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    there = np.load(tmp_path / "vectors.npz")
    assert (int(there["devices"]), len(jax.devices())) == (1, 8)
    np.testing.assert_allclose(
        there["text"], model.embed(text=["a red apple", "dog"]), atol=1e-6, rtol=0
    )
    np.testing.assert_allclose(there["image"], model.embed(image=list(pictures)), atol=1e-6, rtol=0)


def test_what_lies_over_eight_devices_loads_on_one(tiny_run, model, tmp_path):
    """The run's parameters, saved again in parts over a mesh of 2 x 4."""
    block = configs.override(model.config, ["mesh.data=2", "mesh.fsdp=4"])
    experiment = make_experiment(block, str(tiny_run / "assets"))
    specs = experiment.declaration.specs
    placed = shardings(experiment.abstract_state(make_mesh(experiment.run.mesh)).parameters)
    stacked = from_canonical(specs, model.parameters)
    parameters = {n: jax.device_put(np.asarray(p), placed[n]) for n, p in stacked.items()}
    assert max(len({str(s.index) for s in p.addressable_shards}) for p in parameters.values()) == 4
    with Checkpoints(epath.Path(tmp_path / "wide"), CheckpointConfig()) as checkpoints:
        tree = {"parameters": to_canonical(specs, parameters)}
        clock = checkpoint.read_meta(epath.Path(tiny_run), 14)["clock"]
        checkpoints.save(14, tree, {"config": block, "clock": clock})
        checkpoints.wait()
    shutil.copytree(tiny_run / "assets", tmp_path / "wide" / "assets")
    wide = mmjax.load(str(tmp_path / "wide"))
    assert wide.config["mesh"] == {"data": 2, "fsdp": 4}
    assert {len(p.sharding.device_set) for p in wide.parameters.values()} == {1}
    assert wide.parameters.keys() == model.parameters.keys()
    for name, value in wide.parameters.items():
        np.testing.assert_array_equal(value, model.parameters[name])
    np.testing.assert_array_equal(wide.embed(text=["dog"]), model.embed(text=["dog"]))


# --- what embed takes and gives ----------------------------------------------------------------


def test_vectors_are_float32_of_length_one(model, pictures):
    for vectors in (model.embed(text=["a", "", "x" * 500]), model.embed(image=list(pictures[:3]))):
        assert vectors.shape == (3, SIZE) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_vectors_tell_things_apart(model, pictures):
    texts, images = model.embed(text=["dog", "a red apple"]), model.embed(image=list(pictures[:2]))
    for one, two in (texts, images):
        assert np.abs(one - two).max() > 1e-4


def as_png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray,
        as_png,
        lambda p: p.astype(np.float32) / 255,
        lambda p: p.astype(np.float64) / 255,
        lambda p: p.tolist() and np.asfortranarray(p),
        lambda p: np.dstack([p, np.full(p.shape[:2], 255, np.uint8)]),
        lambda p: Image.fromarray(p).convert("RGBA"),
        jax.numpy.asarray,
    ],
    ids=["PIL", "PNG", "float32", "float64", "strided", "opaque", "PIL RGBA", "jax"],
)
def test_one_picture_in_every_form_is_one_vector(model, pictures, form):
    expected = model.embed(image=[pictures[0]])
    np.testing.assert_array_equal(model.embed(image=[form(pictures[0])]), expected)


def test_grey_pictures_are_their_colour(model):
    grey = np.random.default_rng(1).integers(0, 256, (20, 20), np.uint8)
    expected = model.embed(image=[np.dstack([grey] * 3)])
    for form in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(model.embed(image=[form]), expected)


def test_transparent_pixels_are_the_background(model, pictures):
    clear = np.dstack([pictures[0], np.zeros(pictures[0].shape[:2], np.uint8)])
    white = np.full_like(pictures[0], 255)
    np.testing.assert_array_equal(model.embed(image=[clear]), model.embed(image=[white]))


def test_texts_may_be_bytes(model):
    np.testing.assert_array_equal(model.embed(text=["größe".encode()]), model.embed(text=["größe"]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 300])
def test_a_list_of_any_length_is_its_items(model, count):
    texts = [f"number {i}" for i in range(count)]
    together = model.embed(text=texts)
    assert together.shape == (count, SIZE)
    for index in {0, count // 2, count - 1}:
        alone = model.embed(text=[texts[index]])
        np.testing.assert_allclose(together[index : index + 1], alone, atol=1e-5, rtol=0)


def test_an_empty_list_is_no_vectors(model):
    for vectors in (model.embed(text=[]), model.embed(image=[])):
        assert vectors.shape == (0, SIZE) and vectors.dtype == np.float32


def test_lists_may_be_tuples_arrays_and_generators(model, pictures):
    expected = model.embed(image=list(pictures))
    np.testing.assert_array_equal(model.embed(image=tuple(pictures)), expected)
    np.testing.assert_array_equal(model.embed(image=pictures), expected)
    np.testing.assert_array_equal(model.embed(image=(p for p in pictures)), expected)


def test_a_task_may_be_named(model):
    named = model.embed(task="image_text", text=["dog"])
    np.testing.assert_array_equal(named, model.embed(text=["dog"]))


def test_the_vectors_are_those_of_evaluation(model, tiny_run, emoji_dir, monkeypatch):
    seen = {}
    run = evaluate.Evaluation._run

    def noted(self: Any, task: Any, each: Any, *rest: Any) -> Any:
        outputs = run(self, task, each, *rest)
        seen[str(each.computation)] = outputs
        return outputs

    monkeypatch.setattr(evaluate.Evaluation, "_run", noted)
    evaluate.evaluate(tiny_run, None, [])
    examples = list(Tfds("emoji", "test_drawing").open())
    for modality, field in (("image", "image"), ("text", "caption")):
        expected = seen[f"embed/{modality}"]["vector"]
        found = model.embed(**{modality: [e[field] for e in examples]})
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


# --- what it knows of the run ------------------------------------------------------------------


def test_a_model_knows_its_run(model, tiny_run):
    assert model.step == 14 and list(model.tasks) == ["image_text", "masked_image"]
    assert model.config == json.loads((tiny_run / "config.json").read_text())
    total = sum(p.size for p in model.parameters.values())
    shapes = checkpoint.read_shapes(tiny_run, 14)["parameters"]
    assert total == sum(np.prod(s.shape, dtype=int) for s in shapes.values())


def test_parameters_have_the_names_of_the_checkpoint(model, tiny_run):
    shapes = checkpoint.read_shapes(tiny_run, 14)["parameters"]
    assert {n: p.shape for n, p in model.parameters.items()} == {
        n: s.shape for n, s in shapes.items()
    }
    kernel = "heads/image_text/image/kernel"
    np.testing.assert_array_equal(
        model.module.heads["image_text"].image.kernel, model.parameters[kernel]
    )


def test_parameters_may_be_assigned(tiny_run):
    """In another dtype, or other ones; what is missing, unknown or of another shape is refused."""
    model = mmjax.load(str(tiny_run))
    before, vectors = model.parameters, model.embed(text=["dog"])
    model.parameters = {n: p.astype(jax.numpy.bfloat16) for n, p in before.items()}
    assert {str(p.dtype) for p in model.parameters.values()} == {"bfloat16"}
    assert 0 < np.abs(model.embed(text=["dog"]) - vectors).max() < 0.05
    model.parameters = before
    np.testing.assert_array_equal(model.embed(text=["dog"]), vectors)
    layer = "trunk/layers/001/attention/query"
    for changed, words in (
        ({n: p for n, p in before.items() if n != layer}, f"'{layer}' is missing"),
        ({**before, "trunk/groups/0": 0.0}, "'trunk/groups/0' is unknown"),
        ({**before, layer: np.zeros(3)}, rf"'{layer}' has shape \[3\]"),
    ):
        with pytest.raises(UserError, match=words):
            model.parameters = changed
    np.testing.assert_array_equal(model.embed(text=["dog"]), vectors)


def test_an_older_step_is_another_model(model, tiny_run):
    older = mmjax.load(str(tiny_run), step=12)
    assert older.step == 12
    assert np.abs(older.embed(text=["dog"]) - model.embed(text=["dog"])).max() > 1e-6


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one modality at a time; given: none"),
        ({"image": [], "text": []}, "one modality at a time; given: image, text"),
        ({"imge": []}, "does not embed 'imge'. Did you mean 'image'?"),
        ({"sound": []}, "does not embed 'sound'. Known: image, text."),
        ({"task": "image_txt", "text": ["a"]}, "no task 'image_txt'. Did you mean 'image_text'?"),
        (
            {"task": "masked_image", "image": []},
            "Task 'masked_image' does not embed 'image': it has the objective masked_image, which has no such "
            "output. Tasks that do: image_text.",
        ),
        ({"text": "dog"}, "embed takes a list: text=[...]"),
        ({"image": Image.new("RGB", (4, 4))}, "embed takes a list: image=[...]"),
        ({"text": 3}, "embed takes a list: text=[...]"),
        ({"text": ["a", 3]}, "text[1]: a text is a string, found int"),
        ({"text": [b"\xff\xfe"]}, "text[0]: "),
        ({"image": [np.zeros((4, 4, 2), np.uint8)]}, "image[0]: an image has shape"),
        ({"image": [np.zeros((4, 4, 3), np.int64)]}, "image[0]: an image is uint8"),
        (
            {"image": [np.full((4, 4), 7.0)]},
            "image[0]: an image is uint8, uint16, or float in [0, 1]",
        ),
        ({"image": [np.zeros((4, 4), np.uint8), "cat.png"]}, "image[1]: "),
        ({"image": [b"no image"]}, "image[0]: "),
        ({"image": [None]}, "image[0]: "),
        ({"image": [as_png(np.zeros((40, 40, 3), np.uint8))[:60]]}, "image[0]: "),
    ],
)
def test_what_embed_cannot_take(model, arguments, words):
    with pytest.raises(UserError) as raised:
        model.embed(**arguments)
    assert words in str(raised.value)


def test_a_task_that_does_another_thing_says_what_it_does(model):
    with pytest.raises(UserError) as raised:
        model.caption(image=[])
    assert str(raised.value) == (
        "The run does not caption 'image'. No task of this run can caption: image_text embeds image, text; "
        "masked_image has the objective masked_image, which has no such output."
    )
    with pytest.raises(UserError) as raised:
        model.compose([("text", "dog"), ("image", None)])
    assert str(raised.value).startswith(
        "The run composes no sequence of: image, text. What there is: image_text embeds image, text;"
    )
    with pytest.raises(UserError, match="given: image, length. The run has: image, text."):
        model.caption(image=[], length=[3])


def test_a_task_that_classifies_names_the_tasks_that_embed():
    """Of the quickstart's config, without its parameters."""
    config = configs.read_file(str(ROOT / "tests" / "configs" / "quickstart_tiny.py"))
    model = object.__new__(TrainedModel)
    model.tasks = make_experiment(config).tasks
    with pytest.raises(UserError) as raised:
        model.embed(task="image_classes", image=[])
    assert str(raised.value) == (
        "Task 'image_classes' does not embed 'image': it classifies image. Tasks that do: image_text."
    )
    with pytest.raises(
        UserError, match="The run does not embed 'sound'. Known: image, spectrogram, text, video"
    ):
        model.embed(sound=[])


@pytest.fixture(scope="module")
def classifier() -> TrainedModel:
    """Return a model that classifies pictures, or two views of a sound together, with random parameters."""
    config = configs.read_file(str(ROOT / "tests" / "configs" / "quickstart_tiny.py"))
    config["tasks"] = {name: config["tasks"][name] for name in ("image_classes", "instruments")}
    experiment = make_experiment(config)
    model = object.__new__(TrainedModel)
    model._experiment, model._calls = experiment, {}
    model._stacked = jax.jit(lambda: experiment.declaration.initialise(0, np.float32))()
    draw = np.random.default_rng(0)
    model.parameters = {
        name: draw.normal(size=value.shape).astype(np.float32) if "classifier" in name else value
        for name, value in model.parameters.items()
    }
    model.tasks = {n: t.for_evaluation() for n, t in experiment.tasks.items()}
    return model


class Named(Tfds):
    """A source whose data name two classes."""

    def open(self) -> Any:
        return SimpleNamespace(labels={"subgroup": ["cat", "dog"]})


class Absent(Tfds):
    """A source whose data are not on this machine."""

    def open(self) -> Any:
        raise UserError("No data here.")


def test_predictions_are_the_softmax_of_the_logits_with_the_names_of_the_data(classifier, pictures):
    task = replace(classifier.tasks["image_classes"], source=Named("emoji", "train"))
    with mock.patch.dict(classifier.tasks, image_classes=task):
        predictions = classifier.predict(image=list(pictures[:3]))
    input_ = task.inputs["image"]
    rows = [input_.preprocess({"image": input_.modality.raw(x)}, None) for x in pictures[:3]]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    logits = np.asarray(task.objective.predict(classifier.module, {"image": arrays}), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1)[:, None]
    assert predictions.probabilities.shape == (3, 99)
    assert predictions.probabilities.dtype == np.float32
    np.testing.assert_allclose(predictions.probabilities, expected, rtol=1e-4)
    assert predictions.names[:3] == ("cat", "dog", "class 2") and len(predictions.names) == 99
    assert predictions.likeliest == [predictions.names[i] for i in logits.argmax(axis=1)]


def test_classes_are_numbered_where_the_data_is_not_here(classifier, pictures, caplog):
    task = replace(classifier.tasks["image_classes"], source=Absent("emoji", "train"))
    with mock.patch.dict(classifier.tasks, image_classes=task):
        predictions = classifier.predict(image=list(pictures[:3]))
    assert predictions.names[:2] == ("class 0", "class 1")
    assert "Classes have no names here: No data here." in caplog.text


def test_a_prediction_from_several_modalities_takes_a_list_of_each(classifier):
    sounds = [np.sin(np.arange(5376) / n).astype(np.float32) for n in (3, 9)]
    with mock.patch.object(Tfds, "open", Absent.open):
        both = classifier.predict(spectrogram=sounds, waveform=sounds)
    assert both.probabilities.shape == (2, 128)
    np.testing.assert_allclose(both.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.abs(both.probabilities[0] - both.probabilities[1]).max() > 1e-3
    for values, words in (
        ({"waveform": sounds}, "Task 'instruments' predicts from spectrogram, waveform together."),
        ({"waveform": sounds, "spectrogram": sounds[:1]}, "given: waveform 2, spectrogram 1"),
        ({"waveform": sounds, "image": []}, "No task predicts from waveform, image together: "),
        ({"waveform": "beep"}, r"predict takes a list: waveform=\[\.\.\.\]"),
        ({}, "predict takes one modality at least"),
        (
            {"task": "image_classes", "waveform": sounds},
            "'image_classes' does not predict 'waveform'",
        ),
    ):
        with pytest.raises(UserError, match=words):
            classifier.predict(**values)


def test_a_run_that_is_not_there(tmp_path, tiny_run):
    with pytest.raises(UserError, match="No checkpoint in '.*nothing'. Train first"):
        mmjax.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="No checkpoint of step 5 .* There are: 14, 12."):
        mmjax.load(str(tiny_run), step=5)


def plant(run: Path, key: str, value: Any) -> None:
    """Change a key of the config that the newest checkpoint holds."""
    *parents, last = key.split(".")
    with edited(run, 14) as meta:
        block = meta["config"]
        for parent in parents:
            block = block[parent]
        block[last] = value


def test_a_missing_tokenizer_is_named(copy):
    shutil.rmtree(copy / "assets")
    with pytest.raises(UserError, match="tokenizer"):
        mmjax.load(str(copy)).embed(text=["dog"])


def another_tokenizer(run: Path) -> Path:
    """Put a tokenizer of the same size and other pieces in the place of the run's own."""
    [file] = (run / "assets").rglob("tokenizer.model")
    train([f"a {n} of them" for n in range(3000)], file, vocab_size=2048)
    return file


def test_another_tokenizer_than_the_runs_is_refused(copy):
    """By its SHA-256: its ids would mean other pieces."""
    expected = mmjax.load(str(copy)).embed(text=["a red apple"])
    file = another_tokenizer(copy)
    with pytest.raises(UserError) as raised:
        mmjax.load(str(copy))
    saved = json.loads((copy / "checkpoints" / "14" / "meta" / "metadata").read_text())
    key = "modalities.text/emoji/1.0.0/tokenizer.model"
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    for words in (str(file), now[:12], saved["identities"][key][:12], "allow_change=True"):
        assert words in str(raised.value)
    meant = mmjax.load(str(copy), allow_change=True).embed(text=["a red apple"])
    assert np.abs(meant - expected).max() > 1e-3


def test_evaluation_and_report_refuse_another_tokenizer(copy):
    another_tokenizer(copy)
    with pytest.raises(UserError, match="is not the file that the run in .* was trained with"):
        evaluate.evaluate(epath.Path(copy), None, [])
    page.write_report(epath.Path(copy))
    assert "is not the file that the run in" in (copy / "report.html").read_text()


def test_the_tokenizer_in_assets_is_taken_before_the_one_that_the_config_names(copy, tmp_path):
    """It is compared, whichever it is: also where the run has the file by an absolute path."""
    [file] = (copy / "assets").rglob("tokenizer.model")
    other, name = tmp_path / "other.model", str(tmp_path / "other.model")
    plant(copy, "modalities.text.tokenizer", name)
    with edited(copy, 14) as meta:
        # As checkpoints called it when such a file was not copied.
        [digest] = [v for k, v in meta["identities"].items() if k.startswith("modalities.text/")]
        meta["identities"] = {f"modalities.text/{name}": digest}
    other.write_bytes(file.read_bytes())
    expected = mmjax.load(str(copy)).embed(text=["dog"])
    train([f"a {n} of them" for n in range(3000)], other, vocab_size=2048)
    with pytest.raises(UserError, match="other.model' is not the file"):
        mmjax.load(str(copy))
    kept = copy / "assets" / asset_name(name)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(file.read_bytes())
    np.testing.assert_array_equal(mmjax.load(str(copy)).embed(text=["dog"]), expected)


def test_a_checkpoint_of_other_shapes_names_parameter_expected_and_found(copy):
    plant(copy, "tasks.image_text.objective.embed_dim", 24)
    with pytest.raises(UserError) as raised:
        mmjax.load(str(copy))
    assert (
        "parameters/heads/image_text/image/kernel: expected float32[32, 24], found float32[32, 16]"
        in str(raised.value)
    )


# --- nothing is run from a checkpoint ----------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks.image_text.objective.name", "planted"),
        ("tasks.image_text.objective.name", "../planted"),
        ("tasks.image_text.objective.name", "/tmp/planted"),
        ("tasks.image_text.objective.name", "os.path"),
        ("tasks.image_text.objective.name", "mmjax.train"),
        ("modalities.text.name", "planted"),
        ("modalities.text.name", "planted.Text"),
        ("tasks.image_text.evaluators.groups.name", "planted"),
        ("tasks.image_text.source.name", "planted"),
        ("model.layers", [{"repeat": 2, "blocks": [{"name": "planted", "hidden": 1}]}]),
        ("tasks.image_text.objective.__class__", "planted"),
        ("extra", ["planted"]),
    ],
)
def test_a_planted_config_runs_nothing(copy, monkeypatch, key, value):
    """A module of that name lies in the run, in the current folder and on the path of Python."""
    ran = copy / "ran"
    for folder in (copy, copy / "objectives", copy / "assets"):
        folder.mkdir(exist_ok=True)
        (folder / "planted.py").write_text(f"open({str(ran)!r}, 'w').write('')\n")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    plant(copy, key, value)
    with pytest.raises(UserError, match="planted|no '|Unknown config key"):
        mmjax.load(str(copy))
    assert not ran.exists()


def test_a_planted_config_of_many_layers_is_refused_before_they_are_built(copy, monkeypatch):
    group = trunk.Group

    def built(config: trunk.GroupConfig, *more: Any) -> Any:
        is_trunk = more[-1].startswith("model.layers")
        assert not is_trunk, "the layers were built"
        return group(config, *more)

    monkeypatch.setattr(trunk, "Group", built)
    layer = {"name": "transformer", "num_heads": 2, "mlp_dim": 64}
    plant(
        copy,
        "model.layers",
        [{"repeat": 4, "blocks": [layer]}, {"repeat": 50_000, "blocks": [layer] * 2}],
    )
    with pytest.raises(UserError, match="model.layers: 100,004 layers; at most 4,096"):
        mmjax.load(str(copy))

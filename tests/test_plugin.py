"""A modality, a layer, a router, an optimizer's algorithm, an objective, an evaluator, a source and a config.

Each is one file of the user's. They lie in a folder that is given with `--extra`. If this test needs a change
elsewhere in mmjax before they run, adding one touches more than its own file, and the design has failed there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from mmjax.engine import checkpoint

FILES = {
    "modalities/tone.py": '''
"""Tones: a number of samples, a token for every four."""
from dataclasses import dataclass

import jax
import numpy as np

from mmjax.core.errors import UserError
from mmjax.nn.dense import Dense
from mmjax.nn.stream import Stream
from mmjax.modalities.base import Modality, Stem


@dataclass(frozen=True)
class ToneInput:
    field: str = "samples"
    length: int = 8


class ToneStem(Stem):
    def __init__(self, width):
        self.embed = Dense(4, width, (None, "embed"))

    def __call__(self, arrays):
        samples_BN = arrays["samples"]
        return Stream(self.embed(samples_BN.reshape(samples_BN.shape[0], -1, 4)))


@dataclass(frozen=True)
class Tone(Modality[ToneInput]):
    Input = ToneInput

    def stem(self, width):
        return ToneStem(width)

    def arrays(self, settings):
        return {"samples": jax.ShapeDtypeStruct((settings.length,), np.float32)}

    def preprocess(self, settings, value, rng):
        if np.ndim(value) != 1:
            raise UserError(f"a tone has shape [N], found {list(np.shape(value))}.")
        return {"samples": np.resize(np.asarray(value, np.float32), settings.length)}
''',
    "blocks/shift.py": '''
"""x += scale x W, and nothing more."""
from dataclasses import dataclass, replace

from flax import nnx

from mmjax.core.bounds import POSITIVE, check
from mmjax.nn.dense import Dense
from mmjax.nn.stream import no_aux


@dataclass(frozen=True)
class Shift:
    scale: float = 1.0

    def __post_init__(self):
        check(self, scale=POSITIVE)

    def build(self, width):
        return ShiftLayer(width, self.scale)


class ShiftLayer(nnx.Module):
    def __init__(self, width, scale):
        self.dense = Dense(width, width, ("embed", "mlp"), bias=False)
        self.scale = scale

    def __call__(self, stream, key):
        return replace(stream, x_BSD=stream.x_BSD + self.scale * self.dense(stream.x_BSD)), no_aux()
''',
    "routers/in_turn.py": '''
"""Tokens go to the experts in turn, the first one to the expert `first`."""
from dataclasses import dataclass

import jax.numpy as jnp

from mmjax.core.bounds import SIZE, check
from mmjax.nn.routers.base import Router, Slots


@dataclass(frozen=True)
class InTurn(Router):
    first: int = 0

    def __post_init__(self):
        check(self, first=SIZE)

    def slots(self, tokens, experts):
        return -(-tokens // experts)

    def experts_per_token(self, experts):
        return 1

    def route(self, logits_GTL, valid_GT):
        groups, tokens, experts = logits_GTL.shape
        own_E1 = (jnp.arange(experts)[:, None] - self.first) % experts
        index_EC = own_E1 + experts * jnp.arange(self.slots(tokens, experts))
        there_GEC = valid_GT[:, jnp.minimum(index_EC, tokens - 1)] & (index_EC < tokens)
        index_GEC = jnp.broadcast_to(jnp.minimum(index_EC, tokens - 1), there_GEC.shape)
        return Slots(index_GEC, there_GEC.astype(logits_GTL.dtype))
''',
    "algorithms/heavy_ball.py": '''
"""Gradient descent with momentum: m = momentum m + g, and a step against m."""
from dataclasses import dataclass, field

import optax

from mmjax.core.bounds import PART, check
from mmjax.core.config import SCHEDULE
from mmjax.optim.algorithms.base import Algorithm
from mmjax.optim.transforms import LeafTransform, layer_shape


@dataclass(frozen=True)
class HeavyBall(Algorithm):
    momentum: float = field(default=0.9, metadata=SCHEDULE)

    def __post_init__(self):
        check(self, momentum=PART)

    def transform(self, spec):
        shape, axes = layer_shape(spec)
        return LeafTransform(optax.trace(self.momentum), shape, {"trace": axes})
''',
    "objectives/pitch.py": '''
"""Regression of the pitch, a number from 0 up to `most`."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mmjax.nn.dense import Dense
from mmjax.nn.stream import mean_pool
from mmjax.objectives.base import Embeds, Loss, Objective
from mmjax.objectives.contrastive import unit


@dataclass(frozen=True, kw_only=True)
class Pitch(Objective, Embeds):
    most: int = 4

    def reads(self):
        return ("tone",)

    def fields(self):
        return ("pitch",)

    def heads(self, width, inputs):
        return {"out": Dense(width, 1, ("embed", None))}

    def pooled(self, model, arrays, key):
        stream, aux = model.encode([model.tokens("tone", arrays)], key)
        return mean_pool(stream), aux

    def __call__(self, model, batch, key):
        pooled_BD, aux = self.pooled(model, batch["inputs"]["tone"], key)
        guess_B = model.heads[self.head]["out"](pooled_BD)[:, 0] * self.most
        error_B = jnp.where(batch["valid"], jnp.square(guess_B - batch["fields"]["pitch"]), 0)
        return Loss(error_B.sum() / jnp.maximum(batch["valid"].sum(), 1) + aux.loss)

    def embeds(self):
        return ("tone",)

    def embed(self, model, modality, arrays, relative_to=""):
        return unit(self.pooled(model, arrays, jax.random.key(0))[0])
''',
    "evaluators/mean_error.py": '''
"""The mean loss beside that of the mean pitch."""
from dataclasses import dataclass

from mmjax.evaluators.base import Evaluator, LossOf, Pass


@dataclass(frozen=True)
class MeanError(Evaluator):
    unit: str = "squared semitones"

    def passes(self, task):
        return {"all": Pass(LossOf(), self.source, ("pitch",))}

    def score(self, task, outputs):
        loss, pitch = outputs["all"]["loss"], outputs["all"]["pitch"]
        return [self.record(task, "error", loss.mean(), pitch.var(), len(pitch), unit=self.unit)]
''',
    "sources/tones.py": '''
"""Sines, made when they are read."""
from dataclasses import dataclass

import numpy as np

from mmjax.sources.base import Examples, Source


@dataclass(frozen=True)
class Tones(Source):
    count: int
    pitches: int = 4

    @property
    def label(self):
        return f"{self.count} tones"

    def open(self):
        return TonesExamples(self)


class TonesExamples(Examples):
    description, fields = "tones", ("samples", "pitch")

    def __init__(self, source):
        self.source, self.identity = source, str(source)

    def __len__(self):
        return self.source.count

    def __getitem__(self, index):
        pitch = index % self.source.pitches
        return {"samples": np.sin(np.arange(8) * (pitch + 1) / 3 + index), "pitch": pitch}
''',
    "rules/block.py": '''
"""Each task runs all its visits of a period in one block."""
from dataclasses import dataclass

from mmjax.schedule.rules.base import Rule


@dataclass(frozen=True)
class Block(Rule):
    def counts(self, weights):
        return list(weights)

    def order(self, weights, seed, first):
        return [i for i, weight in enumerate(weights) for _ in range(weight)]
''',
    "config.py": '''
"""All of them together."""


def get_config():
    return {
        "steps": 30,
        "modalities": {"tone": {"name": "tone"}},
        "model": {
            "width": 8,
            "layers": [
                {"repeat": 2, "blocks": [{"name": "shift"}]},
                {"repeat": 1, "blocks": [
                    {"name": "transformer", "num_heads": 2, "mlp_dim": 4,
                     "experts": {"count": 3, "router": {"name": "in_turn", "first": 1}}},
                ]},
            ],
        },
        "tasks": {
            "pitch": {
                "source": {"name": "tones", "count": 64},
                "inputs": {"tone": {}},
                "objective": {"name": "pitch"},
                "batch": 16,
                "evaluators": {"error": {"name": "mean_error", "source": {"name": "tones", "count": 32}}},
            }
        },
        "optimizer": {
            "algorithm": {"name": "heavy_ball", "momentum": 0.5},
            "learning_rate": 1e-2,
        },
    }
''',
}  # fmt: skip


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extra")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.lstrip())
    return folder


@pytest.fixture(scope="module")
def run(extra: Path, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("tones") / "run"
    done = command(
        "train", f"--extra={extra}", f"--config={extra}/config.py", f"--workdir={workdir}"
    )
    assert done.returncode == 0, done.stderr
    assert "squared semitones" in done.stdout
    return workdir


def test_it_trains(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    [record] = json.loads((run / "results.json").read_text())
    assert record["name"] == "error" and record["task"] == "pitch"
    assert record["split"] == "32 tones" and record["count"] == 32
    assert record["chance"] == np.var(np.arange(32) % 4)
    folder = epath.Path(run)
    state = checkpoint.read_shapes(folder, 30)["optimizer"]
    assert {field for leaf in state.values() for field in leaf} == {"trace"}
    assert "code.algorithms/heavy_ball" in checkpoint.read_meta(folder, 30)["identities"]


def test_its_rule_of_the_schedule_is_used(extra, command, tmp_path):
    words = [f"--extra={extra}", f"--config={extra}/config.py", f"--workdir={tmp_path}"]
    words += ["--config.schedule.rule=block", "--dry_run"]
    done = command("train", *words)
    assert done.returncode == 0, done.stderr
    assert " block " in done.stdout
    done = command("train", *[w.replace("=block", "=blok") for w in words])
    assert (
        done.returncode == 2 and "nknown schedule rule 'blok'. Did you mean 'block'?" in done.stderr
    )


def test_the_keys_of_its_algorithm_are_checked(extra, command):
    words = [f"--extra={extra}", f"--config={extra}/config.py"]
    done = command("show", *words, "--config.optimizer.algorithm.momentun=0.9")
    said = "Unknown config key 'config.optimizer.algorithm.momentun'. Did you mean 'momentum'?"
    assert done.returncode == 2 and said in done.stderr


def test_it_is_evaluated_and_shown(run, extra, command):
    own = (run / "results.json").read_text()
    done = command("evaluate", f"--extra={extra}", f"--workdir={run}")
    assert (done.returncode, done.stderr) == (0, "")
    [record] = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    del record["time"], record["command"]
    assert [record] == json.loads(own) and (run / "results.json").read_text() == own
    done = command("show", str(run))
    assert (done.returncode, done.stderr) == (0, "")
    trunk = next(line.split() for line in done.stdout.splitlines() if line.startswith("trunk"))
    sparse = 4 * 8 * 8 + 2 * 8 + 3 * 8 + 3 * 2 * 4 * 8  # attention, norms, router, experts
    assert int(trunk[1]) == 2 * 8 * 8 + sparse + 2 * 8


def test_it_embeds(run, extra, command):
    code = f"""
import numpy as np, mmjax
from mmjax.core import config
config.add_folder({str(extra)!r})
model = mmjax.load({str(run)!r})
vectors = model.embed(tone=[np.sin(np.arange(8)), [0.0] * 8])
assert vectors.shape == (2, 8), vectors.shape
assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
try:
    model.embed(tone=[np.zeros((2, 2))])
except mmjax.core.errors.UserError as error:
    assert "tone[0]: a tone has shape [N], found [2, 2]" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_folder_the_name_is_unknown(run, extra, command):
    done = command("evaluate", f"--workdir={run}")
    assert done.returncode == 2
    assert "optimizer.algorithm.name: no 'heavy_ball' in mmjax/optim/algorithms" in done.stderr
    assert "--extra" in done.stderr


EXPERTS = {"count": 3, "router": {"name": "in_turn", "frst": 1}}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"name": "shift", "scal": 3}, "blocks[0].scal'. Did you mean 'scale'?"),
        (
            {"name": "transformer", "num_heads": 2, "mlp_dim": 4, "experts": EXPERTS},
            "blocks[0].experts.router.frst'. Did you mean 'first'?",
        ),
    ],
    ids=["layer", "router"],
)
def test_the_keys_of_a_layer_and_of_a_router_are_checked_too(extra, command, block, said):
    groups = [{"repeat": 1, "blocks": [block]}]
    words = [f"--extra={extra}", f"--config={extra}/config.py", f"--config.model.layers={groups}"]
    done = command("show", *words)
    assert done.returncode == 2 and said in done.stderr

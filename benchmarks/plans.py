"""The TPU compiler's report on a decoder's and a ViT's step, ours and MaxText's, for 256 v5e and 128 v5p chips.

Nothing where MaxText is not installed (Python 3.12 or later). The same: Llama's decoder of 7 billion on sequences of
4,096 tokens, rematerialised whole, and a ViT-L/14 classifier on pictures of 224 pixels without rematerialisation;
AdamW, gradients clipped, bfloat16 products, parameters in float32, the chips as one axis (`fsdp`) that cuts what the
rules of each cut, of which MaxText's ViT states a part (what is state on a chip), the compiler's own defaults.
MaxText compiles by its `train_compile`; see `_plans_maxtext.py` for its ViT. Asserted before:
with our parameters, at a small size on the CPU, both give the same loss; at full size both have as many parameters, but
for a table of positions that our texts have and biases of attention that MaxText's ViT has.

No time is measured and no device is used: each number is the compiler's, or counted in what it compiled as
`mmjax plan` counts. The config and the number of pairs are not read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._pairs import Effort, Quantity, quantity
from benchmarks._steps import random_batch
from benchmarks.vit import by_layer
from mmjax.core.config import Block
from mmjax.engine.loader import HostBatch
from mmjax.engine.state import init_state
from mmjax.experiment import Experiment, make_experiment
from mmjax.plan.case import Specification
from mmjax.plan.topology import environment
from mmjax.plan.workers import compile_cases

TASK = "task"
LIMIT = 1800.0  # seconds for one program
CLOSE = 0.01  # parameters may differ by so much
OURS, PEER = "ours", "MaxText"


@dataclass(frozen=True)
class Machine:
    """A topology: our name and MaxText's (of v5p it counts cores), and how many sequences or pictures a chip has."""

    kind: str
    shape: tuple[int, ...]
    theirs: str
    rows: Mapping[str, int]

    @property
    def chips(self) -> int:
        return int(np.prod(self.shape))

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


MACHINES = (
    Machine("v5e", (16, 16), "v5e-256", {"decoder": 1, "ViT": 32}),
    Machine("v5p", (4, 4, 8), "v5p-256", {"decoder": 4, "ViT": 128}),
)
FULL: dict[str, dict[str, Any]] = {
    "decoder": {
        "width": 4096, "layers": 32, "num_heads": 32, "mlp_dim": 11_008, "vocabulary": 32_000, "length": 4096,
    },
    "ViT": {
        "width": 1024, "layers": 24, "num_heads": 16, "mlp_dim": 4096, "pixels": 224, "patch": 14, "classes": 1000,
    },
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "decoder": {"width": 64, "layers": 2, "num_heads": 4, "mlp_dim": 128, "vocabulary": 512, "length": 32},
    "ViT": {"width": 64, "layers": 2, "num_heads": 4, "mlp_dim": 128, "pixels": 224, "patch": 14, "classes": 256},
}  # fmt: skip


def measure(effort: Effort) -> list[Quantity]:
    """Return, for each step and machine, ratios, ours to MaxText's, and what they are of."""
    if find_spec("maxtext") is None:
        return []
    result = []
    for what in FULL:
        np.testing.assert_allclose(*losses(what), rtol=1e-4)
        for machine in MACHINES:
            plans = {OURS: ours(what, machine), PEER: theirs(what, machine)}
            result += compared(f"{what}, {machine.name}", plans, effort.pairs)
    return result


def compared(what: str, plans: Mapping[str, Mapping[str, Any]], pairs: int) -> list[Quantity]:
    """Return the numbers of two plans of one step; as nothing varies, each number stands for all pairs."""
    counts = [plans[name]["parameters"] for name in (OURS, PEER)]
    np.testing.assert_allclose(*counts, rtol=CLOSE, err_msg=f"parameters of {what}")
    result = []
    for each in (OURS, PEER):
        held = [plans[each]["state"] / 2**30] * pairs
        result.append(quantity(f"{what}: state and batch on a chip, {each}", held, "GiB"))
    for key, name in {"bytes": "memory of a chip", "sent": "bytes that a chip sends"}.items():
        ratio = plans[OURS][key] / plans[PEER][key]
        result.append(
            quantity(f"{what}: {name}, {OURS} to {PEER}", [ratio] * pairs, wanted="at most 1")
        )
        for each in (OURS, PEER):
            held = [plans[each][key] / 2**30] * pairs
            result.append(quantity(f"{what}: {name}, {each}", held, "GiB"))
    # With kernels whose FLOPs the compiled text does not state, the count would be too low.
    for each in (name for name in (OURS, PEER) if not plans[name]["unknown"]):
        ratio = plans[each]["flops"] / plans[OURS]["model"]
        result.append(quantity(f"{what}: compiled to model FLOPs, {each}", [ratio] * pairs))
    return result


# --- ours --------------------------------------------------------------------------------------


def block(what: str, sizes: Mapping[str, Any], batch: int) -> Block:
    """Return the config of a step."""
    layer = {"name": "transformer", "num_heads": sizes["num_heads"], "mlp_dim": sizes["mlp_dim"]}
    if what == "decoder":
        layer |= {"norm": "rms", "mlp": "swiglu", "rotary": 10_000.0}
        length = sizes["length"] - 1  # and the token that a text begins with
        modality = {"name": "text", "vocabulary": sizes["vocabulary"], "max_positions": length}
        inputs: Block = {"text": {"field": "caption", "length": length}}
        objective: Block = {"name": "transfusion", "modalities": ["text"], "condition_dropout": 0.0}
        model = {"norm": "rms", "remat": "full"}
    else:
        layer |= {"bias": True}
        side = sizes["pixels"] // sizes["patch"]
        modality = {"name": "image", "patch": sizes["patch"], "max_positions": side}
        inputs = {"image": {"size": sizes["pixels"]}}
        objective = {
            "name": "classification", "classes": sizes["classes"], "label": "subgroup", "init": "lecun",
        }  # fmt: skip
        model = {}
    groups = [{"repeat": sizes["layers"], "blocks": [layer]}]
    task = {
        "source": {"name": "tfds", "dataset": "emoji", "split": "train"},
        "inputs": inputs, "objective": objective, "batch": batch,
    }  # fmt: skip
    return {
        "steps": 10,
        "modalities": {next(iter(inputs)): modality},
        "model": {"width": sizes["width"], "layers": groups, **model},
        "tasks": {TASK: task},
        "optimizer": {
            "algorithm": {"name": "adamw"},
            "clip": 1.0,
            "weight_decay": 0.1,
            "warmup": 1,
        },
        "dtype": {"compute": "bfloat16"},
        "mesh": {"data": 1, "fsdp": -1},
        "evaluation": {"every": 0},
    }


def ours(what: str, machine: Machine) -> dict[str, Any]:
    """Return the plan of a config, made by a separate process."""
    given = block(what, FULL[what], machine.rows[what] * machine.chips)
    asked = Specification(given, (), machine.kind, machine.shape, 1, [TASK], False, "")
    told = compile_cases(asked, LIMIT).cases[TASK]
    if told["status"] != "compiled":
        raise RuntimeError(f"{what} on {machine.name}: {told['status']}. {told.get('message', '')}")
    held = told["bytes"]
    return {
        "parameters": _count(make_experiment(given)),
        "state": held["arguments"],
        "bytes": held["arguments"] + held["temporaries"] + held["outputs"],
        "flops": told["flops"] * machine.chips,
        "sent": sum(each["bytes"] for each in told["collectives"]),
        "model": told["model_flops"],
        "unknown": told["unknown"],
    }


def _count(experiment: Experiment) -> int:
    return sum(int(np.prod(spec.shape)) for spec in experiment.declaration.specs.values())


# --- MaxText's ---------------------------------------------------------------------------------


def theirs(what: str, machine: Machine) -> dict[str, Any]:
    """Return the measurement of a process of its own."""
    asked = {"what": what, "sizes": FULL[what], "topology": machine.theirs, "chips": machine.chips}
    result: dict[str, Any] = _ask({**asked, "per_chip": machine.rows[what]}, environment())
    return result


def _ask(request: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    words = [sys.executable, "-m", "benchmarks._plans_maxtext"]
    done = subprocess.run(
        words, input=json.dumps(request), capture_output=True, text=True, env=dict(env), timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def losses(what: str) -> tuple[float, float]:
    """Return our loss and MaxText's with the same parameters and numbers, small, in float32 on the CPU."""
    given = {**block(what, SMALL[what], 4), "dtype": {"compute": "float32"}}
    experiment = make_experiment(given)
    batch = random_batch(experiment, TASK, 0)
    value, arrays = our_loss(experiment, batch)
    layers = SMALL[what]["layers"]
    if what == "ViT":
        arrays = _vit_arrays(arrays, layers, SMALL[what]) | {
            "pixels": batch.rows.inputs["image"]["pixels"],
            "labels": batch.rows.fields["subgroup"],
        }
    else:
        arrays["ids"] = batch.rows.inputs["text"]["ids"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.npz"
        np.savez(file, **arrays)
        sizes = {**SMALL[what], "dtype": "float32"}
        if what == "decoder":
            sizes["length"] = SMALL[what]["length"] - 1
        env = {**environment(), "JAX_PLATFORMS": "cpu"}
        return value, _ask({"what": what, "sizes": sizes, "parameters": str(file)}, env)


def our_loss(experiment: Experiment, batch: HostBatch) -> tuple[float, dict[str, Any]]:
    """Return the loss of a fresh state, and its parameters by name; texts have no table of positions, only row 0."""
    state = init_state(experiment.declaration, experiment.optimizers.whole, 0, np.float32)
    positions = "stems/text/positions/norm/"
    parameters = {
        name: value * (not name.startswith(positions)) for name, value in state.parameters.items()
    }
    for rows in batch.rows.inputs.values():
        if "ids" in rows:
            rows["ids"] = np.maximum(rows["ids"], 1)
    model = experiment.declaration.merge(parameters, np.float32)
    loss = experiment.tasks[TASK].loss(model, batch.rows, jax.random.key(0))
    return float(loss.value), {name: np.asarray(value) for name, value in parameters.items()}


def _vit_arrays(
    parameters: dict[str, Any], layers: int, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return layers apart, each named by its number, positions as one table."""
    named = by_layer(parameters, layers, sizes["pixels"] // sizes["patch"], TASK)
    result = {name: value for name, value in named.items() if name != "layers"}
    biases = {
        "attention_norm": "attention_norm/bias",
        "mlp_norm": "mlp_norm/bias",
        "up": "mlp/up/bias",
    }
    biases["down"] = "mlp/down/bias"
    for index, layer in enumerate(named["layers"]):
        result |= {f"{index}/{name}": value for name, value in layer.items()}
        result |= {
            f"{index}/{name}_bias": parameters[f"trunk/groups/0/blocks/0/{path}"][index]
            for name, path in biases.items()
        }
    return result

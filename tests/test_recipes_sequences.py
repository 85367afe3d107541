"""The recipes of interleaved sequences: sizes as published, the same compute with copies, small from large."""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest
from recipes import abstract, block, experiment, without_sizes

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.monitor.parameter_rows import rows_of_config
from mmjax.run_config import RunConfig

SETTINGS = {
    "transfusion": ("7b", ["", "-alternating"]),
    "mot": ("7b", ["", "-dense", "-transfusion", "-transfusion-dense"]),
    "mixture_of_mamba": ("1b", ["", "-dense", "-chameleon", "-chameleon-dense"]),
}  # fmt: skip
ALL = [(system, setting) for system, (_, settings) in SETTINGS.items() for setting in settings]


def trunk(name: str) -> int:
    """Return parameters of the trunk."""
    specs = experiment(name).declaration.specs
    return sum(math.prod(s.shape) for n, s in specs.items() if n.startswith("trunk/"))


def test_transfusion_has_the_trunk_of_llama() -> None:
    """Llama 2 7B has 6,738,415,616 parameters, two tables of 32,000 by 4,096 among them."""
    assert trunk("transfusion:7b") == 6_738_415_616 - 2 * 32_000 * 4096


def test_a_unet_is_as_large_as_published() -> None:
    """0.27 billion (Zhou et al. 2024, section 4.1); ours goes down to 16 pixels a side, from pixels, not latents."""
    specs = experiment("transfusion:7b").declaration.specs
    count = sum(math.prod(s.shape) for n, s in specs.items() if "/unet/" in n)
    assert 0.2e9 < count < 0.4e9


def test_mixture_of_transformers_has_all_of_the_trunk_twice() -> None:
    for name in ("mot:7b", "mot:7b-transfusion"):
        assert trunk(name) == 2 * trunk(f"{name}-dense")


def test_a_token_meets_as_many_parameters_as_in_the_dense_model() -> None:
    def active(name: str) -> int:
        rows = rows_of_config(experiment(name).declaration.specs)
        return next(row["active_per_token"] for row in rows if row["part"] == "trunk")

    assert active("mot:7b") == active("mot:7b-dense")


def test_mamba_is_as_large_as_published() -> None:
    """mamba-1.4b has 1,372,178,432 parameters, a table of 50,280 by 2,048 among them."""
    dense = trunk("mixture_of_mamba:1b-dense")
    assert dense == 1_372_178_432 - 50_280 * 2048
    # All but the convolution, A, D and norms has a copy.
    shared = 48 * (4096 * 4 + 4096 + 4096 * 16 + 4096 + 2048) + 2048
    assert trunk("mixture_of_mamba:1b") == 2 * dense - shared


@pytest.mark.parametrize(
    "name",
    ["mot:small", "mot:small-transfusion", "mixture_of_mamba:small", "mixture_of_mamba:small-chameleon"],
)  # fmt: skip
def test_copies_cost_no_operation(name: str) -> None:
    """Model FLOPs of a step, counted, to the last one."""
    untied, dense = (experiment(each).flops["captions"] for each in (name, f"{name}-dense"))
    assert untied == dense > 0


@pytest.mark.parametrize("system, setting", ALL)
def test_the_small_recipe_differs_in_sizes_only(system: str, setting: str) -> None:
    size, _ = SETTINGS[system]
    big, small = (block(f"{system}:{of}{setting}") for of in (size, "small"))
    ends = {
        "steps", "patch", "max_positions", "vocabulary", "width", "remat", "layers", "batch", "size", "length", "pack",
        "capacity", "window", "unet_channels", "sampling_steps", "levels", "learning_rate", "warmup", "compute",
        "every", "repeat", "state", "num_heads", "mlp_dim", "tokenizer", "depth",
    }  # fmt: skip
    differences = configs.compare(big, small, RunConfig)
    changed = {d.key.replace("capacity.text", "capacity").split(".")[-1] for d in differences}
    assert len(differences) > 10 and changed <= ends
    layers = [without_sizes(of["model"]["layers"][0]["blocks"][0]) for of in (big, small)]
    layers[1].pop("state", None)  # a size that the large one leaves at its default
    assert layers[0] == layers[1]


@pytest.mark.parametrize("system", SETTINGS)
def test_the_large_recipe_is_traced_whole(system: str) -> None:
    """Loss and gradient on the whole batch: shapes only."""
    made = experiment(f"{system}:{SETTINGS[system][0]}")
    task: Any = made.tasks["captions"]
    parameters, batch = abstract(made, "captions")

    def value(p: Any, batch: Any) -> Any:
        model = made.declaration.merge(p, "bfloat16")
        return task.loss(model, batch, jax.random.key(0)).value

    gradient = jax.eval_shape(jax.grad(value), parameters, batch)
    assert {n: g.shape for n, g in gradient.items()} == {n: p.shape for n, p in parameters.items()}


def test_the_alternating_setting_writes_and_draws_in_turn() -> None:
    made = experiment("transfusion:7b-alternating")
    assert made.tasks["write"].objective.reads() == ("text",)
    draw: Any = made.tasks["draw"].objective
    assert draw.modalities == ("text", "image") and draw.weights == {"text": 0.0}


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("transfusion:small-alternate", "small-alternating"),
        ("mot:small-transfuson", "small-transfusion"),
        ("mixture_of_mamba:small-chamelon", "small-chameleon"),
    ],
)
def test_a_setting_that_is_not_there(name: str, nearest: str) -> None:
    setting = name.partition(":")[2]
    with pytest.raises(UserError, match=f"no setting '{setting}'. Did you mean '{nearest}'"):
        experiment(name)

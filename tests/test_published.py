"""Recipes at a system's own size against the table of published values (`tests/extra/published`)."""

from __future__ import annotations

import ast
import copy
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from published import RECIPES
from published.rows import Recipe
from recipes import NAMES, ROOT, block
from resolved import resolve, set_keys

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment

# Keys that a config sets and no paper knows of: data and their fields, hardware, and how much is kept.
FREE = re.compile(
    r"seed$|(mesh|checkpoint|evaluation)\.|model\.(towers\.\w+\.)?remat$|tasks\.\w+\.(source|evaluators)\."
    r"|modalities\.\w+\.(name|tokenizer)$|tasks\.\w+\.inputs\.\w+\.field$|tasks\.\w+\.objective\.(label|positive_key|chunk|remat)$"
    r"|tasks\.\w+\.shapes\."  # IMP's setting `mixed`, which is ours
)


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@cache
def config(name: str) -> configs.Block:
    return block(name)


def mismatches(recipe: Recipe, config: configs.Block) -> dict[str, tuple[Any, Any]]:
    """Return the keys of a config whose values are not those of the table, with both."""
    values = resolve(make_experiment(config))
    absent = "no such key"
    rows = [row for row in recipe.rows if row.key]
    found = {row.key: (values.get(row.key, absent), row.here) for row in rows}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


@cache
def header(name: str) -> str:
    """Return a config's docstring in lower case, as one line."""
    text = (ROOT / "configs" / f"{name}.py").read_text()
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split()).lower()


# --- the table ----------------------------------------------------------------------------------


def test_every_recipe_at_its_own_size_is_in_the_table() -> None:
    """Shapes of IMP's videos are in it at one size: they are ours, and the same at each."""
    ours = {name for name in NAMES if "small" in name or name.startswith("quickstart")}
    ours |= {name for name in NAMES if re.fullmatch("imp:(moe-)?[sl]-mixed", name)}
    assert {recipe.name for recipe in RECIPES} == set(NAMES) - ours
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


@every_recipe
def test_every_row_has_a_source_and_every_difference_a_reason(recipe: Recipe) -> None:
    keys = [row.key for row in recipe.rows if row.key]
    assert len(keys) == len(set(keys))
    for row in recipe.rows:
        assert row.source, row.key
        assert row.here == row.published or (row.why and row.words), row.key


@every_recipe
def test_every_key_that_a_config_sets_is_in_the_table(recipe: Recipe) -> None:
    """A key added to a recipe is a published value, or a difference with its reason."""
    known = {row.key for row in recipe.rows}
    left = [
        key
        for key in set_keys(config(recipe.name))
        if not FREE.match(key) and key not in known and key.rpartition(".")[0] not in known
    ]
    assert not left


# --- what is built ------------------------------------------------------------------------------


@every_recipe
def test_a_recipe_is_as_published_or_as_its_difference_says(recipe: Recipe) -> None:
    """With all defaults: a default that changes is a mismatch as well."""
    assert not mismatches(recipe, config(recipe.name))


@every_recipe
def test_the_header_states_every_difference(recipe: Recipe) -> None:
    said = " ".join(header(name) for name in recipe.headers)
    differ = [row for row in recipe.rows if row.words]
    unsaid = [row.words for row in differ if " ".join(row.words.split()).lower() not in said]
    assert not unsaid


@every_recipe
def test_the_header_names_all_keys_to_set_for_other_data(recipe: Recipe) -> None:
    """Sources of tasks and of evaluators, the tokenizer, and the field by which pairs belong together."""
    own = config(recipe.name)
    keys = {"modalities.text.tokenizer"} if "text" in own["modalities"] else set()
    for name, task in own["tasks"].items():
        keys |= {f"tasks.{name}.source"}
        keys |= {f"tasks.{name}.evaluators.{e}.source" for e in task["evaluators"]}
        if task["objective"].get("positive_key"):
            keys |= {f"tasks.{name}.objective.positive_key"}
    named = [w for file in recipe.headers for w in re.findall(r"`([\w.*]+)`", header(file))]
    assert not {key for key in keys if not any(fnmatch.fnmatch(key, word) for word in named)}


# --- mutations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A wrong config: values by dotted path (a function is applied to what is there, None deletes).

    Attributes:
      reported: a key that must be among the mismatches.
    """

    name: str
    changes: Mapping[str, Any]
    reported: str


LAST, FIRST = "model.layers.1.blocks.0", "model.layers.0.blocks.0"
PAIR, SOUNDS = "tasks.image_text.objective", "tasks.sounds.objective"
CAPTIONS = "tasks.captions.objective"


def imp(changes: Mapping[str, Any], reported: str) -> Mutation:
    return Mutation("imp:moe-b", changes, reported)


def limoe(changes: Mapping[str, Any], reported: str) -> Mutation:
    return Mutation("limoe:b16", changes, reported)


def mot(changes: Mapping[str, Any], reported: str) -> Mutation:
    return Mutation("mot:7b-transfusion", changes, reported)


def whole(vision: Any) -> Any:
    """Return a view of four frames without dropped tokens."""
    return {**vision, "frames": 4, "token_drop": 0.0}


def dropped(vision: Any) -> Any:
    return {**vision, "frames": 16, "token_drop": 0.75}


SPARSE = f"{LAST}.experts"
MUTATIONS = (
    imp({"tasks.video_text.inputs.vision": whole}, "tasks.video_text.inputs.vision.token_drop"),
    imp({"tasks.video_audio_text.inputs.vision": whole}, "tasks.video_audio_text.inputs.vision.frames"),
    imp({"tasks.videos.inputs.vision": dropped}, "tasks.videos.inputs.vision.frames"),
    imp({"tasks.videos.inputs.vision": dropped}, "tasks.videos.inputs.vision.token_drop"),
    imp({"optimizer.learning_rate": 1e-2}, "optimizer.learning_rate"),
    imp({"optimizer.algorithm.b1": 0.5}, "optimizer.algorithm.b1"),
    imp({"optimizer.algorithm.b2": 0.9}, "optimizer.algorithm.b2"),
    imp({"optimizer.end_lr_ratio": 0.5}, "optimizer.end_lr_ratio"),
    imp({"optimizer.algorithm.eps": 1e-3}, "optimizer.algorithm.eps"),
    imp({"optimizer.weight_decay": 0.1}, "optimizer.weight_decay"),
    imp({"optimizer.clip": 9.0}, "optimizer.clip"),
    imp({"model.layers": lambda groups: groups[::-1]}, "layers.experts"),
    imp({f"{FIRST}.qk_norm": None, f"{LAST}.qk_norm": None}, "layers.qk_norm"),
    imp({f"{PAIR}.init_temperature": 0.2}, f"{PAIR}.init_temperature"),
    imp({f"{PAIR}.space": "linear"}, f"{PAIR}.space"),
    imp({f"{SPARSE}.router": {"name": "token_choice"}}, "layers.experts.router.name"),
    imp({f"{PAIR}.head": "own"}, f"{PAIR}.head"),
    imp({"modalities.spectrogram.window": 1024, "modalities.spectrogram.hop": 512}, "modalities.spectrogram.window"),
    imp(
        {"modalities.vision.max_time_positions": 64, "modalities.vision.max_positions": 512},
        "modalities.vision.max_positions",
    ),
    imp({"modalities.spectrogram.max_positions": 8}, "modalities.spectrogram.max_positions"),
    imp({"steps": 50}, "steps"),
    imp({"tasks.video_text.inputs.vision.flip": True}, "tasks.video_text.inputs.vision.flip"),
    Mutation("imp:s", {"optimizer.warmup": 12_000}, "optimizer.warmup"),
    Mutation("imp:l", {"optimizer.end_lr_ratio": 1e-3}, "optimizer.end_lr_ratio"),
    limoe({f"{PAIR}.joint_forward": False}, f"{PAIR}.joint_forward"),
    limoe({"model.layers.0.blocks.1.experts.router.batch_priority": False}, "layers.experts.router.batch_priority"),
    limoe(
        {"model.layers.0.blocks.1.experts.entropy_floor": {"text": 0.0, "image": 0.0}},
        "layers.experts.entropy_floor",
    ),
    limoe({"model.layers.0.blocks.1.experts.local_entropy.text": 0.5}, "layers.experts.local_entropy"),
    limoe({"model.layers.0.blocks.1.experts.local_entropy.image": 0.01}, "layers.experts.local_entropy"),
    limoe({"optimizer.learning_rate": 1.0}, "optimizer.learning_rate"),
    limoe({f"{FIRST}.attention_bias": None}, "layers.attention_bias"),
    Mutation("moma:1b", {f"{FIRST}.experts.router.capacity": 4.0}, "layers.experts.router.capacity"),
    Mutation("moma:1b", {f"{FIRST}.experts.causal": None}, "layers.experts.causal.mlp_dim"),
    Mutation("moma:1b", {f"{FIRST}.norm_position": "pre"}, "layers.norm_position"),
    Mutation("mot:7b", {f"{FIRST}.norm_position": "post"}, "layers.norm_position"),
    Mutation("mot:7b", {f"{FIRST}.qk_norm": True}, "layers.qk_norm"),
    mot({f"{CAPTIONS}.weight": 1.0}, f"{CAPTIONS}.weight"),
    mot({f"{CAPTIONS}.max_time": 1.0}, f"{CAPTIONS}.max_time"),
    mot({f"{FIRST}.rotary": None}, "layers.rotary"),
    mot({f"{CAPTIONS}.prediction": "v"}, f"{CAPTIONS}.prediction"),
    mot({f"{CAPTIONS}.reverse_prob": 0.8}, f"{CAPTIONS}.reverse_prob"),
    mot({"optimizer.algorithm.b2": 0.5}, "optimizer.algorithm.b2"),
    mot({"modalities.text.positions": "learned", "modalities.text.max_positions": 255}, "modalities.text.positions"),
    Mutation("coca:2b", {f"{CAPTIONS}.caption_weight": 1.0}, f"{CAPTIONS}.caption_weight"),
    Mutation("coca:2b", {"optimizer.learning_rate": 0.8}, "optimizer.learning_rate"),
    Mutation("coca:2b", {f"{CAPTIONS}.pooling": "parallel"}, f"{CAPTIONS}.pooling"),
    Mutation("coca:2b", {"optimizer.decay": None}, "optimizer.decay"),
    Mutation("mbt:b", {f"{SOUNDS}.smoothing": 0.0}, f"{SOUNDS}.smoothing"),
    Mutation("mbt:b", {f"{SOUNDS}.readout": "each"}, f"{SOUNDS}.readout"),
    Mutation("zorro:b", {f"{SOUNDS}.mask": "full"}, f"{SOUNDS}.mask"),
    Mutation("mixture_of_mamba:1b", {f"{FIRST}.norm": "layer"}, "layers.norm"),
)  # fmt: skip


def mutated(config: configs.Block, changes: Mapping[str, Any]) -> configs.Block:
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        at: Any = config
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at[name]
        if value is None:
            del at[last]
        else:
            at[last] = value(at[last]) if callable(value) else value
    return config


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda m: f"{m.name}-{m.reported.rpartition('.')[2]}"
)
def test_a_wrong_config_is_reported(mutation: Mutation) -> None:
    recipe = next(r for r in RECIPES if r.name == mutation.name)
    wrong = mutated(config(mutation.name), mutation.changes)
    assert wrong != config(mutation.name)
    assert mutation.reported in mismatches(recipe, wrong)


def test_a_weight_of_the_wrong_sign_is_refused() -> None:
    """LIMoE's local entropy of texts, with which routing would be pushed to one expert."""
    changes = {"model.layers.0.blocks.1.experts.local_entropy.text": -0.01}
    wrong = mutated(config("limoe:b16"), changes)
    with pytest.raises(UserError, match=r"local_entropy\.text is -0.01; it must be at least 0"):
        make_experiment(wrong)


def test_a_default_that_changes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of CoCa's loss, and the place of a block's norms, are keys that no config sets."""
    from mmjax.blocks.transformer import Transformer
    from mmjax.objectives.coca import Coca

    recipe = next(r for r in RECIPES if r.name == "coca:base")
    defaults = list(Transformer.__init__.__defaults__ or ())
    defaults[defaults.index("pre")] = "post"
    monkeypatch.setattr(Transformer.__init__, "__defaults__", tuple(defaults))
    changed = {**Coca.__init__.__kwdefaults__, "loss": "sigmoid"}
    monkeypatch.setattr(Coca.__init__, "__kwdefaults__", changed)
    wrong = mismatches(recipe, config(recipe.name))
    assert set(wrong) == {"layers.norm_position", f"{CAPTIONS}.loss"}

"""Average the parameters of several runs of one config: a model soup (Wortsman et al. 2022).

    mmjax average RUN[@STEP] RUN[@STEP] ... --out=DIR [--weights=W,W,...]

It takes the newest checkpoint of each run, or that of STEP, and writes one checkpoint in DIR that `mmjax evaluate`,
`show`, `mmjax.load` and `init_from` read. Moving averages are averaged where the runs keep them, and so are other
buffers; optimizer state is not. The checkpoint has the config and clock of the first run. A run cannot be resumed from
it; begin one with `init_from`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.core import config as configs
from mmjax.core import errors, flags
from mmjax.core.errors import UserError
from mmjax.core.files import replace_file
from mmjax.engine import checkpoint
from mmjax.engine.checkpoint import CheckpointConfig, Checkpoints
from mmjax.engine.metadata import AVERAGE_OF
from mmjax.engine.state import SUM, SUMMED
from mmjax.loading import find_step
from mmjax.run_config import RunConfig

PARTS = ("parameters", "buffers")

Arrays = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint that is averaged with others.

    Attributes:
      shapes: shape and dtype of its arrays by part and name.
    """

    workdir: epath.Path
    step: int
    meta: Mapping[str, Any]
    shapes: Mapping[tuple[str, str], jax.ShapeDtypeStruct]

    def __str__(self) -> str:
        return f"{self.workdir}@{self.step}"

    def read(self) -> Arrays:
        """Return its arrays."""
        target: dict[str, Any] = {part: {} for part in PARTS}
        for (part, name), leaf in self.shapes.items():
            target[part][name] = leaf
        state = checkpoint.read_state(self.workdir, self.step, target)
        return {(part, name): np.asarray(state[part][name]) for part, name in self.shapes}


def ingredient(text: str) -> Ingredient:
    """Return the checkpoint that `RUN` or `RUN@STEP` names; sums of an unfinished round are no part of it."""
    match = re.fullmatch(r"(.+)@(\d+)", text)
    where, step = (match[1], int(match[2])) if match else (text, None)
    workdir = flags.folder(where)
    step, meta = find_step(workdir, step)
    stored = checkpoint.read_shapes(workdir, step)
    shapes = {
        (part, name): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for part in PARTS
        for name, leaf in stored.get(part, {}).items()
        if not name.startswith(SUM) and name != SUMMED
    }
    return Ingredient(workdir, step, meta, shapes)


def check_alike(first: Ingredient, other: Ingredient) -> None:
    """Raise unless two checkpoints hold arrays of the same names, shapes and dtypes, of one model and its files.

    Raises:
      UserError: names the first difference.
    """
    for part, name in sorted(first.shapes.keys() | other.shapes.keys()):
        one, two = (words_of(x.shapes.get((part, name))) for x in (first, other))
        if one != two:
            raise UserError(
                f"These are no runs of one config: {part}/{name} is {one} in '{first}' and {two} in '{other}'."
            )
    for difference in configs.compare(first.meta["config"], other.meta["config"], RunConfig):
        if difference.kind == "structural" and difference.key.startswith(("model.", "modalities.")):
            raise UserError(
                f"These are no runs of one config: {difference.key} is {difference.saved!r} in '{first}' and "
                f"{difference.new!r} in '{other}'."
            )
    for key in sorted(first.meta["identities"].keys() & other.meta["identities"].keys()):
        if key.startswith(("modalities.", "code.")):
            one, two = (x.meta["identities"][key] for x in (first, other))
            if one != two:
                raise UserError(
                    f"'{first}' and '{other}' were trained with different files of {key}: their SHA-256 are "
                    f"{one[:12]}... and {two[:12]}..."
                )


def words_of(leaf: jax.ShapeDtypeStruct | None) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def mean(ingredients: Sequence[Ingredient], weights: Sequence[float]) -> Arrays:
    """Return the weighted mean of the checkpoints' arrays, each in its dtype, computed in float64.

    It is the first array plus the mean difference from it, so that equal arrays stay as they are to the bit. Arrays of
    integers must be equal.
    """
    first = ingredients[0].read()
    total = sum(weights)
    sums = {
        key: np.zeros(value.shape, np.float64)
        for key, value in first.items()
        if jnp.issubdtype(value.dtype, jnp.floating)
    }
    for other, weight in zip(ingredients[1:], weights[1:], strict=True):
        for (part, name), value in other.read().items():
            base = first[part, name]
            if (part, name) in sums:
                sums[part, name] += weight / total * (value.astype(np.float64) - base)
            elif not np.array_equal(value, base):
                raise UserError(
                    f"{part}/{name} is an array of {value.dtype}, and differs between '{ingredients[0]}' and "
                    f"'{other}'; only floating-point arrays are averaged."
                )
    for (part, name), change in sums.items():
        base = first[part, name]
        moved = np.where(change == 0, base, base.astype(np.float64) + change).astype(base.dtype)
        if not np.isfinite(moved.astype(np.float64)).all():
            raise UserError(f"{part}/{name} has values that are not finite in one of the runs.")
        first[part, name] = moved
    return first


def average(ingredients: Sequence[Ingredient], weights: Sequence[float], out: epath.Path) -> int:
    """Write the average as a checkpoint in `out`, with config and files of the first run; return its step."""
    first = ingredients[0]
    for other in ingredients[1:]:
        check_alike(first, other)
    if checkpoint.steps(out):
        raise UserError(f"--out={out} holds checkpoints. Give a new folder.")
    state: dict[str, dict[str, jax.Array]] = {part: {} for part in PARTS}
    for (part, name), value in mean(ingredients, weights).items():
        state[part][name] = jax.device_put(value)
        if state[part][name].dtype != value.dtype:
            raise UserError(
                f"{part}/{name} is {value.dtype}: set JAX_ENABLE_X64=1 in the environment."
            )
    parts = [
        {"path": str(x.workdir), "step": x.step, "weight": weight}
        for x, weight in zip(ingredients, weights, strict=True)
    ]
    of_first = ("clock", "config", "identities", "environment")
    meta = {**{key: first.meta[key] for key in of_first}, AVERAGE_OF: parts}
    out.mkdir(parents=True, exist_ok=True)
    _copy_files(first.workdir, out)
    with Checkpoints(out, CheckpointConfig()) as checkpoints:
        checkpoints.save(first.step, state, meta)
        checkpoints.wait()
    return first.step


def _copy_files(source: epath.Path, out: epath.Path) -> None:
    """Copy the config, and the files that modalities name."""
    files = [path for path in (source / "config.json",) if path.exists()]
    if (source / "assets").exists():
        files += list((source / "assets").iterdir())
    for path in files:
        copy = out / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        replace_file(copy, path.read_bytes())


def weights_of(text: str, count: int) -> list[float]:
    """Return the weights that the option gives, or equal ones.

    Raises:
      UserError: they are not as many as the runs, not numbers, below 0, or all 0.
    """
    if not text:
        return [1.0] * count
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--weights={text}: expected numbers, such as 1,1,2.") from None
    if len(weights) != count:
        raise UserError(f"--weights={text} are {len(weights)} numbers for {count} runs.")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise UserError(f"--weights={text}: expected numbers of at least 0, not all of them 0.")
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("average", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN[@STEP]", help="a run's folder, perhaps with a step"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the average")
    parser.add_argument(
        "--weights", default="", metavar="W,W,...", help="of the runs, in order; equal if not given"
    )
    arguments, _ = flags.parse(parser, argv)
    weights = weights_of(arguments.weights, len(arguments.runs))
    ingredients = [ingredient(text) for text in arguments.runs]
    out = flags.make_workdir(arguments.out)
    step = average(ingredients, weights, out)
    for part, weight in zip(ingredients, weights, strict=True):
        print(f"{weight / sum(weights):6.3f}  {part}")
    print(f"Wrote the average as step {step} of {out}. Next: mmjax evaluate --workdir={out}")
    return 0


if __name__ == "__main__":
    errors.run(main)

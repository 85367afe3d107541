"""Show what a checkpoint or a config holds.

    mmjax show DIR [--step=N] [--digest [--all]]
    mmjax show DIR --names
    mmjax show --config=CONFIG [--names] [--config.KEY=VALUE ...]

The first prints step, visits, positions, parameters by part and bytes; with `--digest` its last line is a
stable SHA-256 of the parameters. The second prints a line for each parameter: name, dtype and shape, as
`optimizer.rules` and `init_from` call it; DIR may be a .npz or .safetensors file. The third prints the parameter
table or the names of a config without a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.core import errors, flags
from mmjax.core.errors import UserError
from mmjax.core.parameters import digest, to_canonical
from mmjax.engine import checkpoint
from mmjax.engine.state import Clock, compute_dtype
from mmjax.engine.tensor_files import SUFFIXES, open_tensors, printable
from mmjax.experiment import make_experiment
from mmjax.loading import find_step
from mmjax.monitor.parameter_rows import rows_of_checkpoint, rows_of_config
from mmjax.monitor.tables import human_bytes, parameter_table, table


def show_config(path: str, overrides: Sequence[str], with_names: bool = False) -> None:
    experiment = make_experiment(flags.read_config(path, overrides))
    specs = experiment.declaration.specs
    if not with_names:
        parameter_table(rows_of_config(specs))
        return
    shapes = experiment.declaration.shapes(compute_dtype(experiment.run.dtype.parameters))
    show_names(jax.eval_shape(lambda p: to_canonical(specs, p), shapes))


def show_names(shapes: Mapping[str, Any]) -> None:
    """Print a line for each array: its name, dtype and shape."""
    width = max((len(printable(name)) for name in shapes), default=0)
    for name in sorted(shapes):
        leaf = shapes[name]
        print(f"{printable(name):<{width}}  {leaf.dtype}{list(leaf.shape)}")


def names_in(where: str, step: int | None) -> Mapping[str, Any]:
    """Return the parameters of a run's checkpoint, or the arrays of a file, by name: each with dtype and shape."""
    workdir = flags.folder(where)
    if workdir.suffix in SUFFIXES and not workdir.is_dir():
        return open_tensors(workdir).entries
    step, _ = find_step(workdir, step)
    shapes: Mapping[str, Any] = checkpoint.read_shapes(workdir, step)["parameters"]
    return shapes


def show_run(
    workdir: epath.Path, step: int | None, with_digest: bool, with_all: bool = False
) -> None:
    """Print what a checkpoint holds."""
    step, meta = find_step(workdir, step)
    shapes = checkpoint.read_shapes(workdir, step)
    clock = Clock.from_json(meta["clock"])
    visits = clock.schedule.visits(step)
    print(
        f"{workdir}: checkpoint of step {step} of {meta['config']['steps']}, format {meta['format']}"
    )
    print(f"Verified: {_verified(meta, with_digest)}.\n")
    counts = [
        (
            name,
            visits.get(name, 0),
            position,
            clock.skipped.get(name, 0),
            clock.invalid.get(name, 0),
        )
        for name, position in clock.positions.items()
    ]
    table("Tasks", ("task", "visits", "position", "skipped", "invalid"), counts)
    for task, start in clock.quarantined.items():
        print(f"Quarantined from step {start} on: {task}.\n")
    segments = [
        (s.start, s.rule, ", ".join(f"{t} {w}" for t, w in s.weights.items()))
        for s in clock.schedule.segments
    ]
    table("Schedule", ("from step", "rule", "weights"), segments)
    parameter_table(rows_of_checkpoint(shapes["parameters"]))
    sizes = [
        (part, len(jax.tree.leaves(leaves)), human_bytes(_bytes(leaves)))
        for part, leaves in shapes.items()
    ]
    table("Bytes", ("held", "arrays", "bytes"), sizes)
    if with_digest:
        arrays = (
            read_whole(workdir, step, shapes)
            if with_all
            else read_arrays(workdir, step, shapes["parameters"])
        )
        print(digest(arrays))


def _verified(meta: Mapping[str, Any], with_digest: bool) -> str:
    """Return which parts of a checkpoint have been compared with their checksums here."""
    if not checkpoint.is_verified(meta):
        return "no, format 1 has no checksums"
    return "meta data" + (" and parameters" if with_digest else "; arrays are when they are read")


def read_arrays(workdir: epath.Path, step: int, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the parameters of a checkpoint as NumPy arrays under their canonical names."""
    target = {"parameters": {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}}
    state: dict[str, np.ndarray] = checkpoint.read_state(workdir, step, target)["parameters"]
    return state


def read_whole(workdir: epath.Path, step: int, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return all arrays of a checkpoint as NumPy arrays, by `PART/NAME`: `optimizer/stems/text/table/mu`."""
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), dict(shapes))
    pairs = jax.tree_util.tree_leaves_with_path(checkpoint.read_state(workdir, step, target))
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in pairs}


def _bytes(leaves: Any) -> int:
    arrays: Iterable[Any] = jax.tree.leaves(leaves)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("show", __doc__)
    parser.add_argument("workdir", nargs="?", metavar="DIR", help="the run's folder")
    flags.add_config(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint; the newest if not given"
    )
    parser.add_argument(
        "--digest", action="store_true", help="print a digest of the parameters as the last line"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="with --digest: of the whole state, not only the parameters",
    )
    parser.add_argument(
        "--names", action="store_true", help="print the name, dtype and shape of every parameter"
    )
    arguments, overrides = flags.parse(parser, argv)
    if (arguments.workdir is None) == (arguments.config is None):
        raise UserError(f"Give a run's folder, or --config=CONFIG. {flags.usage(parser)}")
    if arguments.all and not arguments.digest:
        raise UserError("--all is an option of --digest: give --digest --all.")
    if arguments.config is not None:
        show_config(arguments.config, overrides, arguments.names)
    elif arguments.names:
        show_names(names_in(arguments.workdir, arguments.step))
    else:
        show_run(flags.folder(arguments.workdir), arguments.step, arguments.digest, arguments.all)
    return 0


if __name__ == "__main__":
    errors.run(main)

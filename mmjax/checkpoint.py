"""Checkpoints: Orbax, asynchronous, under canonical names, with the clock and the config as data.

`WORKDIR/checkpoints/STEP/` holds `state` (arrays) and `meta` (JSON: format, clock, config, identities of
the data, versions). A step folder gets its name only when all of it is written.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mmjax import migrations, processes
from mmjax.bounds import AMOUNT, COUNT, SIZE, check
from mmjax.errors import UserError, nearest
from mmjax.monitor import metrics

FORMAT = 1
FOLDER = "checkpoints"
# Orbax measures its patience by the clock on the wall, which may jump; a save that hangs is for the watchdog.
# (For folders made in the background its patience cannot be set, so they are made at once.)
_NO_TIMEOUT = 10**9


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what stays: whatever any of these asks for, and always the newest one at which all
    tasks were well.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: how many of the newest stay.
      keep_every: checkpoints at multiples of so many steps stay; 0: none.
      keep_minutes: of each stretch of so many minutes the first stays; 0: none.
      best: a measure of the evaluations, `TASK/NAME` or `TASK/NAME/SPLIT`, as in `results.json`. Only steps
        that are both saved and evaluated have one.
      best_is: whether `highest` or `lowest` is best.
      keep_best: how many of the best stay.
    """

    every: int = 500
    keep: int = 2
    keep_every: int = 0
    keep_minutes: float = 0.0
    best: str = ""
    best_is: str = "highest"
    keep_best: int = 1

    def __post_init__(self) -> None:
        check(self, every=SIZE, keep=COUNT, keep_every=SIZE, keep_minutes=AMOUNT, keep_best=SIZE)


class _Retention(policies.PreservationPolicy):
    """What stays, as Orbax asks before it deletes; all processes find the same."""

    def __init__(
        self, workdir: epath.Path, config: CheckpointConfig, is_well: Callable[[dict[str, Any]], bool]
    ):  # fmt: skip
        if config.best_is not in ("highest", "lowest"):
            raise UserError(
                f"config.checkpoint.best_is is '{config.best_is}'; it is 'highest' or 'lowest'."
            )
        self._workdir, self._config, self._is_well = workdir, config, is_well
        self._well: dict[int, bool] = {}
        self._values: dict[int, float] = {}
        for line in metrics.read(workdir) if config.best else []:
            if line["kind"] == "eval" and _is_measure(line, config.best):
                self._values.setdefault(line["step"], line["value"])

    def saved(self, step: int, meta: dict[str, Any]) -> None:
        self._well[step] = self._is_well(meta)

    def evaluated(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the measure of a step from the records of its evaluation."""
        if not self._config.best:
            return
        found = [r["value"] for r in records if _is_measure(r, self._config.best)]
        if not found:
            known = [f"{r['task']}/{r['name']}/{r['split']}" for r in records]
            raise UserError(
                f"config.checkpoint.best: no measure '{self._config.best}'."
                f"{nearest(self._config.best, known)}"
            )
        self._values[step] = found[0]

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        config = self._config
        wanted: list[policies.PreservationPolicy] = [policies.LatestN(config.keep)]
        if config.keep_every:
            wanted.append(policies.EveryNSteps(config.keep_every))
        if config.keep_minutes:
            wanted.append(policies.EveryNSeconds(int(60 * config.keep_minutes)))
        well = [c.step for c in checkpoints if self._was_well(c.step)]
        wanted.append(policies.CustomSteps(well[-1:] + self._best(c.step for c in checkpoints)))
        return policies.AnyPreservationPolicy(wanted).should_preserve(checkpoints, context=context)

    def _best(self, steps: Iterable[int]) -> list[int]:
        sign = 1 if self._config.best_is == "highest" else -1
        values = {s: self._values[s] for s in steps if math.isfinite(self._values.get(s, math.nan))}
        ranked = sorted(values, key=lambda step: (sign * values[step], step), reverse=True)
        return ranked[: self._config.keep_best]

    def _was_well(self, step: int) -> bool:
        if step not in self._well:
            try:
                self._well[step] = self._is_well(read_meta(self._workdir, step))
            except ValueError:
                self._well[step] = False
        return self._well[step]


def _is_measure(record: Mapping[str, Any], measure: str) -> bool:
    name = f"{record['task']}/{record['name']}"
    return measure in (name, f"{name}/{record.get('split')}")


@dataclass(frozen=True)
class Restored:
    """A checkpoint: its step, its state in canonical form, its meta data, and what `check_shapes` says of it."""

    step: int
    state: Any
    meta: dict[str, Any]
    widened: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one workdir, for writing; leaving the `with` block waits for what is under way."""

    def __init__(
        self,
        workdir: epath.Path,
        config: CheckpointConfig,
        is_well: Callable[[dict[str, Any]], bool] = lambda meta: True,
    ):
        self._retention = _Retention(workdir, config, is_well)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention, create=True, enable_async_checkpointing=True, step_prefix=None,
            async_options=ocp.AsyncOptions(
                timeout_secs=_NO_TIMEOUT, create_directories_asynchronously=False
            ),
        )  # fmt: skip
        # Numbers that were trained shrink by a tenth at most, and take twice as long to read when they did.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            workdir / FOLDER, options=options, item_handlers=handlers
        )
        self._hush = _quiet()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Begin to save; the arrays are copied before it returns, the rest goes on in the background.

        A step that is saved already is left as it is: a signal may ask for it again.
        """
        if step in self._manager.all_steps():
            return
        self._retention.saved(step, dict(meta))
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_without_empty(state)),
            meta=ocp.args.JsonSave({"format": FORMAT, migrations.KEY: migrations.VERSION, **meta}),
        )
        self._manager.save(step, args=arguments, force=True)

    def evaluated(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """What an evaluation after `step` steps found, for `config.checkpoint.best`."""
        self._retention.evaluated(step, records)

    def wait(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def __enter__(self) -> Checkpoints:
        self._hush.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._manager.close()
        finally:
            self._hush.__exit__(None, None, None)


def steps(workdir: epath.Path) -> list[int]:
    """Steps of the finished checkpoints, newest first."""
    folder = workdir / FOLDER
    if not folder.exists():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def read_meta(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The meta data of a checkpoint; `ValueError` if it is torn, `UserError` if it is of a newer format."""
    try:
        meta = json.loads((workdir / FOLDER / str(step) / "meta" / "metadata").read_text())
    except OSError as error:
        raise ValueError(f"no meta data: {error}") from error
    if meta["format"] > FORMAT:
        raise UserError(
            f"Checkpoint {workdir / FOLDER / str(step)} has format {meta['format']}; this mmjax reads up to {FORMAT}. "
            "Install a newer mmjax."
        )
    return migrations.upgrade_meta(meta)


def read_shapes(workdir: epath.Path, step: int) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of what a checkpoint holds: `{"parameters": {canonical name: ...}, ...}`."""
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(workdir / FOLDER / str(step) / "state")
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    return dict(tree)


def read_state(workdir: epath.Path, step: int, abstract: Mapping[str, Any]) -> Any:
    """Arrays of a checkpoint, as `abstract` asks (shardings included); parts that it leaves out are not read."""
    wanted = _without_empty(abstract)
    restore_args = jax.tree.map(_restore_args, wanted)
    # Each process reads for itself: one that fails must not leave the others at a barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=restore_args, partial_restore=True
        )
        state = checkpointer.restore(workdir / FOLDER / str(step) / "state", args=arguments)
    return {part: state.get(part, {}) for part in abstract}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warnings: of a folder that is one item of a checkpoint, as ours are; of a slow disk."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)


def _restore_args(leaf: Any) -> Any:
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _without_empty(tree: Mapping[str, Any]) -> dict[str, Any]:
    # Orbax does not store empty dicts, and refuses to restore them.
    return {part: leaves for part, leaves in tree.items() if leaves}


def check_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[str]:
    """Compare shapes and dtypes by name; the error lists parameter path, expected and found.

    Returns:
      What is stored in a narrower dtype than it is kept in today, and is widened as it is read: earlier versions kept
      averages, sums and second moments of bfloat16 parameters in bfloat16.
    """
    wrong, widened = [], list[str]()
    # Parameters first: what is wrong with them is wrong with what follows them.
    for part in sorted(expected, key=lambda part: (part != "parameters", part)):
        have = _flat(found.get(part, {}))
        for name, leaf in _flat(expected[part]).items():
            stored = have.get(name)
            if stored is None:
                wrong.append(f"{part}/{name}: expected {_words(leaf)}, found nothing")
            elif part != "parameters" and _widens(stored, leaf):
                widened.append(f"{part}/{name}")
            elif tuple(stored.shape) != tuple(leaf.shape) or stored.dtype != leaf.dtype:
                wrong.append(f"{part}/{name}: expected {_words(leaf)}, found {_words(stored)}")
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        lines = "\n  ".join(wrong[:8])
        raise UserError(
            f"Checkpoint {where} does not fit this config:\n  {lines}{more}\nUse another --workdir."
        )
    return widened


def _widens(stored: Any, leaf: Any) -> bool:
    """Whether an array is stored in a dtype all of whose values that of `leaf` holds too."""
    both = [np.dtype(x.dtype) for x in (stored, leaf)]
    floats = all(jax.numpy.issubdtype(dtype, jax.numpy.floating) for dtype in both)
    fits = floats and jax.numpy.promote_types(*both) == both[1]
    return fits and both[0] != both[1] and tuple(stored.shape) == tuple(leaf.shape)


def _flat(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in pairs}


def _words(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def restore_latest(
    workdir: epath.Path,
    abstract: Mapping[str, Any],
    accept: Callable[[int, dict[str, Any]], None],
    say: Callable[[str], None],
    may_be_new: Callable[[str, dict[str, Any]], bool],
) -> Restored | None:
    """The newest checkpoint that can be read; torn ones are set aside, aloud.

    Args:
      workdir: the run's folder.
      abstract: shapes, dtypes and shardings of the wanted state, in canonical form.
      accept: `accept(step, meta)` may refuse a checkpoint by raising a `UserError` before its arrays are read.
      say: tells the person.
      may_be_new: `may_be_new(name, meta)`: whether a parameter may be absent; it is left out of the result.
    """
    # Which there are, process 0 says: it also moves what is torn.
    for step in processes.gather(steps(workdir))[0]:
        restored: Restored | None = None
        words: str | None = None
        try:
            restored = restore(workdir, step, abstract, accept, may_be_new)
        except UserError:
            raise
        except Exception as error:
            # Whatever Orbax and TensorStore raise for files that are cut or gone.
            words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        # What one process cannot read, none takes.
        torn = [w for w in processes.gather(words) if w is not None]
        if not torn:
            if restored is not None and restored.widened:
                say(
                    f"Checkpoint {step} holds {len(restored.widened)} arrays in a narrower dtype than they are kept in "
                    f"today ({restored.widened[0]} and so on); they go on in the wider one."
                )
            return restored
        if processes.is_first():
            aside = set_aside(workdir, step, "torn")
            say(
                f"Checkpoint {step} cannot be read ({torn[0]}). Moved to {aside}; trying the one before it."
            )
    return None


def restore(
    workdir: epath.Path,
    step: int,
    abstract: Mapping[str, Any],
    accept: Callable[[int, dict[str, Any]], None],
    may_be_new: Callable[[str, dict[str, Any]], bool],
) -> Restored:
    """The checkpoint of a step; arguments as of `restore_latest`. One that is torn may raise anything."""
    meta = read_meta(workdir, step)
    accept(step, meta)
    found = read_shapes(workdir, step)
    wanted = _without_new(abstract, found, meta, may_be_new)
    widened = check_shapes(found, wanted, str(workdir / FOLDER / str(step)))
    return Restored(step, read_state(workdir, step, wanted), meta, tuple(widened))


def _without_new(
    abstract: Mapping[str, Any], found: Mapping[str, Any], meta: dict[str, Any], may_be_new: Any
) -> dict[str, Any]:
    return {
        part: {
            n: leaf
            for n, leaf in leaves.items()
            if n in found.get(part, {}) or not may_be_new(n, meta)
        }
        for part, leaves in abstract.items()
    }


def set_aside(workdir: epath.Path, step: int, folder: str) -> epath.Path:
    """Move a checkpoint to `WORKDIR/folder/STEP`; where it lies now."""
    aside = workdir / folder / str(step)
    aside.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while aside.exists():
        number += 1
        aside = aside.parent / f"{step}.{number}"
    (workdir / FOLDER / str(step)).rename(aside)
    return aside

"""Checkpoints: Orbax, asynchronous, under canonical names, with the clock and the config as data.

`WORKDIR/checkpoints/STEP/` holds `state` (arrays, `mmjax.engine.arrays`) and `meta` (JSON: format, clock, config,
identities of the data, versions, `mmjax.engine.metadata`). A step folder gets its name only when all of it is written.
Everything that is read is verified by the checksums of format 2; checkpoints of format 1 have none.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mmjax.core.bounds import AMOUNT, COUNT, SIZE, check
from mmjax.core.config import Difference
from mmjax.core.errors import UserError, nearest
from mmjax.core.files import is_local, naming
from mmjax.engine import arrays, metadata, processes
from mmjax.engine.integrity import DECODING, Damaged, Unreadable, reading, words
from mmjax.engine.metadata import FORMAT as FORMAT
from mmjax.engine.metadata import is_verified as is_verified
from mmjax.monitor import metrics

T = TypeVar("T")
Accept = Callable[[int, dict[str, Any]], Iterable[Difference]]
FOLDER = "checkpoints"
TORN = "torn"
UNVERIFIED = "Checkpoint {step} has format 1, without checksums: it was read unverified."
# Orbax measures its patience by the clock on the wall, which may jump; a save that hangs is for the watchdog.
# (For folders made in the background its patience cannot be set, so they are made at once.)
_NO_TIMEOUT = 10**9


@dataclass(frozen=True)
class CheckpointConfig:
    """Times of checkpoints, and rules for keeping them: whatever any of these asks for, and always the newest one at
    which all tasks were well.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep: how many of the newest stay.
      keep_every: checkpoints at multiples of this number of steps stay; 0: none.
      keep_minutes: the first checkpoint of each interval of this length stays; 0: none.
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
    """The rules for keeping checkpoints, called by Orbax before it deletes; every process decides alike."""

    def __init__(
        self, workdir: epath.Path, config: CheckpointConfig, is_healthy: Callable[[dict[str, Any]], bool]
    ):  # fmt: skip
        if config.best_is not in ("highest", "lowest"):
            raise UserError(
                f"config.checkpoint.best_is is '{config.best_is}'; it is 'highest' or 'lowest'."
            )
        self._workdir, self._config, self._is_healthy = workdir, config, is_healthy
        self._healthy: dict[int, bool] = {}
        self._values: dict[int, float] = {}
        for line in metrics.read(workdir) if config.best else []:
            if line["kind"] == "eval" and _is_measure(line, config.best):
                self._values.setdefault(line["step"], line["value"])

    def saved(self, step: int, meta: dict[str, Any]) -> None:
        self._healthy[step] = self._is_healthy(meta)

    def evaluated(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the measure of a step from the records of its evaluation."""
        if not self._config.best:
            return
        values = [r["value"] for r in records if _is_measure(r, self._config.best)]
        if not values:
            known = [f"{r['task']}/{r['name']}/{r['split']}" for r in records]
            raise UserError(
                f"config.checkpoint.best: no measure '{self._config.best}'."
                f"{nearest(self._config.best, known)}"
            )
        self._values[step] = values[0]

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        config = self._config
        policy_list: list[policies.PreservationPolicy] = [policies.LatestN(config.keep)]
        if config.keep_every:
            policy_list.append(policies.EveryNSteps(config.keep_every))
        if config.keep_minutes:
            policy_list.append(policies.EveryNSeconds(int(60 * config.keep_minutes)))
        steps = [c.step for c in checkpoints]
        well = [step for step in steps if self._was_healthy(step)]
        linked = [step for step in steps if _is_link(self._workdir, step)]
        policy_list.append(policies.CustomSteps(well[-1:] + self._best(steps) + linked))
        return policies.AnyPreservationPolicy(policy_list).should_preserve(
            checkpoints, context=context
        )

    def _best(self, steps: Iterable[int]) -> list[int]:
        sign = 1 if self._config.best_is == "highest" else -1
        values = {s: self._values[s] for s in steps if math.isfinite(self._values.get(s, math.nan))}
        ranked = sorted(values, key=lambda step: (sign * values[step], step), reverse=True)
        return ranked[: self._config.keep_best]

    def _was_healthy(self, step: int) -> bool:
        if step not in self._healthy:
            try:
                self._healthy[step] = self._is_healthy(read_meta(self._workdir, step))
            except Damaged:
                self._healthy[step] = False
        return self._healthy[step]


def _is_measure(record: Mapping[str, Any], measure: str) -> bool:
    name = f"{record['task']}/{record['name']}"
    return measure in (name, f"{name}/{record.get('split')}")


@dataclass
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: completed training steps.
      state: its arrays in canonical form; None once they are taken.
      meta: its meta data.
      widened: arrays that are stored in a narrower dtype (see `check_shapes`).
      differences: between its config and that of the run that continues from it, as `accept` returned them.
      unused: its parameters that the run has not, by canonical name.
    """

    step: int
    state: Any
    meta: dict[str, Any]
    widened: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    unused: tuple[str, ...] = ()

    def take(self) -> dict[str, Any]:
        """Return the arrays, and keep no reference to them, which would double the memory of the state.

        Raises:
          RuntimeError: they were taken before.
        """
        if self.state is None:
            raise RuntimeError(f"the arrays of checkpoint {self.step} were taken before")
        state: dict[str, Any] = self.state
        self.state = None
        return state


class Checkpoints:
    """The checkpoints of one workdir, for writing; leaving the `with` block waits for what is under way."""

    def __init__(
        self,
        workdir: epath.Path,
        config: CheckpointConfig,
        is_healthy: Callable[[dict[str, Any]], bool] = lambda meta: True,
    ):
        self._folder = workdir / FOLDER
        self._retention = _Retention(workdir, config, is_healthy)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention, create=True, enable_async_checkpointing=True, step_prefix=None,
            async_options=ocp.AsyncOptions(
                timeout_secs=_NO_TIMEOUT, create_directories_asynchronously=False
            ),
        )  # fmt: skip
        handlers = {"state": arrays.TreeHandler(), "meta": ocp.JsonCheckpointHandler()}
        try:
            with naming(self._folder):
                self._manager = ocp.CheckpointManager(
                    self._folder, options=options, item_handlers=handlers
                )
        except ValueError as error:
            raise UserError(
                f"A file _CHECKPOINT_METADATA in '{self._folder}' is damaged ({words(error)}). It holds times "
                "of saving only: delete it."
            ) from error
        self._hush = _quiet()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Begin to save; the arrays are copied before it returns, the rest continues in the background.

        A step that is saved already is left as it is: a signal may ask for it again.
        """
        if step in self._manager.all_steps():
            return
        self._retention.saved(step, dict(meta))
        arguments = ocp.args.Composite(
            state=arrays.TreeSave(_without_empty(state), step=step),
            meta=ocp.args.JsonSave(metadata.document(step, meta)),
        )
        with naming(self._folder):
            self._manager.save(step, args=arguments, force=True)

    def evaluated(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Note the results of an evaluation after `step` steps, for `config.checkpoint.best`."""
        self._retention.evaluated(step, records)

    def wait(self) -> None:
        with naming(self._folder):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def __enter__(self) -> Checkpoints:
        self._hush.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with naming(self._folder):
                self._manager.close()
        finally:
            self._hush.__exit__(None, None, None)


def steps(workdir: epath.Path) -> list[int]:
    """Return the steps of the finished checkpoints, newest first.

    Raises:
      Unreadable: the folder cannot be listed; that is no reason to believe that it is empty.
    """
    names = [name for name in _listed(workdir / FOLDER) if re.fullmatch("0|[1-9][0-9]*", name)]
    folders = [name for name in names if not _is_file(workdir / FOLDER / name)]
    return sorted(map(int, folders), reverse=True)


def newest(
    workdir: epath.Path, readable: Callable[[int], T | None], among: Sequence[int] | None = None
) -> T | None:
    """Return what `readable` returns for the newest checkpoint that it accepts; None if it accepts none.

    Nothing is moved or written, unless `readable` does so.

    Args:
      workdir: the run's folder.
      readable: `readable(step)` reads what is wanted of a checkpoint. If it returns None, the one before is tried; if
        it raises, the search ends.
      among: the steps to try, newest first; those of all finished checkpoints if None.

    Raises:
      Unreadable: the folder cannot be listed.
    """
    results = map(readable, steps(workdir) if among is None else among)
    return next((result for result in results if result is not None), None)


def _listed(folder: epath.Path) -> list[str]:
    try:
        return _names(folder)
    except FileNotFoundError:
        return []
    except (OSError, MemoryError) as error:
        raise Unreadable(folder, words(error)) from error


def _names(folder: epath.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _is_file(path: epath.Path) -> bool:
    return os.path.isfile(path) if is_local(path) else False


def _is_link(workdir: epath.Path, step: int) -> bool:
    """Return whether a step is a link to a folder elsewhere, which is not this run's to delete."""
    return os.path.islink(workdir / FOLDER / str(step))


def read_meta(workdir: epath.Path, step: int) -> dict[str, Any]:
    """Return the meta data of a checkpoint, verified.

    Raises:
      Damaged: it is not what was written for this step.
      Unreadable: it cannot be read now.
      UserError: it is of a newer format.
    """
    folder = workdir / FOLDER / str(step)
    with reading(folder):
        return metadata.read(folder)


def read_shapes(workdir: epath.Path, step: int) -> dict[str, dict[str, Any]]:
    """Return shapes and dtypes of what a checkpoint holds: `{"parameters": {canonical name: ...}, ...}`.

    Raises:
      Damaged, Unreadable: as `read_meta`.
    """
    folder = workdir / FOLDER / str(step)
    if _has_checksums(folder):
        with reading(folder):
            return arrays.shapes(arrays.index(folder / "state", step))
    with reading(folder, DECODING), _quiet(), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / "state")
        tree = getattr(metadata, "item_metadata", metadata)
        return dict(getattr(tree, "tree", tree))


def read_state(workdir: epath.Path, step: int, abstract: Mapping[str, Any]) -> Any:
    """Return arrays of a checkpoint, as `abstract` asks (shardings included); other arrays are not read.

    Raises:
      Damaged, Unreadable: as `read_meta`.
    """
    folder, target = workdir / FOLDER / str(step), _without_empty(abstract)
    if _has_checksums(folder):
        with reading(folder):
            state = arrays.read(folder / "state", arrays.index(folder / "state", step), target)
    else:
        with reading(folder, DECODING):
            state = _read_unverified(folder / "state", target)
    return {part: state.get(part, {}) for part in abstract}


def _has_checksums(folder: epath.Path) -> bool:
    with reading(folder):
        return metadata.is_verified(metadata.read_sealed(folder))


def _read_unverified(folder: epath.Path, abstract: Mapping[str, Any]) -> Any:
    """Return the arrays of a checkpoint of format 1, by Orbax."""
    restore_args = jax.tree.map(_restore_args, abstract)
    # Each process reads for itself: one that fails must not leave the others at a barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        arguments = ocp.args.PyTreeRestore(
            item=abstract, restore_args=restore_args, partial_restore=True
        )
        return checkpointer.restore(folder, args=arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's warnings: of a folder that is one item of a checkpoint, as ours are; of a slow disk."""
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


def check_shapes(saved: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[str]:
    """Compare shapes and dtypes by name; the error lists parameter path, expected and found.

    Returns:
      What is stored in a narrower dtype than it is kept in today, and is widened as it is read: earlier versions kept
      averages, sums and second moments of bfloat16 parameters in bfloat16.
    """
    wrong, widened = [], list[str]()
    # Parameters first: what is wrong with them is wrong with what follows them.
    for part in sorted(expected, key=lambda part: (part != "parameters", part)):
        have = _flat(saved.get(part, {}))
        for name, leaf in _flat(expected[part]).items():
            stored = have.get(name)
            if stored is None:
                wrong.append(f"{part}/{name}: expected {_leaf_words(leaf)}, found nothing")
            elif part != "parameters" and _widens(stored, leaf):
                widened.append(f"{part}/{name}")
            elif tuple(stored.shape) != tuple(leaf.shape) or stored.dtype != leaf.dtype:
                wrong.append(
                    f"{part}/{name}: expected {_leaf_words(leaf)}, found {_leaf_words(stored)}"
                )
    if wrong:
        others = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        lines = "\n  ".join(wrong[:8])
        raise UserError(
            f"Checkpoint {where} does not fit this config:\n  {lines}{others}\nUse another --workdir."
        )
    return widened


def _widens(stored: Any, leaf: Any) -> bool:
    """Return whether an array is stored in a dtype all of whose values that of `leaf` holds too."""
    dtypes = [np.dtype(x.dtype) for x in (stored, leaf)]
    floats = all(jax.numpy.issubdtype(dtype, jax.numpy.floating) for dtype in dtypes)
    fits = floats and jax.numpy.promote_types(*dtypes) == dtypes[1]
    return fits and dtypes[0] != dtypes[1] and tuple(stored.shape) == tuple(leaf.shape)


def _flat(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in pairs}


def _leaf_words(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def restore_latest(
    workdir: epath.Path,
    abstract: Mapping[str, Any],
    accept: Accept,
    log: Callable[[str], None],
    may_be_new: Callable[[str, dict[str, Any]], bool],
) -> Restored | None:
    """Return the newest checkpoint that is whole, None where there never was one; damaged ones are set aside.

    Args:
      workdir: the run's folder.
      abstract: shapes, dtypes and shardings of the wanted state, in canonical form.
      accept: `accept(step, meta)` returns how the checkpoint's config differs from the run's. It may refuse the
        checkpoint by raising a `UserError`, before the arrays are read.
      log: prints a line for the user.
      may_be_new: `may_be_new(name, meta)`: whether a parameter may be absent; the result then lacks it.

    Raises:
      UserError: a checkpoint cannot be read though it may be whole, or there are damaged ones only. A run that
        has checkpoints does not begin at step 0 by itself.
    """
    causes: dict[int, str] = {}

    def whole(step: int) -> Restored | None:
        result = _try_together(workdir, step, abstract, accept, may_be_new)
        if isinstance(result, Restored):
            return result
        causes[step] = result
        if processes.is_first():
            aside = set_aside(workdir, step, TORN)
            log(
                f"Checkpoint {step} is damaged ({result}). Moved to {aside}; trying the one before it."
            )
        return None

    # Process 0 lists them, as it also moves what is damaged.
    agreed = processes.gather(_together(lambda: steps(workdir)))[0]
    restored = newest(workdir, whole, agreed)
    if restored is not None:
        _log_widened(restored, log)
        return restored
    refusal = processes.gather(_refusal(workdir, causes))[0]
    if refusal:
        raise UserError(refusal)
    return None


def _log_widened(restored: Restored, log: Callable[[str], None]) -> None:
    if restored.widened:
        log(
            f"Checkpoint {restored.step} holds {len(restored.widened)} arrays in a narrower dtype than they are kept "
            f"in today ({restored.widened[0]} and so on); they continue in the wider one."
        )


def check_may_begin(workdir: epath.Path) -> None:
    """Raise a `UserError` where a run may not begin at step 0: its folder holds checkpoints, if only damaged ones."""
    for step in steps(workdir):
        read_meta(workdir, step)
    refusal = _refusal(workdir, {})
    if refusal:
        raise UserError(refusal)


def _refusal(workdir: epath.Path, causes: Mapping[int, str]) -> str:
    """Return why a run without a whole checkpoint may not begin at step 0; empty if it may."""
    aside = sorted(_listed(workdir / TORN))
    if not aside:
        return ""
    known = "".join(f"\n  {step}: {cause}" for step, cause in causes.items())
    return (
        f"'{workdir}' holds no whole checkpoint, and a run does not throw away its steps by itself. Damaged ones "
        f"lie in '{workdir / TORN}': {', '.join(aside)}.{known}\nRestore a copy to '{workdir / FOLDER}', use another "
        f"--workdir, or delete '{workdir / TORN}' to begin at step 0."
    )


def _together(read: Callable[[], T]) -> T:
    """Return what `read` returns; where it fails in one process, all raise."""
    value, error = None, None
    try:
        value = read()
    except UserError as caught:
        error = caught
    failures = processes.gather(None if error is None else str(error))
    if error is not None:
        raise error
    for index, text in enumerate(failures):
        if text is not None:
            raise UserError(f"Process {index}: {text}")
    return cast(T, value)


def _try_together(workdir: epath.Path, step: int, *arguments: Any) -> Restored | str:
    """Return a checkpoint or what damage it has; what is damaged for one process, none takes."""
    result = _together(partial(_try, workdir, step, *arguments))
    damage = processes.gather(None if isinstance(result, Restored) else result)
    return next((cause for cause in damage if cause is not None), result)


def _try(workdir: epath.Path, step: int, *arguments: Any) -> Restored | str:
    """Return a checkpoint, or what damage it has."""
    try:
        return restore(workdir, step, *arguments)
    except Damaged as error:
        return error.cause


def restore(
    workdir: epath.Path,
    step: int,
    abstract: Mapping[str, Any],
    accept: Accept,
    may_be_new: Callable[[str, dict[str, Any]], bool],
) -> Restored:
    """Return the checkpoint of a step; for the arguments see `restore_latest`.

    Raises:
      Damaged, Unreadable: as `read_meta`.
      UserError: it does not go with this config.
    """
    meta = read_meta(workdir, step)
    differences = tuple(accept(step, meta))
    saved = read_shapes(workdir, step)
    target = _without_new(abstract, saved, meta, may_be_new)
    widened = check_shapes(saved, target, str(workdir / FOLDER / str(step)))
    state = read_state(workdir, step, target)
    unused = sorted(saved.get("parameters", {}).keys() - abstract.get("parameters", {}).keys())
    return Restored(step, state, meta, tuple(widened), differences, tuple(unused))


def _without_new(
    abstract: Mapping[str, Any], saved: Mapping[str, Any], meta: dict[str, Any], may_be_new: Any
) -> dict[str, Any]:
    return {
        part: {
            n: leaf
            for n, leaf in leaves.items()
            if n in saved.get(part, {}) or not may_be_new(n, meta)
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

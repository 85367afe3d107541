"""Load a trained run anywhere: on any device count, without the mesh that trained it.

import mmjax
model = mmjax.load("runs/quickstart")
vectors = model.embed(image=[picture, another])
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from mmjax.core import flags
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import STAT, Arrays, from_canonical, to_canonical
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.core.teachers import TEACHER
from mmjax.engine import checkpoint
from mmjax.engine.state import EMA, compute_dtype, evaluated, shardings
from mmjax.experiment import Experiment, make_experiment
from mmjax.generation.spans import Span
from mmjax.modalities.base import EXISTS, asset_name
from mmjax.model import Model
from mmjax.nn.experts import Experts
from mmjax.objectives.base import (
    Embeds,
    Objective,
    Writes,
    able,
    classified,
    composed,
    embedded,
    written,
)
from mmjax.task import Task

_LARGEST = 256  # rows of one call; more are cut into several


def find_step(workdir: epath.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """Return a checkpoint's step and meta data: the newest where `step` is None.

    One of format 1, which has no checksums, is reported by a warning.

    Raises:
      UserError: there is none, or it is damaged or cannot be read.
    """
    steps = checkpoint.steps(workdir)
    if not steps:
        raise UserError(
            f"No checkpoint in '{workdir}'. Train first: mmjax train --workdir={workdir} ..."
        )
    if step is not None and step not in steps:
        raise UserError(
            f"No checkpoint of step {step} in '{workdir}'. There are: {', '.join(map(str, steps))}."
        )
    chosen = steps[0] if step is None else step
    meta = checkpoint.read_meta(workdir, chosen)
    if not checkpoint.is_verified(meta):
        logging.getLogger(__name__).warning(checkpoint.UNVERIFIED.format(step=chosen))
    return chosen, meta


def read_parameters(
    workdir: epath.Path, step: int, experiment: Experiment, mesh: Mesh, with_teachers: bool = True
) -> Arrays:
    """Return the parameters and buffers for evaluation (the averages of both, where the run keeps some), on `mesh`."""
    specs = experiment.declaration.read
    arrays = evaluated(experiment.abstract_state(mesh))
    if not with_teachers:
        arrays = {n: x for n, x in arrays.items() if not n.startswith(TEACHER)}
    prefix = EMA if experiment.run.optimizer.ema else ""
    abstract = jax.eval_shape(lambda p: to_canonical(specs, p), arrays)
    target: dict[str, dict[str, Any]] = {"parameters": {}, "buffers": {}}
    for name, leaf in abstract.items():
        full = name if name.startswith(TEACHER) else prefix + name
        part = "buffers" if full.startswith((EMA, STAT, TEACHER)) else "parameters"
        target[part][full] = leaf
    where = str(workdir / checkpoint.FOLDER / str(step))
    checkpoint.check_shapes(checkpoint.read_shapes(workdir, step), target, where)
    read = checkpoint.read_state(workdir, step, target)
    flat = {
        name.removeprefix(prefix): np.asarray(value, target[part][name].dtype)
        for part in target
        for name, value in read[part].items()
    }
    return jax.device_put(from_canonical(specs, flat, arrays), shardings(arrays))


def check_files(workdir: epath.Path, meta: Mapping[str, Any], experiment: Experiment) -> None:
    """Compare the files that modalities name, such as tokenizers, with those that the run was trained with.

    Raises:
      UserError: a file with another SHA-256 than the one that the checkpoint's meta data hold.
    """
    identities = meta.get("identities", {})
    for name, modality in experiment.used.items():
        for file, path in modality.files().items():
            saved = identities.get(f"modalities.{name}/{file}")
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else saved
            if saved != digest and saved is not None:
                raise UserError(
                    f"modalities.{name}: '{path}' is not the file that the run in '{workdir}' was trained with: its "
                    f"SHA-256 is {digest[:12]}..., the checkpoint has {saved[:12]}... Its ids would mean other pieces. "
                    f"Put the run's own file at {workdir / 'assets' / asset_name(file)}; or, if this one is meant, "
                    "mmjax.load(path, allow_change=True)."
                )


class TrainedModel:
    """A trained run.

    Attributes:
      step: completed training steps.
      config: the run's config, as plain data.
      positions: how many examples each task has consumed.
      tasks: the run's tasks by name.
    """

    def __init__(self, workdir: epath.Path, step: int | None, allow_change: bool = False):
        self.step, meta = find_step(workdir, step)
        self.config: dict[str, Any] = meta["config"]
        self.positions: dict[str, int] = meta["clock"]["positions"]
        self._experiment = make_experiment(self.config, str(workdir / "assets"))
        if not allow_change:
            check_files(workdir, meta, self._experiment)
        mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        self._stacked = read_parameters(workdir, self.step, self._experiment, mesh, False)
        self.tasks: Mapping[str, Task] = {
            n: t.for_evaluation() for n, t in self._experiment.tasks.items()
        }
        self._calls: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def _competes(self) -> bool:
        """True if the output for a row depends on the other rows of its batch."""
        return any(isinstance(part, Experts) for _, part in nnx.iter_modules(self.module))

    @property
    def parameters(self) -> Arrays:
        """The parameters by canonical name, each layer's its own, on the default device.

        These are the names of checkpoints, `optimizer.rules`, `init_from` and `mmjax show DIR --names`: a
        file of them is a source for `init_from`. Assign such a dictionary, perhaps of another dtype, to change them.
        """
        return to_canonical(self._experiment.declaration.specs, self._of(STAT, False))

    @parameters.setter
    def parameters(self, values: Mapping[str, Any]) -> None:
        specs = self._experiment.declaration.specs
        shapes = {name: leaf.shape for name, leaf in self.parameters.items()}
        for name in sorted(shapes.keys() ^ values.keys()):
            which = "unknown" if name in values else "missing"
            raise UserError(f"parameters: '{name}' is {which}.{nearest(name, shapes)}")
        for name, value in values.items():
            if np.shape(value) != shapes[name]:
                raise UserError(
                    f"parameters: '{name}' has shape {list(np.shape(value))}, expected {list(shapes[name])}."
                )
        stacked = from_canonical(specs, {n: jnp.asarray(v) for n, v in values.items()})
        self._stacked = {**self._of(STAT, True), **stacked}

    @property
    def buffers(self) -> Arrays:
        """The buffers of modules by canonical name, `stat/NAME`; empty where none declares one."""
        return to_canonical(self._experiment.declaration.read, self._of(STAT, True))

    def _of(self, prefix: str, is_under: bool) -> Arrays:
        return {n: x for n, x in self._stacked.items() if n.startswith(prefix) is is_under}

    @property
    def module(self) -> Model:
        """The Flax NNX module with these parameters, to look at or to call: stems, trunk, heads."""
        merged: Model = self._experiment.declaration.merge(self._stacked)
        return merged

    def embed(self, *, task: str | None = None, **values: Sequence[Any]) -> np.ndarray:
        """Return unit vectors of a list of values of one modality.

        Where the model has experts, values that are embedded together compete for them, up to 256 at a time: their
        vectors depend on each other, as in training.

        Args:
          task: whose joint space; by default the first task that embeds the modality.
          **values: one modality by its name in the config, with a list of values as the user has them:
            `image=`: PIL images, encoded bytes, arrays uint8 or [0, 1] `[H, W]`, `[H, W, 3]`, `[H, W, 4]`;
            `text=`: strings; `video=`: arrays `[T, H, W, 3]` or lists of pictures; sounds: arrays, or
            `(samples, rate)` where the rate is not the modality's own.

        Returns:
          float32 `[N, E]`, rows of length 1, E the task's joint size; `[0, E]` for an empty list.

        Raises:
          UserError: no such task or modality, or a value that the modality cannot take.
        """
        chosen, modality, rows = self._inputs_of("embed", embedded, task, values)

        def of(model: Model, arguments: Any) -> jax.Array:
            return able(chosen.objective, Embeds).embed(model, modality, arguments["arrays"])

        return np.asarray(self._over(chosen, modality, rows, "embed", of), np.float32)

    def caption(
        self, *, task: str | None = None, seed: int = 0, **values: Sequence[Any]
    ) -> list[str]:
        """Return the captions that a task such as CoCa's generates for a list of values of one modality.

        Args:
          task: by default the first that writes of the modality.
          seed: of what is drawn, where the task's `sampling` draws.
          **values: see `embed`.

        Raises:
          UserError: no such task or modality, or a value that the modality cannot take.
        """
        chosen, modality, rows = self._inputs_of("caption", _captioned, task, values)
        text: Any = chosen.inputs[written(chosen.objective)[1]]
        if not hasattr(text.modality, "words"):
            raise UserError(
                f"Task '{chosen.name}' writes '{text.name}' of '{modality}', which are no words. Use compose: "
                f"model.compose([('{modality}', value), ('{text.name}', None)])."
            )

        def of(model: Model, arguments: Any) -> jax.Array:
            size = jax.tree.leaves(arguments["arrays"])[0].shape[0]
            key = jax.random.fold_in(jax.random.key(arguments["seed"]), arguments["chunk"])
            length = text.settings.length
            return able(chosen.objective, Writes).captions(
                model, arguments["arrays"], length, jax.random.split(key, size)
            )

        ids = self._over(chosen, modality, rows, "caption", of, seed=np.uint32(seed))
        return [text.modality.words(row) for row in ids]

    def compose(
        self,
        spans: Sequence[tuple[str, Any]],
        *,
        task: str | None = None,
        seed: int = 0,
        guidance: float | None = None,
    ) -> list[Any]:
        """Return the spans that a task such as Transfusion's generates: text and pictures in turn.

        Modalities that see each other whatever their order (`bidirectional_spans`) and are not in the list are pure
        noise: then `[("image", None)]` draws from the distribution of pictures, `[("image", None), ("sound", None)]`
        from both's.

        Args:
          spans: `(modality, value)`, values as in `embed`; a span with None is generated, given those before it.
          task: by default the first that knows all of these modalities.
          seed: of what is drawn.
          guidance: in place of the task's, see `mmjax.objectives.transfusion`; 1 for none.

        Returns:
          What was made, in order: strings, and arrays, uint8 `[H, W, 3]` of pictures.

        Raises:
          UserError: no such task or modality, a value that the modality cannot take, or a guidance that has no effect.
        """
        chosen = self._composing({name for name, _ in spans}, task)
        objective: Any = chosen.objective
        if guidance is not None:
            objective = replace(objective, guidance=float(guidance))
        absent = objective.beside([name for name, _ in spans])
        rows = [
            _blank(chosen, name) if value is None else self._row(chosen, name, index, value)
            for index, (name, value) in enumerate(spans)
        ] + [_blank(chosen, name) for name in absent]

        def of(model: Model, arguments: Any) -> list[jax.Array]:
            plan = [
                Span(name, arrays, generated=value is None)
                for (name, value), arrays in zip(spans, arguments["rows"], strict=False)
            ]
            beside = zip(absent, arguments["rows"][len(spans) :], strict=True)
            plan += [Span(name, arrays, absent=True) for name, arrays in beside]
            keys = jax.random.key(arguments["seed"])[None]
            result: list[jax.Array] = objective.compose(model, plan, keys)
            return result

        arguments = {"rows": jax.tree.map(lambda x: x[None], rows), "seed": np.uint32(seed)}
        shape = tuple((name, value is None) for name, value in spans)
        call = self._calls.setdefault(("compose", chosen.name, shape, guidance), self.compiled(of))
        result = iter(call(arguments))
        modalities = [chosen.inputs[name].modality for name, value in spans if value is None]
        return [
            of_text(row) if (of_text := getattr(m, "words", None)) else row
            for m, row in zip(modalities, (np.asarray(x)[0] for x in result), strict=True)
        ]

    def _composing(self, modalities: set[str], name: str | None) -> Task:
        if name is not None and name not in self.tasks:
            raise UserError(f"The run has no task '{name}'.{nearest(name, self.tasks)}")
        for task_name, task in self.tasks.items():
            if (
                modalities
                and modalities <= set(composed(task.objective))
                and name in (None, task_name)
            ):
                return task
        who, what = f"Task '{name}'" if name else "The run", ", ".join(sorted(modalities)) or "none"
        tasks = "; ".join(f"{n} {_outputs(t)}" for n, t in self.tasks.items() if name in (None, n))
        raise UserError(f"{who} composes no sequence of: {what}. What there is: {tasks}.")

    def _inputs_of(
        self,
        verb: str,
        able: Callable[[Objective], tuple[str, ...]],
        task: str | None,
        values: Mapping[str, Sequence[Any]],
    ) -> tuple[Task, str, list[dict[str, np.ndarray]]]:
        """Return the task that does it, the modality, and the arrays of each value."""
        if len(values) != 1:
            known = sorted({name for one in self.tasks.values() for name in one.inputs})
            raise UserError(
                f"{verb} takes one modality at a time; given: {', '.join(values) or 'none'}. "
                f"The run has: {', '.join(known)}."
            )
        [(modality, items)] = values.items()
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise UserError(f"{verb} takes a list: {modality}=[...].")
        chosen = self._task(verb, able, task, modality)
        rows = [self._row(chosen, modality, i, item) for i, item in enumerate(items)]
        return chosen, modality, rows

    def _task(
        self,
        verb: str,
        able: Callable[[Objective], tuple[str, ...]],
        name: str | None,
        modality: str,
    ) -> Task:
        if name is not None and name not in self.tasks:
            raise UserError(f"The run has no task '{name}'.{nearest(name, self.tasks)}")
        for task_name, task in self.tasks.items():
            if modality in able(task.objective) and name in (None, task_name):
                return task
        raise UserError(self._cannot(verb, able, name, modality))

    def _cannot(
        self,
        verb: str,
        able: Callable[[Objective], tuple[str, ...]],
        name: str | None,
        modality: str,
    ) -> str:
        """Return why no task can do it: what the named one does instead, and which others do."""
        does = {n: able(t.objective) for n, t in self.tasks.items() if able(t.objective)}
        others = [n for n, modalities in does.items() if modality in modalities]
        who = f"Task '{name}'" if name else "The run"
        why = f": it {_outputs(self.tasks[name])}" if name else ""
        words = f"{who} does not {verb} '{modality}'{why}."
        if others:
            return f"{words} Tasks that do: {', '.join(others)}."
        if does:
            return words + nearest(modality, {m for group in does.values() for m in group})
        tasks = "; ".join(f"{n} {_outputs(t)}" for n, t in self.tasks.items())
        return f"{words} No task of this run can {verb}: {tasks}."

    def _row(self, task: Task, modality: str, index: int, item: Any) -> dict[str, np.ndarray]:
        own_input = task.inputs[modality]
        try:
            return own_input.preprocess({own_input.field: own_input.modality.raw(item)}, None)
        except Exception as error:
            # A decoder may raise anything at bytes that are none of its own.
            raise UserError(f"{modality}[{index}]: {error}") from error

    def _over(
        self,
        task: Task,
        modality: str,
        rows: list[dict[str, np.ndarray]],
        verb: str,
        of: Callable[[Model, Any], jax.Array],
        **extra: Any,
    ) -> np.ndarray:
        """Return the results of `of` for the rows, in chunks; compiled once for each verb, task, modality and size.

        Blank rows fill a chunk up to a power of two, so that few programs serve lists of any length. Where rows
        compete for experts there are none, since an expert's slots grow with the rows: each size has a program.
        """
        call = self._calls.setdefault((verb, task.name, modality), self.compiled(of))
        blank = _blank(task, modality)
        outputs = []
        for chunk, start in enumerate(range(0, max(len(rows), 1), _LARGEST)):
            part = rows[start : start + _LARGEST]
            size = max(len(part), 1)
            size = size if self._competes else 1 << (size - 1).bit_length()
            padded = part + [blank] * (size - len(part))
            arrays = {name: np.stack([row[name] for row in padded]) for name in blank}
            arrays[EXISTS] = np.arange(size) < len(part)
            arguments = {"arrays": arrays, "chunk": np.uint32(chunk), **extra}
            outputs.append(np.asarray(call(arguments))[: len(part)])
        return np.concatenate(outputs)

    def compiled(self, function: Callable[[Model, Any], Any]) -> Callable[[Any], Any]:
        """Return `arrays -> function(model, arrays)` with the run's parameters, compiled for each shape it meets."""
        dtype = compute_dtype(self._experiment.run.dtype.compute)
        merge = self._experiment.declaration.merge
        function_jit = jax.jit(
            lambda parameters, arrays: function(merge(parameters, dtype), arrays)
        )
        return lambda arrays: function_jit(self._stacked, arrays)


def _outputs(task: Task) -> str:
    """Return what can be asked of a task, in words: `embeds image, text`."""
    objective = task.objective
    does = {"embeds": embedded(objective), "classifies": classified(objective), "captions": written(objective)[:1],
            "composes": composed(objective)}  # fmt: skip
    words = [f"{verb} {', '.join(names)}" for verb, names in does.items() if names]
    return (
        " and ".join(words)
        or f"has the objective {task.config.objective['name']}, which has no such output"
    )


def _blank(task: Task, modality: str) -> dict[str, np.ndarray]:
    """Return arrays of zeros of the shapes that the task gives a modality."""
    return {n: np.zeros(s.shape, s.dtype) for n, s in task.inputs[modality].arrays().items()}


def _captioned(objective: Objective) -> tuple[str, ...]:
    """Return the modalities that the objective describes in text."""
    return written(objective)[:1]


def load(path: str, step: int | None = None, *, allow_change: bool = False) -> TrainedModel:
    """Load the run in `path`: its newest checkpoint, or that of `step`.

    Nothing from the checkpoint is executed: its config is data, and names only modules of mmjax.

    Args:
      path: the run's folder.
      step: of a checkpoint; the newest if None.
      allow_change: accept a tokenizer other than the one that the run was trained with.

    Raises:
      UserError: no such checkpoint, or another tokenizer than the run's.
    """
    return TrainedModel(flags.folder(path), step, allow_change)

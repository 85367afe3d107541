"""Load a trained run anywhere: on any device count, without the mesh that trained it.

import mmjax
model = mmjax.load("runs/quickstart")
vectors = model.embed(image=[picture, another])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mmjax import checkpoint, commandline
from mmjax.errors import UserError, nearest
from mmjax.experiment import Experiment, make_experiment
from mmjax.model import Model
from mmjax.objective import Objective, Span
from mmjax.parameters import Arrays, from_canonical, to_canonical
from mmjax.sharding import MeshConfig, make_mesh
from mmjax.state import EMA, compute_dtype, shardings
from mmjax.task import Task

_LARGEST = 256  # rows of one call; more are cut into several


def find_step(workdir: epath.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """A checkpoint's step and meta data: the newest where `step` is None."""
    found = checkpoint.steps(workdir)
    if not found:
        raise UserError(
            f"No checkpoint in '{workdir}'. Train first: python -m mmjax.train --workdir={workdir} ..."
        )
    if step is not None and step not in found:
        raise UserError(
            f"No checkpoint of step {step} in '{workdir}'. There are: {', '.join(map(str, found))}."
        )
    chosen = found[0] if step is None else step
    try:
        return chosen, checkpoint.read_meta(workdir, chosen)
    except ValueError as error:
        raise UserError(
            f"Checkpoint {chosen} in '{workdir}' is torn: {error}. Choose another step."
        ) from error


def read_parameters(workdir: epath.Path, step: int, experiment: Experiment, mesh: Mesh) -> Arrays:
    """The parameters for evaluation (their average, where the run keeps one), on `mesh`."""
    specs = experiment.declaration.specs
    parameters = experiment.abstract_state(mesh).parameters
    averaged = bool(experiment.run.optimizer.ema)
    part, prefix = ("buffers", EMA) if averaged else ("parameters", "")
    abstract = jax.eval_shape(lambda p: to_canonical(specs, p), parameters)
    wanted = {part: {prefix + name: leaf for name, leaf in abstract.items()}}
    where = str(workdir / checkpoint.FOLDER / str(step))
    checkpoint.check_shapes(checkpoint.read_shapes(workdir, step), wanted, where)
    read = checkpoint.read_state(workdir, step, wanted)[part]
    flat = {name.removeprefix(prefix): np.asarray(value) for name, value in read.items()}
    return jax.device_put(from_canonical(specs, flat), shardings(parameters))


class Embedder:
    """A trained run.

    Attributes:
      step: completed training steps.
      config: the run's config, as plain data.
      positions: how many examples each task has consumed.
      parameters: by name, on the default device.
      tasks: the run's tasks by name.
    """

    def __init__(self, workdir: epath.Path, step: int | None):
        self.step, meta = find_step(workdir, step)
        self.config: dict[str, Any] = meta["config"]
        self.positions: dict[str, int] = meta["clock"]["positions"]
        self._experiment = make_experiment(self.config, str(workdir / "assets"))
        mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        self.parameters = read_parameters(workdir, self.step, self._experiment, mesh)
        self.tasks: Mapping[str, Task] = {n: t.whole() for n, t in self._experiment.tasks.items()}
        self._calls: dict[tuple[Any, ...], Any] = {}

    @property
    def module(self) -> Model:
        """The Flax NNX module with these parameters, to look at or to call: stems, trunk, heads."""
        merged: Model = self._experiment.declaration.merge(self.parameters)
        return merged

    def embed(self, *, task: str | None = None, **values: Sequence[Any]) -> np.ndarray:
        """Unit vectors of a list of values of one modality.

        Args:
          task: whose joint space; by default the first task that embeds the modality.
          **values: one modality by its name in the config, with a list of what a person has:
            `image=`: PIL images, encoded bytes, arrays uint8 or [0, 1] `[H, W]`, `[H, W, 3]`, `[H, W, 4]`;
            `text=`: strings; `video=`: arrays `[T, H, W, 3]` or lists of pictures; sounds: arrays, or
            `(samples, rate)` where the rate is not the modality's own.

        Returns:
          float32 `[N, E]`, rows of length 1, E the task's joint size; `[0, E]` for an empty list.

        Raises:
          UserError: no such task or modality, or a value that the modality cannot take.
        """
        chosen, modality, rows = self._given("embed", _embedded, task, values)

        def of(model: Model, given: Any) -> jax.Array:
            return chosen.objective.embed(model, modality, given["arrays"])

        return np.asarray(self._over(chosen, modality, rows, "embed", of), np.float32)

    def caption(
        self, *, task: str | None = None, seed: int = 0, **values: Sequence[Any]
    ) -> list[str]:
        """Texts that a task such as CoCa's writes of a list of values of one modality.

        Args:
          task: by default the first that writes of the modality.
          seed: of what is drawn, where the task's `sampling` draws.
          **values: as of `embed`.

        Raises:
          UserError: no such task or modality, or a value that the modality cannot take.
        """
        chosen, modality, rows = self._given("caption", _told, task, values)
        text: Any = chosen.inputs[chosen.objective.writes()[1]]
        if not hasattr(text.modality, "words"):
            raise UserError(
                f"Task '{chosen.name}' writes '{text.name}' of '{modality}', which are no words. Use compose: "
                f"model.compose([('{modality}', value), ('{text.name}', None)])."
            )

        def of(model: Model, given: Any) -> jax.Array:
            size = jax.tree.leaves(given["arrays"])[0].shape[0]
            key = jax.random.fold_in(jax.random.key(given["seed"]), given["chunk"])
            length = text.settings.length
            return chosen.objective.captions(
                model, given["arrays"], length, jax.random.split(key, size)
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
        """What a task such as Transfusion's makes of a sequence of spans: text and pictures in turn.

        Modalities that see each other whatever their order (`mutual`) and are not in the list are pure noise: then
        `[("image", None)]` draws from the distribution of pictures, `[("image", None), ("sound", None)]` from both's.

        Args:
          spans: `(modality, value)`, a value as of `embed`; where it is None the span is made, after those before it.
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

        def of(model: Model, given: Any) -> list[jax.Array]:
            plan = [
                Span(name, arrays, made=value is None)
                for (name, value), arrays in zip(spans, given["rows"], strict=False)
            ]
            beside = zip(absent, given["rows"][len(spans) :], strict=True)
            plan += [Span(name, arrays, absent=True) for name, arrays in beside]
            keys = jax.random.key(given["seed"])[None]
            made: list[jax.Array] = objective.compose(model, plan, keys)
            return made

        given = {"rows": jax.tree.map(lambda x: x[None], rows), "seed": np.uint32(seed)}
        shape = tuple((name, value is None) for name, value in spans)
        call = self._calls.setdefault(("compose", chosen.name, shape, guidance), self.compiled(of))
        made = iter(call(given))
        modalities = [chosen.inputs[name].modality for name, value in spans if value is None]
        return [
            of_text(row) if (of_text := getattr(m, "words", None)) else row
            for m, row in zip(modalities, (np.asarray(x)[0] for x in made), strict=True)
        ]

    def _composing(self, modalities: set[str], name: str | None) -> Task:
        if name is not None and name not in self.tasks:
            raise UserError(f"The run has no task '{name}'.{nearest(name, self.tasks)}")
        for each, task in self.tasks.items():
            if modalities and modalities <= set(task.objective.composes()) and name in (None, each):
                return task
        who, what = f"Task '{name}'" if name else "The run", ", ".join(sorted(modalities)) or "none"
        raise UserError(f"{who} composes no sequence of: {what}.")

    def _given(
        self,
        verb: str,
        able: Callable[[Objective], tuple[str, ...]],
        task: str | None,
        values: Mapping[str, Sequence[Any]],
    ) -> tuple[Task, str, list[dict[str, np.ndarray]]]:
        """The task that does it, the modality, and the arrays of each value."""
        if len(values) != 1:
            raise UserError(
                f"{verb} takes one modality at a time; given: {', '.join(values) or 'none'}."
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
        for each, task in self.tasks.items():
            if modality in able(task.objective) and name in (None, each):
                return task
        known = {m for t in self.tasks.values() for m in able(t.objective)}
        raise UserError(
            f"{f'Task {name!r}' if name else 'The run'} does not {verb} '{modality}'.{nearest(modality, known)}"
        )

    def _row(self, task: Task, modality: str, index: int, item: Any) -> dict[str, np.ndarray]:
        given = task.inputs[modality]
        try:
            return given.preprocess({given.field: given.modality.raw(item)}, None)
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
        **more: Any,
    ) -> np.ndarray:
        """What `of` makes of the rows, in chunks; compiled once for each verb, task, modality and size."""
        call = self._calls.setdefault((verb, task.name, modality), self.compiled(of))
        blank = _blank(task, modality)
        made = []
        for chunk, start in enumerate(range(0, max(len(rows), 1), _LARGEST)):
            part = rows[start : start + _LARGEST]
            # Sizes are powers of two, so that few programs serve lists of any length.
            size = 1 << (max(len(part), 1) - 1).bit_length()
            padded = part + [blank] * (size - len(part))
            arrays = {name: np.stack([row[name] for row in padded]) for name in blank}
            given = {"arrays": arrays, "chunk": np.uint32(chunk), **more}
            made.append(np.asarray(call(given))[: len(part)])
        return np.concatenate(made)

    def compiled(self, function: Callable[[Model, Any], Any]) -> Callable[[Any], Any]:
        """`arrays -> function(model, arrays)` with the run's parameters, compiled for each shape it meets."""
        dtype = compute_dtype(self._experiment.run.dtype.compute)
        merge = self._experiment.declaration.merge
        made = jax.jit(lambda parameters, arrays: function(merge(parameters, dtype), arrays))
        return lambda arrays: made(self.parameters, arrays)


def _blank(task: Task, modality: str) -> dict[str, np.ndarray]:
    """Arrays of the shapes that the task gives a modality, zeros."""
    return {n: np.zeros(s.shape, s.dtype) for n, s in task.inputs[modality].arrays().items()}


def _embedded(objective: Objective) -> tuple[str, ...]:
    """What it embeds."""
    return objective.embeds()


def _told(objective: Objective) -> tuple[str, ...]:
    """What it writes texts of."""
    return objective.writes()[:1]


def load(path: str, step: int | None = None) -> Embedder:
    """Load the run in `path`: its newest checkpoint, or that of `step`.

    Nothing from the checkpoint is executed: its config is data, and names only modules of mmjax.
    """
    return Embedder(commandline.folder(path), step)

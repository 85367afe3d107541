"""Several objectives on one batch: a weighted sum of losses whose common passes are computed once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.bounds import POSITIVE, FieldError, check
from mmjax.core.errors import UserError
from mmjax.generation.spans import Span
from mmjax.modalities.base import Input
from mmjax.model import Model
from mmjax.nn.masks import FULL, Mask
from mmjax.nn.stream import Aux, Stream, add_proposals, add_up, fold, no_aux
from mmjax.nn.towers import Widths
from mmjax.objectives.base import (
    Classifies,
    Composes,
    Coupled,
    Embeds,
    Loss,
    Objective,
    Part,
    Repair,
    Represented,
    Shows,
    Summed,
    Writes,
    classified,
    composed,
    embedded,
    of_member,
    written,
)
from mmjax.sources.base import Example

C = TypeVar("C")
_ANY_BATCH = 2**30  # larger than any window of rows


@dataclass(frozen=True)
class Member:
    """One of the objectives of a sum.

    Attributes:
      objective: the objective; without a `head` of its own it has `HEAD_NAME`, the head of the sum and its own name.
      weight: factor of its loss.
    """

    objective: Objective
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(self, weight=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Sum(Coupled, Embeds, Classifies, Writes, Composes, Shows):
    """`L = sum_m weight_m L_m` over its members, each of its own rows or tokens, on one batch.

    Each L_m keeps its value, whatever the number of micro-batches: a mean over tokens stays the mean over all tokens of
    the batch, and a loss that compares rows compares all of them. Members read the same tokens, and a pass of the same
    tower over the same streams under the same mask is computed once. A member draws by a key that its name is folded
    into, so another member changes none of its draws; a pass that several members read draws by a key of the pass.
    The auxiliary losses of the towers count once, with the weight 1.

    A member's metrics are `METRIC MEMBER`, its loss is the metric `MEMBER`. What a sum embeds, predicts, writes and
    composes is what the first member does that can.

    Attributes:
      members: the objectives, by names of your choice.
    """

    members: dict[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members:
            raise FieldError(self, "members", "is empty; a sum needs an objective.")
        configs.check_names(self.members, "members")
        ordered = [n for n, m in self.members.items() if m.objective.window_rows(_ANY_BATCH) > 1]
        if len(ordered) > 1:
            raise FieldError(
                self, "members", f"{' and '.join(ordered)} order the rows of a batch; one can."
            )

    @cached_property
    def objectives(self) -> Mapping[str, Objective]:
        """The members' objectives, each with a head."""
        return {
            name: m.objective
            if m.objective.head
            else replace(m.objective, head=f"{self.head}_{name}")
            for name, m in self.members.items()
        }

    # --- what it reads and owns ----------------------------------------------------------------

    def reads(self) -> tuple[str, ...]:
        return _union(o.reads() for o in self.objectives.values())

    def fields(self) -> tuple[str, ...]:
        return _union(o.fields() for o in self.objectives.values())

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        """Return nothing: the heads are the members', see `named_heads`."""
        return {}

    def named_heads(
        self, widths: Widths, inputs: Mapping[str, Input]
    ) -> list[tuple[str, dict[str, Any]]]:
        return [h for o in self.objectives.values() for h in o.named_heads(widths, inputs)]

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        for objective in self.objectives.values():
            objective.check_inputs({m: i for m, i in inputs.items() if m in objective.reads()})

    def check_example(self, example: Example) -> None:
        for objective in self.objectives.values():
            objective.check_example(example)

    def for_evaluation(self) -> Objective:
        members = {
            name: replace(m, objective=self.objectives[name].for_evaluation())
            for name, m in self.members.items()
        }
        return replace(self, members=members)

    def teachers(self) -> tuple[str, ...]:
        return _union(o.teachers() for o in self.objectives.values())

    def rows_together(self) -> int:
        return math.lcm(*(o.rows_together() for o in self.objectives.values()))

    def window_rows(self, batch: int) -> int:
        return max(o.window_rows(batch) for o in self.objectives.values())

    def arranged(self, rows: Sequence[Batch]) -> Sequence[int]:
        ordering = (o for o in self.objectives.values() if o.window_rows(len(rows)) > 1)
        return next(ordering, self.first).arranged(rows)

    @property
    def first(self) -> Objective:
        """The first member's objective."""
        return next(iter(self.objectives.values()))

    # --- the loss ------------------------------------------------------------------------------

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        passes: Any = SharedPasses(model, key)
        rows, auxes = {}, []
        for name, objective in self.objectives.items():
            part, member_key = of_member(batch, key, name)
            if isinstance(objective, Coupled):
                represented = objective.represent(passes, part, member_key)
                rows[name] = represented.rows
                if isinstance(objective, Summed):
                    rows[name] = _in_first_row(represented.rows, batch.valid)
                weighted = self.members[name].weight * represented.aux.loss
                auxes.append(replace(represented.aux, loss=weighted))
            else:
                loss = objective(passes, part, member_key)
                rows[name] = _in_rows(loss, batch.valid)
                auxes.append(replace(no_aux(), proposals=loss.proposals))
        return Represented(rows, add_up([*auxes, *passes.auxes]))

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        losses = {}
        for name, objective in self.objectives.items():
            if isinstance(objective, Coupled):
                part = rows[name]
                if isinstance(objective, Summed):
                    part = jax.tree.map(lambda x: x.sum(axis=0), part)
                losses[name] = objective.compare(model, part, batch)
            else:
                losses[name] = _of_rows(rows[name])
        return self._added(losses, batch.valid)

    def _added(self, losses: Mapping[str, Loss], valid_B: jax.Array) -> Loss:
        """Return the weighted sum of the members' losses, each of its means a part of it."""
        weighted = [(self.members[name].weight, loss) for name, loss in losses.items()]
        metrics, parts = dict[str, jax.Array](), dict[str, Part]()
        for name, loss in losses.items():
            metrics |= {f"{metric} {name}": value for metric, value in loss.metrics.items()}
            metrics[name] = loss.value - loss.auxiliary
            for of, part in loss.means(valid_B).items():
                weight = self.members[name].weight * part.weight
                parts[f"{of} {name}".strip()] = replace(part, weight=weight)
        if all("baseline" in loss.metrics for loss in losses.values()):
            metrics["baseline"] = _total((w, loss.metrics["baseline"]) for w, loss in weighted)
        value = _total((w, loss.value) for w, loss in weighted)
        proposals = add_proposals([loss.proposals for loss in losses.values()])
        auxiliary = _total((w, jnp.asarray(loss.auxiliary)) for w, loss in weighted)
        return Loss(value, metrics, proposals, parts=parts, auxiliary=auxiliary)

    def repairs(self) -> list[Repair]:
        return [
            Repair(repair.objective, name, self.members[name].weight * repair.weight)
            for name, objective in self.objectives.items()
            if isinstance(objective, Coupled)
            for repair in objective.repairs()
        ]

    # --- what the members offer ----------------------------------------------------------------

    def _able(
        self,
        capability: type[C],
        offers: Callable[[Objective], tuple[str, ...]],
        modality: str = "",
    ) -> C:
        """Return the first member that offers something; with a modality, one that offers it for this."""
        for objective in self.objectives.values():
            of = offers(objective)
            if isinstance(objective, capability) and (modality in of if modality else of):
                return objective
        what = f"{capability.__name__.lower()} {modality}".strip()
        raise UserError(f"no member of the sum {what}.")

    def embeds(self) -> tuple[str, ...]:
        return _union(embedded(o) for o in self.objectives.values())

    def embed(
        self, model: Model, modality: str, arrays: Mapping[str, jax.Array], relative_to: str = ""
    ) -> jax.Array:
        return self._able(Embeds, embedded, modality).embed(model, modality, arrays, relative_to)

    def predicts(self) -> tuple[str, ...]:
        return next(filter(None, (classified(o) for o in self.objectives.values())), ())

    def predict(self, model: Model, inputs: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        return self._able(Classifies, classified).predict(model, inputs)

    def writes(self) -> tuple[str, ...]:
        return next(filter(None, (written(o) for o in self.objectives.values())), ())

    def write(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        return self._able(Writes, written).write(model, batch, key)

    def captions(
        self, model: Model, arrays: Mapping[str, jax.Array], length: int, keys_B: jax.Array
    ) -> jax.Array:
        return self._able(Writes, written).captions(model, arrays, length, keys_B)

    def composes(self) -> tuple[str, ...]:
        return next(filter(None, (composed(o) for o in self.objectives.values())), ())

    def compose(self, model: Model, spans: Sequence[Span], keys_B: jax.Array) -> list[jax.Array]:
        return self._able(Composes, composed).compose(model, spans, keys_B)

    def beside(self, modalities: Sequence[str]) -> tuple[str, ...]:
        return self._able(Composes, composed).beside(modalities)

    def _shown(self) -> dict[str, tuple[str, ...]]:
        """Return what each member shows."""
        return {n: o.shows() for n, o in self.objectives.items() if isinstance(o, Shows)}

    def shows(self) -> tuple[str, ...]:
        return tuple(f"{what} ({name})" for name, all_ in self._shown().items() for what in all_)

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        result: dict[str, jax.Array] = {}
        for name, objective in self.objectives.items():
            if isinstance(objective, Shows) and objective.shows():
                shown = objective.show(model, batch, key)
                result |= {f"{what} ({name})": value for what, value in shown.items()}
        return result


class SharedPasses:
    """A model whose stems and towers run once for equal inputs, as the members of a sum see it.

    Inputs are equal if they are the same arrays: each member is given the same batch. The auxiliary outputs of the
    passes are kept in `auxes`, and the members see none.
    """

    def __init__(self, model: Model, key: jax.Array | None):
        self._model, self._key = model, key
        self._streams: dict[tuple[str, int], tuple[Any, Stream]] = {}
        self._passes: dict[tuple[Any, ...], tuple[Any, Stream]] = {}
        self.auxes: list[Aux] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokens(
        self, modality: str, arrays: Mapping[str, jax.Array], values: jax.Array | None = None
    ) -> Stream:
        """Return the stem's stream, see `Model.tokens`."""
        if values is not None:
            return self._model.tokens(modality, arrays, values)
        place = (modality, id(arrays))
        if place not in self._streams:
            self._streams[place] = (arrays, self._model.tokens(modality, arrays))
        return self._streams[place][1]

    def encode(
        self,
        streams: Iterable[Stream],
        key: jax.Array | None,
        mask: Mask = FULL,
        tower: str | None = None,
    ) -> tuple[Stream, Aux]:
        """Run a tower, see `Model.encode`; a pass over whole streams of `tokens` draws by a key of its own."""
        return _MODEL.encode(self, streams, key, mask, tower)

    def _run(
        self, name: str, streams: list[Stream], key: jax.Array | None, mask: Mask
    ) -> tuple[Stream, Aux]:
        """Return the output of a tower, which the towers below it and its context come to as well."""
        known = {id(stream) for _, stream in self._streams.values()}
        if not all(id(stream) in known for stream in streams):
            return self._counted(name, streams, key, mask)
        place = (name, *(id(stream) for stream in streams), mask)
        if place not in self._passes:
            named = f"{name} {[s.layout for s in streams]} {mask}".encode()
            drawn = None if key is None else fold(self._key, zlib.crc32(named))
            self._passes[place] = (streams, self._counted(name, streams, drawn, mask)[0])
        return self._passes[place][1], no_aux()

    def _context(self, *arguments: Any) -> Any:
        return _MODEL._context(self, *arguments)

    def _counted(
        self, name: str, streams: list[Stream], key: jax.Array | None, mask: Mask
    ) -> tuple[Stream, Aux]:
        stream, aux = _MODEL._run(self, name, streams, key, mask)
        self.auxes.append(aux)
        return stream, no_aux()


_MODEL: Any = Model  # its functions, which run on `SharedPasses` too


def _in_rows(loss: Loss, valid_B: jax.Array) -> dict[str, Any]:
    """Return a mean as sums over its terms, in the form of rows."""
    if loss.parts:
        raise UserError("a loss of several means is Coupled")
    count = loss.terms(valid_B)
    sums = {
        "value": loss.value,
        "auxiliary": loss.auxiliary,
        **{f"of {n}": m for n, m in loss.metrics.items()},
    }
    sums = {"count": count, **{n: count * x for n, x in sums.items()}}
    result: dict[str, Any] = _in_first_row(sums, valid_B)
    return result


def _in_first_row(sums: Any, valid_B: jax.Array) -> Any:
    """Return sums of a batch as rows, all zero but the first, so that they add up over batches as rows do."""
    is_first = jnp.arange(valid_B.shape[0]) == 0

    def spread(x: jax.Array) -> jax.Array:
        return jnp.where(is_first.reshape(-1, *(1 for _ in range(jnp.ndim(x)))), x, 0)

    return jax.tree.map(spread, sums)


def _of_rows(rows: Mapping[str, jax.Array]) -> Loss:
    """Return the mean from the sums of `_in_rows`."""
    count = rows["count"].sum()
    whole = jnp.where(count > 0, count, 1)
    means = {n: x.sum(axis=0) / whole.astype(x.dtype) for n, x in rows.items() if n != "count"}
    value, auxiliary = means.pop("value"), means.pop("auxiliary")
    metrics = {n.removeprefix("of "): m for n, m in means.items()}
    return Loss(value, metrics, count=count, auxiliary=auxiliary)


def _total(weighted: Iterable[tuple[float, jax.Array]]) -> jax.Array:
    return sum((weight * value for weight, value in weighted), jnp.zeros((), jnp.float32))


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))

"""Sequences made span by span, text and pictures in turn: what was read is cached, and each new span reads it.

A discrete span is written token by token; a continuous one is drawn as a whole, each step of its diffusion reading what
is cached (continuous time; the deterministic DDIM sampler unless `sampler` is `ddpm`, see `generation.diffusion`). What
a span holds once it is made is read into the sequence, as a given one is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from mmjax.core.errors import UserError
from mmjax.generation.decoding import Sampling, generate
from mmjax.generation.diffusion import Diffusion
from mmjax.generation.spans import NoisySpan, Span
from mmjax.model import Model
from mmjax.nn.by_modality import apply_per_modality, modality_of
from mmjax.nn.masks import FULL, Causal, Mask
from mmjax.nn.stream import Stream, concatenate

Values = dict[str, jax.Array]

GUIDANCE = 3.0  # where an objective gives none
# What noise is for: folded into a key before the step, apart from the places of spans in a plan.
_ABSENT, _SAMPLER = 2**30, 2**30 + 1


class Spans(Protocol):
    """The interface through which an objective of interleaved sequences describes their spans."""

    @property
    def discrete(self) -> tuple[str, ...]: ...
    @property
    def continuous(self) -> tuple[str, ...]: ...
    @property
    def prediction(self) -> str: ...
    @property
    def bidirectional_spans(self) -> bool: ...
    @property
    def compact(self) -> bool: ...
    @property
    def sampling_steps(self) -> int: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def sampler(self) -> str: ...
    @property
    def sampling(self) -> Sampling: ...

    def written(self, model: Model, name: str, arrays: Any, keep_B: jax.Array) -> Stream: ...
    def noisy(
        self, model: Model, name: str, arrays: Any, x_t: jax.Array, t_B: jax.Array
    ) -> NoisySpan: ...
    def predicted(self, model: Model, name: str, x_BSD: jax.Array, context: Any) -> jax.Array: ...
    def logits(self, model: Model, name: str, x_BSD: jax.Array) -> jax.Array: ...


@struct.dataclass
class Cache:
    """A sequence so far.

    Attributes:
      layers: what the trunk's layers hold, see `Trunk.init_cache`.
      at: how many slots are used, a scalar.
      filled_BT: which slots hold a token.
      count_B: how many do, of each row.
    """

    layers: Any
    at: jax.Array
    filled_BT: jax.Array
    count_B: jax.Array


class Composer:
    """Reads and makes spans of sequences, one in each row.

    Args:
      spans: the objective.
      model: its model.
      plan: all spans that a sequence will have. What the arrays of a span hold that is made or absent is not read.

    Raises:
      UserError: a plan without one of the spans that see each other.
    """

    def __init__(self, spans: Spans, model: Model, plan: Sequence[Span]):
        self._of, self._model = spans, model
        self._plan = [_all_there(span) if span.generated or span.absent else span for span in plan]
        self._stems: Any = model.stems
        self._tower = model.towers.joint(span.name for span in plan)
        self._rows = jax.tree.leaves(dict(plan[0].arrays))[0].shape[0]

    def compose(self, keys_B: jax.Array) -> list[jax.Array]:
        """Return the generated spans in the plan's order: ids `[B, L]` of a discrete span, values `[B, S, P]` of a
        continuous one.

        Drawing is guided (Ho and Salimans 2022) away from what is drawn without the discrete span that comes first, and
        with the other spans of its block as pure noise (UniDiffuser, Bao et al. 2023).

        Raises:
          UserError: a guidance for a span that nothing guides.
        """
        cache, unconditional, results = self.init_cache(), self.init_cache(), dict[int, jax.Array]()
        for index, indices in enumerate(self._blocks()):
            keys = jax.vmap(lambda key, index=index: jax.random.fold_in(key, index))(keys_B)
            block = [self._plan[place] for place in indices]
            targets = [span for span in block if span.generated]
            values: Values = {}
            if targets and block[0].name in self._of.discrete:
                values = {block[0].name: self.write(cache, block[0], keys)}
                block = [replace(block[0], arrays=self._as_arrays(block[0], values[block[0].name]))]
            elif targets:
                values = self.draw(cache, unconditional, block, keys)
            results |= {
                place: values[self._plan[place].name]
                for place in indices
                if self._plan[place].generated
            }
            block = [span for span in block if not span.absent]
            cache = self.read(cache, block, values)
            unconditional = self.read(unconditional, block, values, keep=index > 0)
        return [results[place] for place in sorted(results)]

    def _blocks(self) -> list[list[int]]:
        """Return the places in the plan of spans that are read together: one, or all continuous ones if mutual."""
        is_continuous = [span.name not in self._of.discrete for span in self._plan]
        if not self._of.bidirectional_spans or not any(is_continuous):
            return [[place] for place in range(len(self._plan))]
        together = [place for place, is_one in enumerate(is_continuous) if is_one]
        names = [self._plan[place].name for place in together]
        if len(set(names)) < len(names):
            raise UserError(f"Spans that see each other need different modalities; given: {names}.")
        missing = [name for name in self._of.continuous if name not in names]
        if missing:
            raise UserError(
                f"A sequence needs all spans that see each other; missing: {missing}. Add them as absent spans."
            )
        others = [[place] for place, is_one in enumerate(is_continuous) if not is_one]
        return sorted([together, *others])

    def init_cache(self) -> Cache:
        """Return a sequence that holds nothing yet."""
        spans = [self._span(span, None, True) for span in self._plan]
        slots = sum(span.x_BSD.shape[1] for span in spans)
        like = Stream(spans[0].x_BSD[:, :1], layout=((spans[0].layout[0][0], 1),))
        return Cache(
            self._model.tower(self._tower).init_cache(like, slots),
            jnp.int32(0),
            jnp.zeros((self._rows, slots), bool),
            jnp.zeros(self._rows, jnp.int32),
        )

    def read(
        self, cache: Cache, block: Sequence[Span], values: Values | None = None, keep: bool = True
    ) -> Cache:
        """Return the sequence with the spans of a block: their arrays, or other `values` of continuous ones, by name.

        Where it is not `keep`, a discrete span is only the token of its beginning.
        """
        streams = [self._span(span, (values or {}).get(span.name), keep) for span in block]
        return self._decode(cache, concatenate(streams), self._mask(block[0].name))[1]

    def logits(self, cache: Cache, span: Span) -> jax.Array:
        """Return logits `[B, L, V]` of each token of a given discrete span, each after those before."""
        x_BSD, _ = self._decode(cache, self._span(span, None, True), Causal())
        return self._of.logits(self._model, span.name, x_BSD[:, :-1])

    def write(self, cache: Cache, span: Span, keys_B: jax.Array) -> jax.Array:
        """Return tokens int32 `[B, L]` of a discrete span, see `generate`."""
        name, everything = span.name, jnp.ones(self._rows, bool)

        def step(ids_BS: jax.Array, at: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            ids_BL = ids_BS[:, 1:]
            arrays = {"ids": ids_BL, "valid": jnp.ones_like(ids_BL, bool)}
            whole = self._of.written(self._model, name, arrays, everything)
            token = whole.take(jnp.full((self._rows, 1), at))
            x_BSD, cache = self._decode(cache, token, Causal())
            return self._of.logits(self._model, name, x_BSD)[:, -1], cache

        length = span.arrays["ids"].shape[1]
        return generate(step, cache, keys_B, length, self._of.sampling, self._stems[name].token_ids)

    def draw(
        self, cache: Cache, unconditional: Cache, block: Sequence[Span], keys_B: jax.Array
    ) -> Values:
        """Return values `[B, S, P]` of a block's continuous spans, drawn together from noise.

        Those that are given stand still at time 0; those that are absent are fresh noise at time 1 in each step.

        Args:
          cache, unconditional: the sequence, and the one to be guided away from.
        """
        dtype = _wide(cache)
        clean = {span.name: self._stems[span.name].values(span.arrays, dtype) for span in block}
        drawn = [span.name for span in block if span.generated]
        fixed = {s.name: clean[s.name] for s in block if not s.generated and not s.absent}
        noise = {}
        for index, name in enumerate(drawn):
            row_keys = jax.vmap(lambda key, i=index: jax.random.fold_in(key, i))(keys_B)
            size = clean[name].shape[1:]
            noise[name] = jax.vmap(lambda k, s=size: jax.random.normal(k, s, dtype))(row_keys)
        guidance, alone = self._guidance(block), self._of.bidirectional_spans

        def predict(x_t: Values, t: jax.Array, step: jax.Array) -> Values:
            pure = _fresh(keys_B, _ABSENT, step, clean)
            times = {name: t if name in x_t else jnp.zeros_like(t) for name in {**fixed, **x_t}}
            result = self._predict(cache, block, {**pure, **fixed, **x_t}, times, drawn)
            if guidance == 1:
                return result
            if not alone:
                without = self._predict(unconditional, block, {**fixed, **x_t}, times, drawn)
            else:
                without = {}
                for name in drawn:
                    others = {**pure, name: x_t[name]}
                    without |= self._predict(unconditional, block, others, {name: t}, [name])
            return jax.tree.map(lambda a, b: b + guidance * (a - b), result, without)

        def fresh(step: jax.Array) -> Values:
            return _fresh(keys_B, _SAMPLER, step, noise)

        bounds = {self._stems[name].bound for name in drawn}
        bound = bounds.pop() if len(bounds) == 1 else None
        diffusion = Diffusion(self._of.prediction, self._of.sampler)
        result: Values = diffusion.sample(predict, noise, self._of.sampling_steps, bound, fresh)
        return result

    def _guidance(self, block: Sequence[Span]) -> float:
        """Return the weight of the guided prediction for the spans of a block that are made."""
        first = self._plan[0]
        by_others = self._of.bidirectional_spans and sum(not span.absent for span in block) > 1
        if first.name in self._of.discrete or by_others:
            return GUIDANCE if self._of.guidance is None else self._of.guidance
        if self._of.guidance not in (None, 1):
            names = ", ".join(span.name for span in block if span.generated)
            raise UserError(
                f"guidance is {self._of.guidance:g}, and nothing guides the generation of {names}: the sequence "
                "does not begin with a discrete span, and no other span that it sees is given or generated. "
                "Set guidance to 1."
            )
        return 1.0

    def _predict(
        self,
        cache: Cache,
        spans: Sequence[Span],
        x: Values,
        times: Values,
        targets: Collection[str],
    ) -> Values:
        """Return predictions of some spans for values x, each at its time; those without a time are noise, at 1."""
        streams, contexts = [], {}
        for span in spans:
            t_B = jnp.full(self._rows, times.get(span.name, 1.0), _wide(cache))
            stream, contexts[span.name] = self._of.noisy(
                self._model, span.name, span.arrays, x[span.name], t_B
            )
            streams.append(stream)
        x_BSD, _ = self._decode(cache, concatenate(streams), FULL)
        ends, result = 0, {}
        for span, stream in zip(spans, streams, strict=True):
            start, ends = ends, ends + stream.x_BSD.shape[1]
            if span.name in targets:
                result[span.name] = self._of.predicted(
                    self._model, span.name, x_BSD[:, start:ends], contexts[span.name]
                )
        return result

    def _mask(self, name: str) -> Mask:
        return Causal() if name in self._of.discrete else FULL

    def _span(self, span: Span, values: jax.Array | None, keep: bool) -> Stream:
        """Return the tokens of a span, without noise."""
        name, arrays = span.name, span.arrays
        if name in self._of.discrete:
            keep_B = jnp.full(self._rows, keep)
            return self._of.written(self._model, name, arrays, keep_B)
        if values is None:
            values = self._stems[name].values(arrays, jnp.float32)
        t_B = jnp.zeros(self._rows, values.dtype)
        return self._of.noisy(self._model, name, arrays, values, t_B).stream

    def _as_arrays(self, span: Span, ids_BL: jax.Array) -> dict[str, jax.Array]:
        """Return a discrete span that was written, to be read."""
        return {"ids": ids_BL, "valid": self._stems[span.name].token_ids.used(ids_BL)}

    def _decode(self, cache: Cache, stream: Stream, mask: Mask) -> tuple[jax.Array, Cache]:
        """Return the trunk's outputs for the tokens of `stream` after those in the cache, and the cache with them."""
        valid_BS = stream.mask_BS()
        filled_BT = jax.lax.dynamic_update_slice_in_dim(cache.filled_BT, valid_BS, cache.at, axis=1)
        position_BS = cache.count_B[:, None] + jnp.maximum(jnp.cumsum(valid_BS, axis=1) - 1, 0)
        stream = Stream(
            stream.x_BSD,
            valid_BS,
            layout=stream.layout,
            # As in training, where rows differ in their order: by tokens that there are, not by slots.
            attributes={"position": position_BS.astype(jnp.int32)} if self._of.compact else {},
            mask=self._model.mask_in(self._tower, mask),
            filled_BT=filled_BT,
        )
        tower = self._model.tower(self._tower)
        out, layers = tower.decode(stream, cache.layers, cache.at)
        x_BSD = apply_per_modality(tower.norm, out.x_BSD, modality_of(out))
        count_B = cache.count_B + valid_BS.sum(axis=1)
        return x_BSD, Cache(
            layers, cache.at + valid_BS.shape[1], filled_BT, count_B.astype(jnp.int32)
        )


def _wide(cache: Cache) -> Any:
    return jnp.promote_types(jax.tree.leaves(cache.layers)[0].dtype, jnp.float32)


def _all_there(span: Span) -> Span:
    """Return a span whose tokens all exist."""
    arrays = dict(span.arrays)
    if "valid" in arrays:
        arrays["valid"] = jnp.ones_like(arrays["valid"])
    return replace(span, arrays=arrays)


def _fresh(keys_B: jax.Array, purpose: int, step: jax.Array, like: Values) -> Values:
    """Return noise of the shapes of `like` `[B, ...]`, by row, purpose, step and name."""
    result = {}
    for index, (name, x) in enumerate(like.items()):

        def of_row(key: jax.Array, index: int = index, x: jax.Array = x) -> jax.Array:
            for number in (purpose, index, step):
                key = jax.random.fold_in(key, number)
            return jax.random.normal(key, x.shape[1:], x.dtype)

        result[name] = jax.vmap(of_row)(keys_B)
    return result

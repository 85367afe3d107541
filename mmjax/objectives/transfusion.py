"""Transfusion (Zhou et al. 2024): discrete tokens by the next one, continuous ones by diffusion, in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.nn import initializers

from mmjax.bounds import AMOUNT, COUNT, check
from mmjax.diffusion import Diffusion, time_features
from mmjax.errors import UserError
from mmjax.generation import Sampling
from mmjax.interleaved import Composer
from mmjax.layers.dense import Dense, Mlp
from mmjax.layers.masks import FULL, Causal, KeyIs, Mask, QueryIs, Same
from mmjax.layers.packing import pack, positions, unpack
from mmjax.layers.stream import Aux, Stream, concatenate
from mmjax.layers.unet import UNet
from mmjax.modalities.image import patchify, unpatchify
from mmjax.modality import Input
from mmjax.model import Batch, Model
from mmjax.objective import Coupled, Loss, Part, Represented, Span, refuse_drop, row_keys
from mmjax.objectives.masked_image import as_pixels, patch_side
from mmjax.parameters import declare

_FEATURES = 128  # of a time


class Adapter(nnx.Module):
    """What stands between the trunk and the outputs, by modality.

    `begin` is the token before a discrete span, `logits` its output; `time` tells a continuous span's tokens how noisy
    they are, `values` is its output, and `unet`, where there is one, a second way in and out.
    """

    def __init__(
        self, width: int, vocabularies: Mapping[str, int], sizes: Mapping[str, int], channels: int
    ):
        begin = initializers.normal(0.1)
        self.begin = nnx.Dict(
            {m: declare((width,), (None,), begin, decay=False) for m in vocabularies}
        )
        self.logits = nnx.Dict(
            {
                m: Dense(width, n, ("embed", "vocabulary"), bias=False)
                for m, n in vocabularies.items()
            }
        )
        self.features = nnx.Dict({m: Dense(_FEATURES, width, (None, "embed")) for m in sizes})
        self.time = nnx.Dict({m: Mlp(width, width) for m in sizes})
        zeros = initializers.zeros
        self.values = nnx.Dict(
            {m: Dense(width, n, ("embed", None), init=zeros) for m, n in sizes.items()}
        )
        patch = {m: round((n / 3) ** 0.5) for m, n in sizes.items()}
        self.unet = nnx.Dict(
            {m: UNet(patch[m], channels, width) for m in sizes} if channels else {}
        )


@struct.dataclass
class Draws:
    """What is random of each row: times `[B]` and noise `[B, S, P]` by modality, and two choices `[B]`.

    Attributes:
      keep_B: whether it sees the discrete span that comes first.
      swapped_B: whether its spans are read from the last to the first.
    """

    times: dict[str, jax.Array]
    noise: dict[str, jax.Array]
    keep_B: jax.Array
    swapped_B: jax.Array


@struct.dataclass
class Outputs:
    """What a pass says of the spans, by modality.

    Attributes:
      logits: of each token of a discrete span, `[B, L, V]`.
      values: of a continuous span's noise, `[B, S, P]`.
      there: which of its tokens exist, `[B, S]`.
      aux: the trunk's.
    """

    logits: dict[str, jax.Array]
    values: dict[str, jax.Array]
    there: dict[str, jax.Array]
    aux: Aux


@dataclass(frozen=True, kw_only=True)
class Transfusion(Coupled):
    """`L = sum_m w_m L_m`: cross-entropy per token of discrete spans, squared error per span of continuous ones.

    A row is an item: one span of each modality. A continuous span holds the stem's tokens of noised values plus a
    function of the time; its tokens attend to one another and to what comes before, those of discrete spans causally.
    The loss couples rows only in that a discrete mean is over the tokens of the whole batch.

    With discrete spans alone it is Chameleon's objective; with one span alone a language model (MonoFormer alternates
    that with drawing); with several continuous spans that are `mutual`, each with a time of its own, UniDiffuser's.

    Attributes:
      order: the modalities of an item, as they are read.
      discrete: those that are predicted token by token; the first of them is what it writes of another modality.
      weight: of the loss of each continuous modality (the paper: 5); 1 of each discrete one.
      weights: by modality, where it is another.
      target: what diffusion predicts, see `mmjax.diffusion`.
      limit: the largest time of a continuous span that a discrete one comes after (the paper: 0.5, so that there is
        something to tell).
      drop: share of rows that lose a discrete span which comes first, for guidance.
      swap: share of rows that are read from the last span to the first.
      pack: items of a sequence; with `across` they are one document, else they do not see each other.
      mutual: continuous spans see each other whatever their order.
      channels: of the first size of a U-Net between the trunk and pictures; 0 for linear adapters.
      steps, guidance, sampling: of what is drawn and written.
    """

    order: tuple[str, ...] = ("text", "image")
    discrete: tuple[str, ...] = ("text",)
    weight: float = 5.0
    weights: dict[str, float] = field(default_factory=dict)
    target: str = "epsilon"
    limit: float = 0.5
    drop: float = 0.1
    swap: float = 0.0
    pack: int = 1
    across: bool = False
    mutual: bool = False
    channels: int = 0
    steps: int = 25
    guidance: float = 3.0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        Diffusion(self.target)
        check(self, weight=AMOUNT, weights=AMOUNT, steps=COUNT, guidance=AMOUNT)
        if not self.order or len(set(self.order)) < len(self.order):
            raise UserError(
                f"transfusion: order is {list(self.order)}; it names each modality once, and one at least."
            )
        for name in (*self.discrete, *self.weights):
            if name not in self.order:
                raise UserError(f"transfusion: '{name}' is not in order {list(self.order)}.")
        for key in ("limit", "drop", "swap"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"transfusion: {key} is {getattr(self, key)}; expected [0, 1].")
        if self.pack < 1 or self.channels < 0:
            raise UserError(
                f"transfusion: pack is {self.pack}, at least 1; channels {self.channels}, not below 0."
            )

    @property
    def continuous(self) -> tuple[str, ...]:
        """The modalities that diffusion learns."""
        return tuple(m for m in self.order if m not in self.discrete)

    def reads(self) -> tuple[str, ...]:
        return self.order

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        super().check_inputs(inputs)
        refuse_drop(self, inputs)

    def heads(self, width: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        for name in self.order:
            if ("ids" in inputs[name].arrays()) != (name in self.discrete):
                raise UserError(
                    f"transfusion: discrete is {list(self.discrete)}; modality '{name}' "
                    f"{'has' if 'ids' in inputs[name].arrays() else 'has no'} token ids."
                )
        for name in self.continuous if self.channels else ():
            pixels = inputs[name].arrays().get("pixels")
            if pixels is None or len(pixels.shape) != 3:
                raise UserError(
                    f"transfusion: channels is {self.channels}, but '{name}' holds no pictures, which U-Nets are for. "
                    "Set channels to 0."
                )
        vocabularies = {m: _vocabulary(inputs[m]) for m in self.order if m in self.discrete}
        sizes = {m: _values(inputs[m], width) for m in self.continuous}
        return {"adapter": Adapter(width, vocabularies, sizes, self.channels)}

    # --- the spans -----------------------------------------------------------------------------

    def written(self, model: Model, name: str, arrays: Any, keep_B: jax.Array) -> Stream:
        """A discrete span: the token of its beginning, and its tokens, which rows that are not kept lack."""
        adapter = model.heads[self.head].adapter
        return _begun(model.tokens(name, arrays), adapter.begin[name][...], keep_B)

    def noisy(
        self, model: Model, name: str, arrays: Any, x_t: jax.Array, t_B: jax.Array
    ) -> tuple[Stream, Any]:
        """A continuous span of values `x_t` `[B, S, P]`, and what its way back needs; shapes are those of `arrays`."""
        adapter = model.heads[self.head].adapter
        stream = model.tokens(name, arrays, x_t)
        time_BD = adapter.time[name](adapter.features[name](time_features(t_B, _FEATURES)))
        x_BSD, went = stream.x_BSD + time_BD[:, None].astype(stream.x_BSD.dtype), None
        if name in adapter.unet:
            height, width = arrays["pixels"].shape[1:3]
            pictures = unpatchify(x_t, height, width, patch_side(x_t)).astype(x_BSD.dtype)
            went = adapter.unet[name].descend(pictures, time_BD.astype(x_BSD.dtype))
            x_BSD = x_BSD + went.tokens_BSD
        return replace(stream, x_BSD=x_BSD), (went, time_BD.astype(x_BSD.dtype))

    def logits(self, model: Model, name: str, x_BSD: jax.Array) -> jax.Array:
        """What the trunk's outputs of a discrete span say of its next tokens, `[B, S, V]`."""
        logits_BSV: jax.Array = model.heads[self.head].adapter.logits[name](x_BSD)
        return logits_BSV

    def predicted(self, model: Model, name: str, x_BSD: jax.Array, way: Any) -> jax.Array:
        """What the trunk's outputs of a continuous span say of its noise, `[B, S, P]`."""
        adapter, (went, time_BD) = model.heads[self.head].adapter, way
        values: jax.Array = adapter.values[name](x_BSD)
        if went is None:
            return values
        pictures = adapter.unet[name].ascend(x_BSD, went, time_BD)
        return values + patchify(pictures, patch_side(values))

    def mask(self) -> Mask:
        """Causal, or of the same continuous span; within an item unless `across`."""
        within = Same("item") if self.pack > 1 else FULL
        found: Mask = Causal()
        for name in self.continuous:
            found = found | (Same("segment") & KeyIs("modality", name))
        if self.mutual:
            pairs = ((one, other) for one in self.continuous for other in self.continuous)
            for one, other in pairs:
                found = found | (QueryIs("modality", one) & KeyIs("modality", other) & within)
        return found if self.across else found & within

    def run(
        self, model: Model, inputs: Any, x_t: Mapping[str, jax.Array], draws: Draws, key: jax.Array
    ) -> Outputs:
        """One pass: all spans of noised values `x_t`."""
        streams, ways = [], {}
        for index, name in enumerate(self.order):
            if name in self.discrete:
                kept_B = draws.keep_B | ~self._comes_first(index, draws.swapped_B)
                streams.append(self.written(model, name, inputs[name], kept_B))
            else:
                stream, ways[name] = self.noisy(
                    model, name, inputs[name], x_t[name], draws.times[name]
                )
                streams.append(stream)
        x_BSD, aux = self._trunk(model, streams, draws.swapped_B, key)
        lengths = [stream.x_BSD.shape[1] for stream in streams]
        parts = jnp.split(x_BSD, list(accumulate(lengths))[:-1], axis=1)
        out = dict(zip(self.order, parts, strict=True))
        return Outputs(
            {m: self.logits(model, m, out[m][:, :-1]) for m in self.order if m in self.discrete},
            {m: self.predicted(model, m, out[m], ways[m]) for m in self.continuous},
            {
                m: stream.mask_BS()
                for m, stream in zip(self.order, streams, strict=True)
                if m in self.continuous
            },
            aux,
        )

    def _trunk(
        self, model: Model, streams: Sequence[Stream], swapped_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        stream = concatenate(list(streams))
        if self.swap:
            place_BS = positions([s.mask_BS() for s in streams], swapped_B)
            stream = replace(stream, attributes={"position": place_BS})
        stream, aux = model.encode([pack(stream, self.pack)], key, self.mask())
        return unpack(stream.x_BSD, self.pack), aux

    def _comes_first(self, index: int, swapped_B: jax.Array) -> jax.Array:
        """Rows in which the span of this index comes before another."""
        last = len(self.order) - 1
        if not last:
            return jnp.zeros_like(swapped_B)
        return jnp.where(swapped_B, index == last, index == 0)

    # --- the loss ------------------------------------------------------------------------------

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Of each row and modality: the summed loss, and how much it is a sum of."""
        inputs, diffusion = batch["inputs"], Diffusion(self.target)
        leaf = jax.tree.leaves(nnx.state(model.heads[self.head].adapter))[0]
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        stems: Any = model.stems
        x = {m: stems[m].values(inputs[m], dtype) for m in self.continuous}
        draws = self.draw(row_keys(batch, key), x)
        x_t = {m: diffusion.noised(x[m], draws.noise[m], draws.times[m]) for m in x}
        out = self.run(model, inputs, x_t, draws, key)
        rows: dict[str, Any] = {}
        for index, name in enumerate(self.order):
            if name in self.discrete:
                kept_B = draws.keep_B | ~self._comes_first(index, draws.swapped_B)
                told_BL = inputs[name]["valid"] & kept_B[:, None]
                losses_BL = next_token_losses(out.logits[name], inputs[name]["ids"])
                rows[name] = _total(losses_BL, told_BL, dtype)
            else:
                wanted = diffusion.wanted(x[name], draws.noise[name], draws.times[name])
                error = jnp.square(out.values[name].astype(dtype) - wanted).mean(axis=-1)
                nothing = jnp.square(wanted).mean(axis=-1)
                there_BS = out.there[name]
                rows[name] = {**_mean(error, there_BS), "nothing": _mean(nothing, there_BS)["sum"]}
        return Represented(rows, out.aux)

    def draw(self, keys_B: jax.Array, x: Mapping[str, jax.Array]) -> Draws:
        """Of each row by its own key, for clean values `x`."""
        dtype = jax.tree.leaves(dict(x))[0].dtype if x else jnp.float32

        def of_row(key: jax.Array) -> Any:
            time, noise, sees, swap = jax.random.split(key, 4)
            t = jax.random.uniform(time, (len(self.continuous),), dtype)
            e = {
                m: jax.random.normal(jax.random.fold_in(noise, i), x[m].shape[1:], dtype)
                for i, m in enumerate(self.continuous)
            }
            return t, e, jax.random.uniform(sees), jax.random.uniform(swap)

        t_BM, noise, sees_B, swap_B = jax.vmap(of_row)(keys_B)
        swapped_B = swap_B < self.swap
        times = {
            m: t_BM[:, i] * self._limits(m, swapped_B).astype(dtype)
            for i, m in enumerate(self.continuous)
        }
        return Draws(times, noise, sees_B >= self.drop, swapped_B)

    def _limits(self, name: str, swapped_B: jax.Array) -> jax.Array:
        index = self.order.index(name)
        after = any(m in self.discrete for m in self.order[index + 1 :])
        before = any(m in self.discrete for m in self.order[:index])
        return jnp.where(jnp.where(swapped_B, before, after), self.limit, 1.0)

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        value = baseline = jnp.zeros((), jnp.float32)
        metrics, parts = dict[str, jax.Array](), dict[str, Part]()
        for name, row in rows.items():
            total = {k: jnp.where(batch["valid"], v, 0).sum() for k, v in row.items()}
            count = jnp.maximum(total["count"], 1)
            weight = self.weights.get(name, 1.0 if name in self.discrete else self.weight)
            if name in self.discrete:
                vocabulary = model.heads[self.head].adapter.logits[name].kernel[...].shape[-1]
                nothing = jnp.asarray(math.log(vocabulary))
            else:
                nothing = total["nothing"] / count
            metrics |= {name: total["sum"] / count, f"baseline {name}": nothing}
            value = value + weight * metrics[name]
            baseline = baseline + weight * nothing
            parts[name] = Part(weight, total["count"])
        return Loss(value, {**metrics, "baseline": baseline}, parts=parts)

    # --- what it writes and draws --------------------------------------------------------------

    def writes(self) -> tuple[str, ...]:
        """The first of `discrete`, of the modality beside it, where it may come after it."""
        if len(self.order) != 2 or not self.discrete:
            return ()
        text = self.discrete[0]
        other = self.order[1 - self.order.index(text)]
        return (other, text) if (self.order[1] == text or self.swap) else ()

    def captions(
        self, model: Model, arrays: Mapping[str, jax.Array], length: int, keys_B: jax.Array
    ) -> jax.Array:
        other, text = self.writes()
        blank = jnp.zeros((keys_B.shape[0], length), jnp.int32)
        wanted = Span(text, {"ids": blank, "valid": blank == 0}, made=True)
        return Composer(self, model, [Span(other, arrays), wanted]).compose(keys_B)[0]

    def write(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        other, text = (Span(m, batch["inputs"][m]) for m in self.writes())
        composer = Composer(self, model, [other, text])
        past = composer.read(composer.begin(), [other])
        ids_BL, told_BL = text.arrays["ids"], text.arrays["valid"]
        stem: Any = model.stems[text.name]
        losses_BL = next_token_losses(composer.logits(past, text), ids_BL)
        return {
            "written": composer.write(past, text, row_keys(batch, key)),
            "wanted": jnp.where(told_BL, ids_BL, stem.token_ids.pad),
            "cost": jnp.where(told_BL, losses_BL, 0).sum(axis=1),
            "tokens": told_BL.sum(axis=1),
        }

    def composes(self) -> tuple[str, ...]:
        return self.order

    def compose(self, model: Model, spans: Sequence[Span], keys_B: jax.Array) -> list[jax.Array]:
        made = Composer(self, model, spans).compose(keys_B)
        wanted = [span for span in spans if span.made]
        return [_seen(model, span, x) for span, x in zip(wanted, made, strict=True)]

    def shows(self) -> tuple[str, ...]:
        if len(self.order) < 2 or self.order[0] not in self.discrete:
            return ()
        return (f"the {self.order[0]}'s {self.order[-1]}", f"drawn from the {self.order[0]}")

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Pictures of the data, and what the model draws from their texts; nothing if they are no pictures."""
        last, keys_B = Span(self.order[-1], batch["inputs"][self.order[-1]]), row_keys(batch, key)
        given = _as_given(model, last)
        if given.dtype != jnp.uint8:
            return {}
        before = [Span(m, batch["inputs"][m]) for m in self.order[:-1]]
        [drawn] = self.compose(model, [*before, replace(last, made=True)], keys_B)
        return dict(zip(self.shows(), (given, drawn), strict=True))


def _as_given(model: Model, span: Span) -> jax.Array:
    """What a given span holds, as `compose` gives what it makes."""
    stem: Any = model.stems[span.name]
    if "ids" in span.arrays:
        return _seen(model, span, span.arrays["ids"])
    return _seen(model, span, stem.values(span.arrays, jnp.float32))


def _seen(model: Model, span: Span, x: jax.Array) -> jax.Array:
    """Ids or values of a span, as a person looks at them."""
    stem: Any = model.stems[span.name]
    if hasattr(stem, "pictures"):
        return jnp.asarray(stem.pictures(x))
    pixels = span.arrays.get("pixels")
    if pixels is None or pixels.ndim != 4:
        return x
    height, width = pixels.shape[1:3]
    return as_pixels((unpatchify(x, height, width, patch_side(x)) + 1) / 2)


def next_token_losses(logits_BLV: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """`-log softmax(logits)[id]` of each token, `[B, L]`, in float32 or wider."""
    wide = logits_BLV.astype(jnp.promote_types(logits_BLV.dtype, jnp.float32))
    logs_BLV = jax.nn.log_softmax(wide, axis=-1)
    return -jnp.take_along_axis(logs_BLV, ids_BL[..., None], axis=-1)[..., 0]


def _total(x_BL: jax.Array, told_BL: jax.Array, dtype: Any) -> dict[str, jax.Array]:
    """Of each row the sum of what is told, and the number of its terms."""
    return {
        "sum": jnp.where(told_BL, x_BL, 0).sum(axis=1).astype(dtype),
        "count": told_BL.sum(axis=1).astype(dtype),
    }


def _mean(x_BS: jax.Array, there_BS: jax.Array) -> dict[str, jax.Array]:
    """Of each row the mean over the tokens that it has: one term."""
    count_B = jnp.maximum(there_BS.sum(axis=1), 1)
    mean_B = jnp.where(there_BS, x_BS, 0).sum(axis=1) / count_B
    return {"sum": mean_B, "count": jnp.ones_like(mean_B)}


def _vocabulary(given: Input) -> int:
    modality: Any = given.modality
    return int(modality.vocabulary)


def _values(given: Input, width: int) -> int:
    """How many numbers a token of a continuous modality is made of.

    Raises:
      UserError: a modality whose stem does not say what its tokens are made of.
    """
    stem: Any = given.modality.stem(width)
    if not hasattr(stem, "values"):
        raise UserError(
            f"transfusion: modality '{given.name}' has neither token ids nor values that diffusion could noise."
        )
    rows = {n: jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for n, s in given.arrays().items()}
    return int(jax.eval_shape(lambda arrays: stem.values(arrays, jnp.float32), rows).shape[-1])


def _begun(stream: Stream, begin_D: jax.Array, keep_B: jax.Array) -> Stream:
    """A span's stream with the token of its beginning; rows that are not kept have nothing else."""
    rows, length, width = stream.x_BSD.shape
    begin = jnp.broadcast_to(begin_D.astype(stream.x_BSD.dtype), (rows, 1, width))
    valid = stream.mask_BS() & keep_B[:, None]
    return replace(
        stream,
        x_BSD=jnp.concatenate([begin, stream.x_BSD], axis=1),
        valid_BS=jnp.concatenate([jnp.ones((rows, 1), bool), valid], axis=1),
        coordinates={},
        layout=((stream.layout[0][0], length + 1),),
    )

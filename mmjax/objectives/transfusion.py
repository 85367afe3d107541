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

from mmjax.core.batch import Batch
from mmjax.core.bounds import AMOUNT, COUNT, check
from mmjax.core.errors import UserError
from mmjax.data.binning import even_groups
from mmjax.generation.composer import Composer
from mmjax.generation.decoding import Sampling
from mmjax.generation.diffusion import Diffusion
from mmjax.generation.spans import NoisySpan, Span
from mmjax.generation.viewing import span_values, viewed
from mmjax.modalities.base import Input
from mmjax.modalities.image import patch_side, patchify, unpatchify
from mmjax.model import Model
from mmjax.nn.adapter import Adapter
from mmjax.nn.losses import next_token_losses, wide
from mmjax.nn.masks import FULL, Causal, KeyIs, Mask, QueryIs, Same
from mmjax.nn.packing import Region, lay, lift, pack, positions, share, unpack
from mmjax.nn.stream import Aux, Stream, concatenate
from mmjax.nn.towers import Widths
from mmjax.objectives.base import (
    Composes,
    Coupled,
    Loss,
    Objective,
    Occupancy,
    Part,
    Represented,
    Shows,
    Writes,
    refuse_drop,
    row_keys,
)

_ALL = 2**31 - 1  # slots: as many as there can be tokens


@struct.dataclass
class Draws:
    """Random draws of each row: times `[B]` and noise `[B, S, P]` by modality, and two choices `[B]`.

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
    """The predictions of one pass for the spans, by modality.

    Attributes:
      logits: of each token of a discrete span, `[B, L, V]`; of the slots that spans share, from the second on,
        `[R, T - 1, V]`.
      values: of a continuous span's noise, `[B, S, P]`.
      there: which of its tokens exist, `[B, S]`.
      aux: the trunk's.
      regions: of the discrete spans that share slots.
    """

    logits: dict[str, jax.Array]
    values: dict[str, jax.Array]
    there: dict[str, jax.Array]
    aux: Aux
    regions: dict[str, Region] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Transfusion(Coupled, Writes, Composes, Shows):
    """`L = sum_m w_m L_m`: cross-entropy per token of discrete spans, squared error per span of continuous ones.

    A row is an item: one span of each modality. A continuous span holds the stem's tokens of noised values plus a
    function of the time; its tokens attend to one another and to what comes before, those of discrete spans causally.
    The loss couples rows only in that a discrete mean is over the tokens of the whole batch.

    With discrete spans alone it is Chameleon's objective; with one span alone a language model (MonoFormer alternates
    that with drawing); with several continuous spans that see each other (`bidirectional_spans`), UniDiffuser's.

    Sequences have static shapes. By default each span has slots for the longest text, and most of a short text's are
    padding. With `capacity`, the texts of a sequence's items lie without gaps in slots that they share. So that their
    lengths add up to about the same in every sequence, the loader groups the rows of a `window` by length; no example
    is skipped, moves to another step, or meets other random numbers on the host, and each window is a function of its
    own examples alone, whatever the mesh. Texts that together exceed the capacity are cut to the largest common length
    that fits, reported as `cut MODALITY` (the share of its tokens). Evaluation cuts nothing: there the shared slots
    hold every text whole. Loss and gradient of an item that is not cut are those of the item alone.

    Attributes:
      modalities: the modalities of an item, as they are read.
      discrete: those that are predicted token by token; the first of them is what it writes of another modality.
      weight: of the loss of each continuous modality (the paper: 5); 1 of each discrete one.
      weights: by modality, where it is another.
      prediction: what diffusion predicts, see `mmjax.generation.diffusion`.
      max_time: the largest time of a continuous span that comes before a discrete one (the paper: 0.5).
      condition_dropout: share of rows that lose a discrete span which comes first, for guidance.
      reverse_prob: share of rows that are read from the last span to the first.
      pack: items of a sequence.
      attend_across_items: the items of a sequence are one document; else they do not see each other.
      capacity: by discrete modality, slots that the spans of a sequence share, each with the token of its beginning;
        a modality without an entry has slots for its longest span in each item.
      window: consecutive rows of a batch that are grouped by length into sequences, a multiple of `pack` that divides
        the batch (the whole batch, if that is smaller); 0 to take them as they come. A process reads whole windows:
        choose one that divides its rows.
      z_loss: weight of the mean of `logsumexp(logits)^2` of discrete tokens (Chameleon: 1e-5).
      bidirectional_spans: continuous spans see each other whatever their order.
      unet_channels: of the first size of a U-Net between the trunk and pictures; 0 for linear adapters.
      sampling_steps: of drawing a continuous span.
      guidance: weight g of a drawn span's guided prediction, `without + g (with - without)`, `without` being without
        the discrete span that comes first and with spans that it sees both ways as pure noise; 1 for no guidance. By
        default it is 3 where there is something to be guided by. A number for a sequence without such is an error.
      sampler: `ddim` (deterministic) or `ddpm` (ancestral), see `mmjax.generation.diffusion`.
      sampling: of what is written.
    """

    modalities: tuple[str, ...] = ("text", "image")
    discrete: tuple[str, ...] = ("text",)
    weight: float = 5.0
    weights: dict[str, float] = field(default_factory=dict)
    prediction: str = "epsilon"
    max_time: float = 0.5
    condition_dropout: float = 0.1
    reverse_prob: float = 0.0
    pack: int = 1
    capacity: dict[str, int] = field(default_factory=dict)
    window: int = 0
    attend_across_items: bool = False
    bidirectional_spans: bool = False
    unet_channels: int = 0
    z_loss: float = 0.0
    sampling_steps: int = 25
    guidance: float | None = None
    sampler: str = "ddim"
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        Diffusion(self.prediction, self.sampler)
        check(self, weight=AMOUNT, weights=AMOUNT, guidance=AMOUNT, z_loss=AMOUNT)
        check(self, sampling_steps=COUNT)
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise UserError(
                f"transfusion: modalities is {list(self.modalities)}; it names each modality once, and one at least."
            )
        for name in (*self.discrete, *self.weights):
            if name not in self.modalities:
                raise UserError(
                    f"transfusion: '{name}' is not in modalities {list(self.modalities)}."
                )
        for key in ("max_time", "condition_dropout", "reverse_prob"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"transfusion: {key} is {getattr(self, key)}; expected [0, 1].")
        if self.pack < 1 or self.unet_channels < 0:
            raise UserError(
                f"transfusion: pack is {self.pack}, at least 1; unet_channels {self.unet_channels}, not below 0."
            )
        self._check_capacity()

    def _check_capacity(self) -> None:
        for name, slots in self.capacity.items():
            if name not in self.discrete:
                raise UserError(
                    f"transfusion: capacity names '{name}', which is not in discrete {list(self.discrete)}."
                )
            if slots < 2 * self.pack:
                raise UserError(
                    f"transfusion: capacity of '{name}' is {slots}; each of the {self.pack} items of a sequence needs "
                    f"a token for its beginning and one more: at least {2 * self.pack}."
                )
        if self.window < 0 or self.window % self.pack:
            raise UserError(
                f"transfusion: window is {self.window}; expected 0 or a multiple of pack, {self.pack}."
            )
        if self.window and (self.attend_across_items or not self.capacity):
            raise UserError(
                f"transfusion: window is {self.window}, which groups items by length for `capacity`, and not those "
                "of documents (`attend_across_items`). Set it to 0."
            )

    @property
    def continuous(self) -> tuple[str, ...]:
        """The modalities that diffusion learns."""
        return tuple(m for m in self.modalities if m not in self.discrete)

    @property
    def compact(self) -> bool:
        """True if positions count the tokens that exist; otherwise they count slots."""
        return bool(self.reverse_prob or self.capacity)

    def reads(self) -> tuple[str, ...]:
        return self.modalities

    def for_evaluation(self) -> Objective:
        """Give slots to all of each text; items that do not see each other are then a sequence each."""
        pack = self.pack if self.attend_across_items or not self.capacity else 1
        return replace(self, capacity=dict.fromkeys(self.capacity, _ALL), window=0, pack=pack)

    def rows_together(self) -> int:
        return self.pack

    def window_rows(self, batch: int) -> int:
        return min(self.window, batch) or 1

    def arranged(self, rows: Sequence[Batch]) -> Sequence[int]:
        lengths = [sum(int(r.inputs[m]["valid"].sum()) for m in self.capacity) for r in rows]
        return even_groups(lengths, self.pack)

    def occupancy(self, model: Model, batch: Batch, key: jax.Array) -> Occupancy:
        """Count the tokens of the sequences, with those that begin spans; what is dropped or cut does not count."""
        inputs, choices = batch.inputs, self._choices(row_keys(batch, key))
        counts, total = [], 0
        for name in self.modalities:
            begins = int(name in self.discrete)
            if begins:
                valid_BS = inputs[name]["valid"] & self._keeps(name, *choices)[:, None]
            else:
                valid_BS = model.tokens(name, inputs[name]).mask_BS()
            if name in self.capacity:
                region = share(valid_BS, self.pack, self.capacity[name], batch.valid)
                counts.append(region.counts_RN.reshape(-1))
                total += region.item_RT.size
            else:
                counts.append(begins + valid_BS.sum(axis=1, dtype=jnp.int32))
                total += valid_BS.shape[0] * (begins + valid_BS.shape[1])
        valid_B = jnp.where(batch.valid, sum(counts[1:], counts[0]), 0)
        return Occupancy(valid_B.sum(), total)

    def check_inputs(self, inputs: Mapping[str, Input]) -> None:
        super().check_inputs(inputs)
        refuse_drop(self, inputs)

    def heads(self, widths: Widths, inputs: Mapping[str, Input]) -> dict[str, Any]:
        for name in self.modalities:
            if ("ids" in inputs[name].arrays()) != (name in self.discrete):
                raise UserError(
                    f"transfusion: discrete is {list(self.discrete)}; modality '{name}' "
                    f"{'has' if 'ids' in inputs[name].arrays() else 'has no'} token ids."
                )
        for name in self.capacity:
            if not hasattr(inputs[name].modality, "words"):
                raise UserError(
                    f"transfusion: capacity names '{name}', which is no text: its spans have one length. Remove it."
                )
        for name in self.continuous if self.unet_channels else ():
            pixels = inputs[name].arrays().get("pixels")
            if pixels is None or len(pixels.shape) != 3:
                raise UserError(
                    f"transfusion: unet_channels is {self.unet_channels}, but '{name}' holds no pictures, which U-Nets "
                    "are for. Set unet_channels to 0."
                )
        width = widths.one(self.modalities, "transfusion")
        vocabularies = {m: _vocabulary(inputs[m]) for m in self.modalities if m in self.discrete}
        sizes = {m: _size(inputs[m], width) for m in self.continuous}
        return {"adapter": Adapter(width, vocabularies, sizes, self.unet_channels)}

    # --- the spans -----------------------------------------------------------------------------

    def written(self, model: Model, name: str, arrays: Any, keep_B: jax.Array) -> Stream:
        """Return a discrete span: the token of its beginning, and its tokens, which rows that are not kept lack."""
        begun: Stream = model.heads[self.head].adapter.begun(
            name, model.tokens(name, arrays), keep_B
        )
        return begun

    def shared(self, model: Model, name: str, arrays: Any, region: Region) -> Stream:
        """Return the discrete spans that share slots, each after the token of its beginning: `[R, T, D]`."""
        laid = {
            "ids": region.pick(arrays["ids"]),
            "valid": region.valid_RT,
            "index": jnp.maximum(region.index_RT - 1, 0),
        }
        adapter: Any = model.heads[self.head].adapter
        begun: Stream = adapter.begun_in(name, model.tokens(name, laid), region)
        return begun

    def noisy(
        self, model: Model, name: str, arrays: Any, x_t: jax.Array, t_B: jax.Array
    ) -> NoisySpan:
        """Return a continuous span of values `x_t` `[B, S, P]`, shaped as `arrays`, and what decoding it needs."""
        adapter = model.heads[self.head].adapter
        stream = model.tokens(name, arrays, x_t)
        time_BD = adapter.times(name, t_B)
        x_BSD, features = stream.x_BSD + time_BD[:, None].astype(stream.x_BSD.dtype), None
        if name in adapter.unet:
            height, width = arrays["pixels"].shape[1:3]
            pictures = unpatchify(x_t, height, width, patch_side(x_t)).astype(x_BSD.dtype)
            features = adapter.unet[name].encode(pictures, time_BD.astype(x_BSD.dtype))
            x_BSD = x_BSD + features.tokens_BSD
        return NoisySpan(replace(stream, x_BSD=x_BSD), (features, time_BD.astype(x_BSD.dtype)))

    def logits(self, model: Model, name: str, x_BSD: jax.Array) -> jax.Array:
        """Return the logits of the next tokens from the trunk's outputs of a discrete span, `[B, S, V]`."""
        logits_BSV: jax.Array = model.heads[self.head].adapter.logits[name](x_BSD)
        return logits_BSV

    def predicted(self, model: Model, name: str, x_BSD: jax.Array, context: Any) -> jax.Array:
        """Return the diffusion target predicted from the trunk's outputs of a continuous span, `[B, S, P]`."""
        adapter, (features, time_BD) = model.heads[self.head].adapter, context
        values: jax.Array = adapter.values[name](x_BSD)
        if features is None:
            return values
        pictures = adapter.unet[name].decode(x_BSD, features, time_BD)
        return values + patchify(pictures, patch_side(values))

    def mask(self) -> Mask:
        """Return the mask: causal, or of the same continuous span; within an item unless `attend_across_items`."""
        within = Same("item") if self.pack > 1 else FULL
        # Where all items are read in the order in which they lie, a mask that is known before the program runs.
        lies_in_order = self.capacity and not (self.reverse_prob or self.attend_across_items)
        mask: Mask = Causal("index") if lies_in_order else Causal()
        for name in self.continuous:
            mask = mask | (Same("segment") & KeyIs("modality", name))
        if self.bidirectional_spans:
            pairs = ((one, other) for one in self.continuous for other in self.continuous)
            for one, other in pairs:
                mask = mask | (QueryIs("modality", one) & KeyIs("modality", other) & within)
        return mask if self.attend_across_items else mask & within

    def run(
        self,
        model: Model,
        inputs: Any,
        x_t: Mapping[str, jax.Array],
        draws: Draws,
        key: jax.Array,
        exists_B: jax.Array | None = None,
    ) -> Outputs:
        """Run one pass: all spans of noised values `x_t`; rows that do not exist take no shared slots."""
        streams, contexts, regions = dict[str, Stream](), {}, dict[str, Region]()
        for name in self.modalities:
            if name not in self.discrete:
                noisy = self.noisy(model, name, inputs[name], x_t[name], draws.times[name])
                streams[name], contexts[name] = noisy
                continue
            kept_B = self._keeps(name, draws.keep_B, draws.swapped_B)
            if name in self.capacity:
                valid_BL = inputs[name]["valid"] & kept_B[:, None]
                regions[name] = share(valid_BL, self.pack, self.capacity[name], exists_B)
                streams[name] = self.shared(model, name, inputs[name], regions[name])
            else:
                streams[name] = self.written(model, name, inputs[name], kept_B)
        if regions:
            out, aux = self._dense(model, streams, regions, draws.swapped_B, key)
        else:
            x_BSD, aux = self._trunk(model, list(streams.values()), draws.swapped_B, key)
            lengths = [stream.x_BSD.shape[1] for stream in streams.values()]
            parts = jnp.split(x_BSD, list(accumulate(lengths))[:-1], axis=1)
            out = dict(zip(self.modalities, parts, strict=True))
        discrete = [m for m in self.modalities if m in self.discrete]
        return Outputs(
            {m: self.logits(model, m, out[m][:, :-1]) for m in discrete},
            {m: self.predicted(model, m, out[m], contexts[m]) for m in self.continuous},
            {m: streams[m].mask_BS() for m in self.continuous},
            aux,
            regions,
        )

    def _dense(
        self,
        model: Model,
        streams: Mapping[str, Stream],
        regions: Mapping[str, Region],
        swapped_B: jax.Array,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], Aux]:
        """Return the trunk's outputs of sequences whose texts share slots, by modality, see `lift`."""
        stream = lay(streams, regions, self.pack, swapped_B)
        stream, aux = model.encode([stream], key, self.mask())
        return lift(stream.x_BSD, streams, regions, self.pack), aux

    def _trunk(
        self, model: Model, streams: Sequence[Stream], swapped_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        stream = concatenate(list(streams))
        if self.reverse_prob:
            position_BS = positions([s.mask_BS() for s in streams], swapped_B)
            stream = replace(stream, attributes={"position": position_BS})
        stream, aux = model.encode([pack(stream, self.pack)], key, self.mask())
        return unpack(stream.x_BSD, self.pack), aux

    def _keeps(self, name: str, keep_B: jax.Array, swapped_B: jax.Array) -> jax.Array:
        """Return the rows that have this discrete span: all but those that are to lose the one which comes first."""
        index, last = self.modalities.index(name), len(self.modalities) - 1
        if not last:
            return jnp.ones_like(keep_B)
        return keep_B | ~jnp.where(swapped_B, index == last, index == 0)

    # --- the loss ------------------------------------------------------------------------------

    def represent(self, model: Model, batch: Batch, key: jax.Array) -> Represented:
        """Return the summed loss and the number of terms, per row and modality."""
        inputs, diffusion = batch.inputs, Diffusion(self.prediction)
        leaf = jax.tree.leaves(nnx.state(model.heads[self.head].adapter))[0]
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        stems: Any = model.stems
        x = {m: stems[m].values(inputs[m], dtype) for m in self.continuous}
        draws = self.draw(row_keys(batch, key), x)
        x_t = {m: diffusion.noised(x[m], draws.noise[m], draws.times[m]) for m in x}
        out = self.run(model, inputs, x_t, draws, key, batch.valid)
        rows: dict[str, Any] = {}
        for name in self.modalities:
            if name in self.discrete:
                kept_B = self._keeps(name, draws.keep_B, draws.swapped_B)
                rows[name] = self._discrete(name, inputs[name], kept_B, out, dtype)
            else:
                target = diffusion.target(x[name], draws.noise[name], draws.times[name])
                error = jnp.square(out.values[name].astype(dtype) - target).mean(axis=-1)
                nothing = jnp.square(target).mean(axis=-1)
                there_BS = out.there[name]
                rows[name] = {**_mean(error, there_BS), "nothing": _mean(nothing, there_BS)["sum"]}
        return Represented(rows, out.aux)

    def _discrete(
        self, name: str, arrays: Any, kept_B: jax.Array, out: Outputs, dtype: Any
    ) -> dict[str, jax.Array]:
        """Return the summed losses of each row's tokens of a discrete modality, their number, and how many were cut."""
        ids, scored, region = arrays["ids"], arrays["valid"] & kept_B[:, None], None
        if name in out.regions:
            region = out.regions[name]
            ids, scored = region.pick(ids)[:, 1:], region.scored_RT()
        logits = out.logits[name]
        terms = {"sum": next_token_losses(logits, ids), "count": scored}
        if self.z_loss:
            terms["z"] = jnp.square(jax.nn.logsumexp(wide(logits), axis=-1))

        def total(x: jax.Array) -> jax.Array:
            x = jnp.where(scored, x, 0)
            return (x.sum(axis=1) if region is None else region.following(x)).astype(dtype)

        result = {term: total(x) for term, x in terms.items()}
        if region is not None:
            result["cut"] = region.cut_RN.reshape(-1).astype(dtype)
        return result

    def draw(self, keys_B: jax.Array, x: Mapping[str, jax.Array]) -> Draws:
        """Draw each row by its own key, for clean values `x`."""
        dtype = jax.tree.leaves(dict(x))[0].dtype if x else jnp.float32

        def of_row(key: jax.Array) -> Any:
            time, noise, _, _ = jax.random.split(key, 4)
            t = jax.random.uniform(time, (len(self.continuous),), dtype)
            e = {
                m: jax.random.normal(jax.random.fold_in(noise, i), x[m].shape[1:], dtype)
                for i, m in enumerate(self.continuous)
            }
            return t, e

        t_BM, noise = jax.vmap(of_row)(keys_B)
        keep_B, swapped_B = self._choices(keys_B)
        times = {
            m: t_BM[:, i] * self._limits(m, swapped_B).astype(dtype)
            for i, m in enumerate(self.continuous)
        }
        return Draws(times, noise, keep_B, swapped_B)

    def _choices(self, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `keep_B` and `swapped_B` of `Draws`."""

        def of_row(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, _, sees, swap = jax.random.split(key, 4)
            return jax.random.uniform(sees), jax.random.uniform(swap)

        sees_B, swap_B = jax.vmap(of_row)(keys_B)
        return sees_B >= self.condition_dropout, swap_B < self.reverse_prob

    def _limits(self, name: str, swapped_B: jax.Array) -> jax.Array:
        index = self.modalities.index(name)
        after = any(m in self.discrete for m in self.modalities[index + 1 :])
        before = any(m in self.discrete for m in self.modalities[:index])
        return jnp.where(jnp.where(swapped_B, before, after), self.max_time, 1.0)

    def compare(self, model: Model, rows: Any, batch: Batch) -> Loss:
        value = baseline = jnp.zeros((), jnp.float32)
        metrics, parts = dict[str, jax.Array](), dict[str, Part]()
        for name, row in rows.items():
            total = {k: jnp.where(batch.valid, v, 0).sum() for k, v in row.items()}
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
            if "z" in total:
                metrics[f"z {name}"] = total["z"] / count
                value = value + weight * self.z_loss * metrics[f"z {name}"]
                parts[f"z {name}"] = Part(weight * self.z_loss, total["count"])
            if "cut" in total:
                metrics[f"cut {name}"] = total["cut"] / jnp.maximum(
                    total["cut"] + total["count"], 1
                )
        return Loss(value, {**metrics, "baseline": baseline}, parts=parts)

    # --- what it writes and draws --------------------------------------------------------------

    def writes(self) -> tuple[str, ...]:
        """Return the first of `discrete`, of the modality beside it, where it may come after it."""
        if len(self.modalities) != 2 or not self.discrete:
            return ()
        text = self.discrete[0]
        other = self.modalities[1 - self.modalities.index(text)]
        return (other, text) if (self.modalities[1] == text or self.reverse_prob) else ()

    def captions(
        self, model: Model, arrays: Mapping[str, jax.Array], length: int, keys_B: jax.Array
    ) -> jax.Array:
        other, text = self.writes()
        blank = jnp.zeros((keys_B.shape[0], length), jnp.int32)
        span = Span(text, {"ids": blank, "valid": blank == 0}, generated=True)
        return Composer(self, model, [Span(other, arrays), span]).compose(keys_B)[0]

    def write(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        other, text = (Span(m, batch.inputs[m]) for m in self.writes())
        composer = Composer(self, model, [other, text])
        cache = composer.read(composer.init_cache(), [other])
        ids_BL, told_BL = text.arrays["ids"], text.arrays["valid"]
        stem: Any = model.stems[text.name]
        losses_BL = next_token_losses(composer.logits(cache, text), ids_BL)
        return {
            "written": composer.write(cache, text, row_keys(batch, key)),
            "wanted": jnp.where(told_BL, ids_BL, stem.token_ids.pad),
            "cost": jnp.where(told_BL, losses_BL, 0).sum(axis=1),
            "tokens": told_BL.sum(axis=1),
        }

    def composes(self) -> tuple[str, ...]:
        return self.modalities

    def beside(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """Return the spans that are generated beside this one: those that are not given are pure noise."""
        mutual = self.continuous if self.bidirectional_spans else ()
        return tuple(m for m in mutual if m not in modalities) if {*mutual} & {*modalities} else ()

    def compose(self, model: Model, spans: Sequence[Span], keys_B: jax.Array) -> list[jax.Array]:
        values = Composer(self, model, spans).compose(keys_B)
        targets = [span for span in spans if span.generated]
        return [viewed(model, span, x) for span, x in zip(targets, values, strict=True)]

    def shows(self) -> tuple[str, ...]:
        if len(self.modalities) < 2 or self.modalities[0] not in self.discrete:
            return ()
        first, last = self.modalities[0], self.modalities[-1]
        return f"the {first}'s {last}", f"drawn from the {first}"

    def show(self, model: Model, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Return the data's pictures, and those drawn from their texts; nothing if the modality is no picture."""
        drawn_name, keys_B = self.modalities[-1], row_keys(batch, key)
        last = Span(drawn_name, batch.inputs[drawn_name])
        originals = span_values(model, last)
        if originals.dtype != jnp.uint8:
            return {}
        before = [Span(m, batch.inputs[m]) for m in self.modalities[:-1]]
        [drawn] = self.compose(model, [*before, replace(last, generated=True)], keys_B)
        return dict(zip(self.shows(), (originals, drawn), strict=True))


def _mean(x_BS: jax.Array, there_BS: jax.Array) -> dict[str, jax.Array]:
    """Return each row's mean over its existing tokens: one term."""
    count_B = jnp.maximum(there_BS.sum(axis=1), 1)
    mean_B = jnp.where(there_BS, x_BS, 0).sum(axis=1) / count_B
    return {"sum": mean_B, "count": jnp.ones_like(mean_B)}


def _vocabulary(input_: Input) -> int:
    modality: Any = input_.modality
    return int(modality.vocabulary)


def _size(input_: Input, width: int) -> int:
    """Return the number of values in a token of a continuous modality.

    Raises:
      UserError: a modality whose stem does not declare what its tokens are made of.
    """
    stem: Any = input_.modality.stem(width)
    if not hasattr(stem, "values"):
        raise UserError(
            f"transfusion: modality '{input_.name}' has neither token ids nor values that diffusion could noise."
        )
    rows = {n: jax.ShapeDtypeStruct((1, *s.shape), s.dtype) for n, s in input_.arrays().items()}
    return int(jax.eval_shape(lambda arrays: stem.values(arrays, jnp.float32), rows).shape[-1])

"""The trunk: groups of layers, each a pattern of blocks repeated under one scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.core import config as configs
from mmjax.core.bounds import COUNT, check
from mmjax.core.parameters import stack_layers
from mmjax.core.sharding import constrain
from mmjax.nn.by_modality import SHARED, PerModality, apply_per_modality, modality_of
from mmjax.nn.dense import norm_of
from mmjax.nn.stream import Aux, Stream, add_up, fold

_LAYERS = 4096  # of a trunk: each has names of its own in a checkpoint, and a config may come from anybody


@dataclass(frozen=True)
class GroupConfig:
    """A pattern of blocks, repeated.

    Attributes:
      repeat: how many times the pattern is repeated, under one scan.
      blocks: the pattern, in order; each block is `{name: ..., ...}`, see `mmjax.blocks.base`.
    """

    repeat: int
    blocks: tuple[dict[str, Any], ...] = field(
        metadata=configs.holds(
            "blocks", {"attention_impl": "free", "experts.losses_over": "schedule"}
        )
    )

    def __post_init__(self) -> None:
        check(self, repeat=COUNT)


class Group(nnx.Module):
    """A pattern of blocks, its parameters stacked over the repeats and run by `lax.scan`."""

    def __init__(self, group: GroupConfig, width: int, first: int, remat: str, where: str):
        if not group.blocks:
            raise configs.UserError(f"{where}.blocks is empty; a group repeats one block or more.")
        self.blocks = nnx.List(
            [_build(b, width, f"{where}.blocks[{i}]") for i, b in enumerate(group.blocks)]
        )
        self.first, self.repeat, self.remat = first, group.repeat, remat
        for offset, block in enumerate(self.blocks):
            stack_layers(block, first + offset, len(group.blocks), group.repeat)

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        graph, state = nnx.split(self.blocks)
        layout, context = stream.layout, stream.context

        def body(stream: Stream, inputs: tuple[Any, jax.Array]) -> tuple[Stream, list[Aux]]:
            slices, index = inputs
            blocks = nnx.merge(graph, slices)
            stream = replace(stream, context=context)  # the same for all: not carried
            auxes = []
            for offset, block in enumerate(blocks):
                # By the layer's own index, so that another grouping draws the same numbers.
                layer = self.first + index * len(blocks) + offset
                stream, aux = block(stream, fold(key, layer))
                auxes.append(aux)
            x_BSD = constrain(stream.x_BSD, ("batch", "tokens", None))
            return replace(stream, x_BSD=x_BSD, layout=layout, context=None), auxes

        stream, auxes = jax.lax.scan(
            _remat(body, self.remat),
            replace(stream, context=None),
            (state, jnp.arange(self.repeat)),
        )
        return replace(stream, context=context), add_up(
            [self._summed(a, i) for i, a in enumerate(auxes)]
        )

    def _summed(self, aux: Aux, offset: int) -> Aux:
        """Return a block's auxiliary outputs over all repeats: added up, but for usage and proposals of each layer."""
        total: Aux = jax.tree.map(lambda x: x.sum(axis=0), aux)
        layers = [self.first + i * len(self.blocks) + offset for i in range(self.repeat)]
        usage = {
            f"{layer:03d} {name}": x[i]
            for i, layer in enumerate(layers)
            for name, x in aux.usage.items()
        }
        return replace(total, usage=usage, proposals=aux.proposals)

    def init_cache(self, stream: Stream, slots: int) -> Any:
        """Return the caches of each block, stacked over the repeats, see `Trunk.init_cache`."""
        graph, state = nnx.split(self.blocks)

        def of_layer(slices: Any) -> list[Any]:
            blocks = nnx.merge(graph, slices)
            return [block.init_cache(stream, slots) for block in blocks]

        return jax.lax.map(of_layer, state)

    def decode(self, stream: Stream, cache: Any, at: jax.Array | int) -> tuple[Stream, Any]:
        """Apply the group's blocks to further tokens, see `Trunk.decode`."""
        graph, state = nnx.split(self.blocks)

        def body(stream: Stream, inputs: Any) -> tuple[Stream, Any]:
            slices, before = inputs
            blocks: Any = nnx.merge(graph, slices)
            after = []
            for block, memory in zip(blocks, before, strict=True):
                stream, memory = block.decode(stream, memory, at)
                after.append(memory)
            return stream, after

        return jax.lax.scan(body, stream, (state, cache))


def _build(block: dict[str, Any], width: int, where: str) -> Any:
    config = configs.component("blocks", block, where)
    try:
        return config.build(width)
    except configs.UserError as error:  # what the keys alone do not show
        raise configs.UserError(f"{where}: {error}") from error


def _remat(body: Any, policy: str) -> Any:
    """Rematerialise a body: `none` keeps all activations, `dots` those of matrix products, `full` only the inputs."""
    if policy == "none":
        return body
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if policy not in policies:
        raise configs.UserError(
            f"model.remat is '{policy}'.{configs.nearest(policy, ['none', *policies])}"
        )
    return jax.checkpoint(body, policy=policies[policy], prevent_cse=False)


class Trunk(nnx.Module):
    """All groups in order, then a norm (`layer` or `rms`): one trunk for every modality and task.

    With `per_modality` its modalities have a last norm each (see `mmjax.nn.by_modality`).
    """

    def __init__(
        self,
        groups: Sequence[GroupConfig],
        width: int,
        remat: str = "none",
        where: str = "model.layers",
        per_modality: PerModality = SHARED,
        norm: str = "layer",
        norm_eps: float = 1e-6,
    ):
        if not groups:
            raise configs.UserError(f"{where} is empty; a trunk needs a group.")
        layers = sum(max(group.repeat, 0) * len(group.blocks) for group in groups)
        if layers > _LAYERS:
            raise configs.UserError(
                f"{where}: {layers:,} layers; at most {_LAYERS:,} can be built."
            )
        self.groups: Any = nnx.List([])
        first = 0
        for index, group in enumerate(groups):
            self.groups.append(Group(group, width, first, remat, f"{where}[{index}]"))
            first += group.repeat * len(group.blocks)
        self.norm: Any = per_modality("norm", lambda: norm_of(norm, width, eps=norm_eps))

    def __call__(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        stream, aux = self.layers(stream, key)
        x_BSD = apply_per_modality(self.norm, stream.x_BSD, modality_of(stream))
        return replace(stream, x_BSD=x_BSD), aux

    def layers(self, stream: Stream, key: jax.Array | None) -> tuple[Stream, Aux]:
        """Apply all layers but the norm. Where the key is None, nothing is drawn: evaluation has no noise."""
        auxes = []
        for group in self.groups:
            stream, aux = group(stream, key)
            auxes.append(aux)
        return stream, add_up(auxes)

    def init_cache(self, stream: Stream, slots: int) -> Any:
        """Return an empty cache for `decode` of a stream of up to `slots` tokens.

        Args:
          stream: any tokens of it, for their number of rows and dtype; its context is read here, once.

        Raises:
          UserError: a layer that cannot take a stream part by part.
        """
        for group in self.groups:
            for block in group.blocks:
                if not hasattr(block, "decode"):
                    name = type(block).__name__
                    raise configs.UserError(
                        f"layer {name} cannot take a stream token by token, as generation does."
                    )
        return [group.init_cache(stream, slots) for group in self.groups]

    def decode(self, stream: Stream, cache: Any, at: jax.Array | int) -> tuple[Stream, Any]:
        """Apply the layers (without the norm) to the tokens of a stream from index `at` on, given all before.

        To the same numbers as the whole stream at once, where its mask is causal. Nothing is drawn here, and
        auxiliary losses are dropped.

        Args:
          cache: of the tokens before, by `init_cache` and then by this.

        Returns:
          The tokens, and the cache with them.
        """
        after = []
        for group, memory in zip(self.groups, cache, strict=True):
            stream, memory = group.decode(stream, memory, at)
            after.append(memory)
        return stream, after

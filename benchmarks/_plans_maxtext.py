"""MaxText's own ahead-of-time compilation of a decoder and of a ViT, and their losses on a CPU; the peer of `plans.py`.

    python -m benchmarks._plans_maxtext < REQUEST

A process of its own, as MaxText changes settings of JAX. The request is JSON: `what` (`decoder` or `ViT`), its `sizes`,
and either `topology` (MaxText's name) with its `chips` and the rows of each, `per_chip`, which is answered with bytes
and FLOPs, or `parameters` (an `.npz` file of ours and a batch), which is answered with the loss. The answer is the last
line of what it prints, in JSON.

What compiles is `maxtext.trainers.pre_train.train_compile`. It knows decoders only; for the ViT its training step is
one of `Gemma3VisionEncoderLayer` with a classifier, all else (sharding, optimizer, compilation) being MaxText's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.plans import TASK
from mmjax.plan import cost, hlo
from mmjax.plan.groups import Layout

Sizes = Mapping[str, int]


def arguments(what: str, sizes: Sizes, per_chip: float) -> list[str]:
    """Return MaxText's command line: Llama's decoder, or Gemma's ViT with as small a decoder as nobody sees."""
    import maxtext

    given: dict[str, Any] = {
        "per_device_batch_size": per_chip, "ici_fsdp_parallelism": -1, "enable_checkpointing": False,
        "opt_type": "adamw", "gradient_clipping_threshold": 1.0, "run_name": "plan", "log_config": False,
        "dtype": sizes.get("dtype", "bfloat16"),
    }  # fmt: skip
    if what == "decoder":
        given |= {
            "decoder_block": "llama2", "base_emb_dim": sizes["width"], "base_num_decoder_layers": sizes["layers"],
            "base_num_query_heads": sizes["num_heads"], "base_num_kv_heads": sizes["num_heads"],
            "head_dim": sizes["width"] // sizes["num_heads"], "base_mlp_dim": sizes["mlp_dim"],
            "vocab_size": sizes["vocabulary"], "max_target_length": sizes["length"], "remat_policy": "full",
            "normalization_layer_epsilon": 1e-6,
        }  # fmt: skip
    else:
        given |= {
            "hidden_size_for_vit": sizes["width"], "intermediate_size_for_vit": sizes["mlp_dim"],
            "num_hidden_layers_for_vit": sizes["layers"], "num_attention_heads_for_vit": sizes["num_heads"],
            "image_size_for_vit": sizes["pixels"], "patch_size_for_vit": sizes["patch"],
            "conv_stride_for_vit": sizes["patch"], "dtype_mm": sizes.get("dtype", "bfloat16"),
            "base_num_decoder_layers": 1, "max_target_length": 128, "normalization_layer_epsilon": 1e-6,
        }  # fmt: skip
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return ["", str(base), *(f"{key}={value}" for key, value in given.items())]


# --- a ViT -------------------------------------------------------------------------------------


class Classifier(nnx.Module):
    """Gemma's vision encoder, the mean of its tokens, and classes."""

    def __init__(self, config: Any, mesh: Any, classes: int):
        from maxtext.models import gemma3

        rngs = nnx.Rngs(0)
        self.encoder = gemma3.Gemma3VisionEncoderLayer(config, mesh, rngs=rngs)
        self.classes = nnx.Linear(config.hidden_size_for_vit, classes, rngs=rngs)

    def loss(self, pixels: jax.Array, labels: jax.Array, dtype: Any) -> jax.Array:
        """Return mean cross-entropy of pixels (uint8 `[B, H, W, 3]`)."""
        tokens = self.encoder(pixels.astype(dtype) / 127.5 - 1, deterministic=True)
        logits = self.classes(tokens[:, 0].mean(axis=1).astype(jnp.float32))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def _step(
    graph: Any, config: Any, shardings: Any, of_parameters: Any, state: Any, batch: Any
) -> Any:
    """Take a step in the form of MaxText's: a state and a batch give a state and metrics."""
    from maxtext.utils import maxtext_utils

    held = nnx.merge(graph, state)
    definition, parameters, rest = nnx.split(held.model, nnx.Param, ...)

    def loss(parameters: Any) -> jax.Array:
        model = nnx.merge(definition, parameters, rest, copy=True)
        return model.loss(batch["pixels"], batch["labels"], jnp.dtype(config.dtype))

    value, gradients = jax.value_and_grad(loss)(parameters)
    clipped = maxtext_utils.apply_gradient_clipping(
        gradients, None, config.gradient_clipping_threshold
    )
    held.apply_gradients(clipped)
    return nnx.state(held), {"loss": value}


def _of_rows(lies: Any) -> jax.sharding.NamedSharding:
    """Return the sharding by which MaxText cuts a batch of sequences, for arrays that have no second axis to cut."""
    return jax.sharding.NamedSharding(lies.mesh, jax.sharding.PartitionSpec(lies.spec[0]))


def _with_vit(compiler: Any, sizes: Sizes) -> None:
    """Run `train_compile` with our model, batch and step in the places of MaxText's."""

    def create(config: Any, mesh: Any) -> Any:
        def made() -> Classifier:
            return Classifier(config, mesh, sizes["classes"])

        return made, None

    def batch(config: Any, batch_sharding: Any) -> Any:
        rows, side = config.global_batch_size_to_load, sizes["pixels"]
        lies = _of_rows(batch_sharding)
        return {
            "pixels": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8, sharding=lies),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=lies),
        }

    compiler.model_creation_utils.create_nnx_abstract_model = create
    compiler.maxtext_utils.get_shaped_batch = batch
    compiler.train.train_step = _step
    signature = compiler.maxtext_utils.get_functional_train_with_signature

    def by_rows(
        step: Any, batch: Any, state: Any, model: Any, config: Any, parameters: Any = None
    ) -> Any:
        return signature(step, _of_rows(batch), state, model, config, parameters)

    compiler.maxtext_utils.get_functional_train_with_signature = by_rows


# --- what is asked -----------------------------------------------------------------------------


def planned(what: str, sizes: Sizes, topology: str, chips: int, per_chip: float) -> dict[str, Any]:
    """Return bytes of a chip, FLOPs of all, bytes that a chip sends, counted as `mmjax plan` counts its own."""
    from maxtext.trainers.pre_train import train_compile

    compile_, held = train_compile.jit_and_compile, {}

    def kept(function: Any, given: Any, *rest: Any, **more: Any) -> Any:
        held["parameters"] = sum(
            x.size for x in jax.tree.leaves(nnx.filter_state(given[0].model, nnx.Param))
        )
        held["compiled"] = compile_(function, given, *rest, **more)
        return held["compiled"]

    train_compile.jit_and_compile = kept
    if what == "ViT":
        _with_vit(train_compile, sizes)
    line = [f"compile_topology={topology}", "compile_topology_num_slices=1"]
    train_compile.main([*arguments(what, sizes, per_chip), *line])
    memory = held["compiled"].memory_analysis()
    found = cost.cost(
        hlo.parse(held["compiled"].as_text()), Layout({"fsdp": chips}, [0] * chips), 1, 1
    )
    parts = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    return {
        "parameters": held["parameters"],
        "state": memory.argument_size_in_bytes,
        "bytes": sum(parts) + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "flops": found.flops * chips,
        "sent": found.sent(cost.ICI),
        "unknown": sorted(found.unknown),
    }


def loss(what: str, sizes: Sizes, file: str) -> float:
    """Return the loss of `pixels` and `labels`, or `ids`, of a file that also holds our parameters by name."""
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils

    p = dict(np.load(file))
    rows = len(p["ids" if what == "decoder" else "labels"])
    config = pyconfig.initialize([*arguments(what, sizes, rows), "attention=dot_product"])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    if what == "ViT":
        model = Classifier(config, mesh, sizes["classes"])
        _put(model, _vit(p, sizes))
        return float(model.loss(p["pixels"], p["labels"], jnp.float32))
    model = model_creation_utils.create_nnx_abstract_model(config, mesh)[0]()
    _put(model, _decoder(p))
    ids = p["ids"]
    tokens = np.pad(ids[:, :-1], ((0, 0), (1, 0)))  # a row 0 of the table stands for the beginning
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    ones = np.ones_like(ids)
    logits = model(
        decoder_input_tokens=tokens, decoder_positions=places, decoder_segment_ids=ones,
        enable_dropout=False, decoder_target_tokens=ids, decoder_target_mask=ones,
    )  # fmt: skip
    told = jax.nn.log_softmax(logits.astype(jnp.float32))
    return float(-jnp.take_along_axis(told, ids[..., None], axis=-1).mean())


def _put(model: Any, values: Mapping[str, Any]) -> None:
    """Replace every parameter by the one of its path."""
    state = nnx.state(model, nnx.Param)
    left = set(values)
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        assert leaf.get_value().shape == values[name].shape, (
            name,
            leaf.get_value().shape,
            values[name].shape,
        )
        leaf.set_value(jnp.asarray(values[name], leaf.get_value().dtype))
        left.remove(name)
    assert not left, left
    nnx.update(model, state)


def _decoder(p: Mapping[str, Any]) -> dict[str, Any]:
    """Return our parameters by MaxText's names; it has layers as a second axis."""
    trunk = "trunk/groups/0/blocks/0"
    table = p["stems/text/embedding"].copy()
    table[0] = p[f"heads/{TASK}/adapter/begin/text"]  # which no text has, here
    result = {
        "token_embedder/embedding": table,
        "decoder/decoder_norm/scale": p["trunk/norm/scale"],
        "decoder/logits_dense/kernel": p[f"heads/{TASK}/adapter/logits/text/kernel"],
    }
    for theirs, name in {
        "pre_self_attention_layer_norm/scale": "attention_norm/scale",
        "post_self_attention_layer_norm/scale": "mlp_norm/scale",
        "mlp/wi_0/kernel": "mlp/gate/kernel",
        "mlp/wi_1/kernel": "mlp/up/kernel",
        "mlp/wo/kernel": "mlp/down/kernel",
        **{f"self_attention/{n}/kernel": f"attention/{n}" for n in ("query", "key", "value", "out")},
    }.items():  # fmt: skip
        result[f"decoder/layers/{theirs}"] = np.moveaxis(p[f"{trunk}/{name}"], 0, 1)
    # MaxText divides the logits in the kernel, as it begins.
    size = p[f"{trunk}/attention/query"].shape[-1]
    result["decoder/layers/self_attention/query/kernel"] /= size**0.5
    return result


def _vit(p: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return our parameters, layers apart (see `vit.by_layer`), by MaxText's names; biases that ours lacks are 0."""
    width, patch = sizes["width"], sizes["patch"]
    heads = (sizes["num_heads"], width // sizes["num_heads"])
    result = {
        "encoder/embedding/kernel": p["stem"].reshape(patch, patch, 3, width),
        "encoder/embedding/bias": p["stem_bias"],
        "encoder/pos_embedding": p["positions"].reshape(1, -1, width),
        "encoder/Transformer/encoder_norm/scale": p["norm_scale"],
        "encoder/Transformer/encoder_norm/bias": p["norm_bias"],
        "classes/kernel": p["classes"],
        "classes/bias": p["classes_bias"],
    }
    for i in range(sizes["layers"]):
        where = f"encoder/Transformer/encoderblock_{i}"
        for index, name in enumerate(("attention_norm", "mlp_norm")):
            result[f"{where}/LayerNorm_{index}/scale"] = p[f"{i}/{name}"]
            result[f"{where}/LayerNorm_{index}/bias"] = p[f"{i}/{name}_bias"]
        for index, name in enumerate(("up", "down")):
            result[f"{where}/MlpBlockViT_0/Dense_{index}/kernel"] = p[f"{i}/{name}"]
            result[f"{where}/MlpBlockViT_0/Dense_{index}/bias"] = p[f"{i}/{name}_bias"]
        attention = f"{where}/MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value", "out"):
            result[f"{attention}/{name}/kernel"] = p[f"{i}/{name}"]
            result[f"{attention}/{name}/bias"] = np.zeros(width if name == "out" else heads)
    return result


def main() -> None:
    asked = json.load(sys.stdin)
    what, sizes = asked["what"], asked["sizes"]
    if "topology" in asked:
        answer: Any = planned(what, sizes, asked["topology"], asked["chips"], asked["per_chip"])
    else:
        answer = loss(what, sizes, asked["parameters"])
    print(json.dumps(answer), flush=True)
    os._exit(0)  # MaxText leaves threads behind


if __name__ == "__main__":
    main()

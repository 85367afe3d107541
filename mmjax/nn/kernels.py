"""Attention kernels of accelerators: what each can express, and how it is called.

A refusal is a function of (platform, queries, pairs) that returns why the kernel cannot do it, or an empty string.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash_kernel

from mmjax.core.sharding import partition
from mmjax.nn.masks import FULL, Causal, Mask, Pairs, Same, factors, has_key, is_static

LANES = 128  # of a TPU's vector unit: blocks are multiples of it
_BLOCK = 512  # of queries and of keys


def zero_without_key(y_BSHK: jax.Array, allowed: Any) -> jax.Array:
    """Return the attention's results with zeros, and no gradient, for the queries without an allowed key."""
    has_key_BS = has_key(allowed)
    return y_BSHK if has_key_BS is None else jnp.where(has_key_BS[..., None, None], y_BSHK, 0)


# --- splash attention (TPU) --------------------------------------------------------------------


def refuse_splash(platform: str, q_BSHK: jax.Array, pairs: Pairs) -> str:
    """Return why splash cannot take the mask: it knows static factors, and one `Same` and `valid` as segment ids."""
    if platform != "tpu":
        return f"it runs on TPUs, and this is compiled for {platform}"
    if q_BSHK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it does not take {q_BSHK.dtype}"
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1:
        return "the mesh shards the sequence"
    others = [m for m in _dynamic(pairs) if not (isinstance(m, Same) and m.beside is None)]
    if others:
        return f"it cannot express {others[0]} of what is known only when it runs"
    if len(_dynamic(pairs)) > 1:
        return "it takes one attribute that is known only when it runs"
    return ""


def splash(
    q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, pairs: Pairs, interpret: bool = False
) -> jax.Array:
    """Compute attention by JAX's splash kernel, per device: rows over the batch axes of the mesh, heads over `tensor`.

    Args:
      interpret: run it on any platform, slowly, to test its numerics.
    """
    s, t = q_BSHK.shape[1], k_BTHK.shape[1]
    sizes = -(-s // LANES) * LANES, -(-t // LANES) * LANES
    segments = _segments(pairs, q_BSHK.shape[0], (s, t), sizes)
    mask = _static_mask(pairs, (s, t), sizes)

    def of_device(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        many = splash_kernel.splash_attention_mask.MultiHeadMask([mask] * q.shape[1])
        kernel = splash_kernel.make_splash_mha(
            many, block_sizes=_blocks(*sizes), head_shards=1, q_seq_shards=1, interpret=interpret
        )
        ids = None if ids is None else splash_kernel.SegmentIds(*ids)
        out: jax.Array = jax.vmap(kernel)(q, k, v, segment_ids=ids)
        return out

    scale = q_BSHK.shape[-1] ** -0.5
    q, k, v = (
        jnp.pad(jnp.moveaxis(x, 1, 2), [(0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)])
        for x, size in ((q_BSHK * scale, sizes[0]), (k_BTHK, sizes[1]), (v_BTHK, sizes[1]))
    )
    y_BHSK = _per_device(of_device, q, k, v, segments)
    return zero_without_key(jnp.moveaxis(y_BHSK, 2, 1)[:, :s], pairs.allowed())


def _per_device(function: Any, q_BHSK: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> Any:
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(q_BHSK, k, v, ids)
    heads = partition(("batch", "heads", None, None), q_BHSK.shape, mesh)
    rows = partition(("batch", None), (q_BHSK.shape[0], 1), mesh)
    specs = (heads, heads, heads, jax.tree.map(lambda _: rows, ids))
    mapped = jax.shard_map(function, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(q_BHSK, k, v, ids)


def _blocks(s: int, t: int) -> splash_kernel.BlockSizes:
    q, k = (max(n for n in range(LANES, _BLOCK + 1, LANES) if size % n == 0) for size in (s, t))
    return splash_kernel.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k,
        block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip


def _dynamic(pairs: Pairs) -> list[Mask]:
    queries, keys = pairs.queries or {}, pairs.keys or {}
    return [m for m in factors(pairs.mask) if not is_static(m, queries, keys)]


def _static_mask(pairs: Pairs, lengths: tuple[int, int], sizes: tuple[int, int]) -> Any:
    """Return the statically known part of the mask over the padded lengths; padded keys are forbidden."""
    masks = splash_kernel.splash_attention_mask
    queries, keys = pairs.queries or {}, pairs.keys or {}
    static = [m for m in factors(pairs.mask) if is_static(m, queries, keys)]
    allowed = np.zeros(sizes, bool)
    allowed[: lengths[0], : lengths[1]] = True
    for factor in static:
        allowed[: lengths[0], : lengths[1]] &= factor.allows(queries, keys)[0]
    # A query without any key would divide by zero; `zero_without_key` replaces what it reads here.
    allowed[~allowed.any(axis=1), 0] = True
    if allowed.all():
        return masks.FullMask(sizes)
    if sizes[0] == sizes[1] and np.array_equal(allowed, np.tril(np.ones_like(allowed))):
        return masks.CausalMask(sizes)  # computed in the kernel, not read
    return masks.NumpyMask(allowed)


def _segments(pairs: Pairs, rows: int, lengths: tuple[int, int], sizes: tuple[int, int]) -> Any:
    """Return segment ids of queries and keys `[B, .]`; a query reads its own segment. None for one segment."""
    dynamic = _dynamic(pairs)
    if not dynamic and pairs.valid_BT is None:
        return None
    sides: list[Any] = []
    for attributes, length, size in zip((pairs.queries, pairs.keys), lengths, sizes, strict=True):
        if dynamic:
            assert isinstance(dynamic[0], Same) and attributes is not None
            ids = jnp.asarray(attributes[dynamic[0].attribute], jnp.int32)
        else:
            ids = jnp.zeros((1, length), jnp.int32)
        ids = jnp.broadcast_to(ids, (rows, length))
        sides.append(jnp.pad(ids, [(0, 0), (0, size - length)]))
    if pairs.valid_BT is not None:
        valid = jnp.pad(pairs.valid_BT, [(0, 0), (0, sizes[1] - lengths[1])])
        sides[1] = jnp.where(valid, sides[1], -1)
    return tuple(sides)


# --- cuDNN (GPU) -------------------------------------------------------------------------------


def refuse_cudnn(platform: str, q_BSHK: jax.Array, pairs: Pairs) -> str:
    """Return why cuDNN cannot take the mask: without a bias, as large as the logits, it knows full and causal."""
    if platform not in ("gpu", "cuda"):
        return f"it runs on NVIDIA GPUs, and this is compiled for {platform}"
    if not has_cudnn():
        return "this machine has no cuDNN, which JAX asks for its version"
    if q_BSHK.dtype not in (jnp.float16, jnp.bfloat16):
        return f"it does not take {q_BSHK.dtype}"
    if q_BSHK.shape[-1] % 8 or q_BSHK.shape[-1] > LANES:
        return f"it does not take heads of {q_BSHK.shape[-1]}"
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1:
        return "the mesh shards the sequence"
    if not pairs.is_static:
        return "it cannot express what is known only when it runs"
    if pairs.mask != FULL and not _is_causal(pairs):
        return f"it cannot express {pairs.mask}"
    return ""


def has_cudnn() -> bool:
    """Return whether JAX finds a cuDNN here; ask also when only compiling for a GPU elsewhere."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions is not None and bool(cuda_versions.cudnn_get_version())
    except (ImportError, AttributeError, RuntimeError):
        return False


def _is_causal(pairs: Pairs) -> bool:
    if pairs.mask != Causal() or pairs.queries is None or pairs.keys is None:
        return False
    sides = (pairs.queries["position"], pairs.keys["position"])
    return all(np.array_equal(x, np.arange(sides[0].shape[1])[None]) for x in sides)


def cudnn(q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, pairs: Pairs) -> jax.Array:
    """Compute attention by cuDNN's fused kernel; each query has a key under every mask that it takes."""
    return jax.nn.dot_product_attention(
        q_BSHK, k_BTHK, v_BTHK, is_causal=pairs.mask != FULL, implementation="cudnn"
    )


REFUSALS = {"splash": refuse_splash, "cudnn": refuse_cudnn}

"""Attention inside the texts of packed rows: one function, a kernel per platform of the mesh.

TPU: splash attention; CUDA: the Pallas flash attention; both come with jax, take segment ids, and keep no scores. They want
rows and heads of whole tiles; where a row is none, on a CPU and on a GPU before Ampere, scores are computed here: all at once up to BLOCK tokens,
above it for one block of queries at a time, computed again in the backward pass. So no [L, L] outlives a block.
"""

import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from moe_embed.model import capability

with warnings.catch_warnings():  # since jax 0.11 Pallas for Triton warns that it will go (CONTRIBUTING.md, Decisions)
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import attention as flash

BLOCK = 512  # queries whose scores are held at once
LANES = 128  # rows of the kernels are a multiple of this
KEPT = "product"  # the name of what a backward pass is not to compute again
MASKED = -1e30  # as a score: exp() of it is 0 in float32


def attend(q_BLHK: jax.Array, k_BJHK: jax.Array, v_BJHK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys of each query's own segment: mixed_BLHK in the dtype of q.

    Padding, segment 0, attends to padding: finite, and read by nobody. Softmax in float32.
    """
    length, head_dim = q_BLHK.shape[1], q_BLHK.shape[3]
    if length % LANES or head_dim % 64:
        return in_blocks(q_BLHK, k_BJHK, v_BJHK, segments_BL)
    cuda = capability.choose(on_gpu, otherwise=in_blocks)
    return lax.platform_dependent(q_BLHK, k_BJHK, v_BJHK, segments_BL, tpu=on_tpu, cuda=cuda, default=in_blocks)


def in_blocks(q_BLHK, k_BJHK, v_BJHK, segments_BL) -> jax.Array:
    """`attend` in plain jax, for any shape."""
    length, head_dim = q_BLHK.shape[1], q_BLHK.shape[3]
    scale = head_dim**-0.5

    def block(q_BLHK, segments_BL, k_BJHK, v_BJHK, segments_BJ):
        scores_BHLJ = jnp.einsum("BLHK,BJHK->BHLJ", q_BLHK, k_BJHK, preferred_element_type=jnp.float32)
        same_BLJ = segments_BL[:, :, None] == segments_BJ[:, None, :]
        scores_BHLJ = jnp.where(same_BLJ[:, None], scores_BHLJ * scale, MASKED)
        weights_BHLJ = jax.nn.softmax(scores_BHLJ, axis=-1).astype(q_BLHK.dtype)
        return checkpoint_name(jnp.einsum("BHLJ,BJHK->BLHK", weights_BHLJ, v_BJHK), KEPT)

    size = next((size for size in range(BLOCK, 0, -1) if length % size == 0), length) if length > BLOCK else length
    if size == length:
        return block(q_BLHK, segments_BL, k_BJHK, v_BJHK, segments_BL)
    cut = lambda x: jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)  # noqa: E731 - blocks first
    one = jax.checkpoint(lambda part: block(*part, k_BJHK, v_BJHK, segments_BL))
    mixed = lax.map(one, (cut(q_BLHK), cut(segments_BL)))
    return jnp.moveaxis(mixed, 0, 1).reshape(q_BLHK.shape)


def on_tpu(q_BLHK, k_BJHK, v_BJHK, segments_BL, *, interpret: bool = False) -> jax.Array:
    """`attend` by splash attention. Pinned blocks; the backward kernel computes dq, dk and dv in one pass."""
    length, heads, head_dim = q_BLHK.shape[1:]
    kernel = _splash(length, heads, interpret)
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    of_row = lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids))  # noqa: E731
    scaled = (q_BLHK * head_dim**-0.5).astype(q_BLHK.dtype)  # the kernel has no scale
    mixed_BHLK = jax.vmap(of_row)(heads_first(scaled), heads_first(k_BJHK), heads_first(v_BJHK), segments_BL)
    return heads_first(mixed_BHLK).astype(q_BLHK.dtype)


def _splash(length: int, heads: int, interpret: bool):
    block = next(size for size in (512, 384, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
                              use_fused_bwd_kernel=True)  # fmt: skip
    mask = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=KEPT, interpret=interpret
    )


def on_gpu(q_BLHK, k_BJHK, v_BJHK, segments_BL, *, interpret: bool = False) -> jax.Array:
    """`attend` by the Pallas-Triton flash attention, forwards and backwards."""
    # Compiled for an H100: larger blocks of float32 spill registers, smaller ones of bfloat16 miss its wide products.
    block = (32,) * 6 if q_BLHK.dtype == jnp.float32 else (128, 64, 64, 64, 64, 64)
    sizes = flash.BlockSizes(*block)
    scale = q_BLHK.shape[-1] ** -0.5
    return flash.mha(q_BLHK, k_BJHK, v_BJHK, segments_BL, sm_scale=scale, block_sizes=sizes, interpret=interpret)

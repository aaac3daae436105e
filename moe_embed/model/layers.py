"""The dense parts of the encoder: embedding, norm, rotary attention over packed rows, MLP, pooling.

Rows are packed: `segments_BL` numbers the texts of a row from 1, 0 is padding; positions restart at each text and
attention stays inside one. Parameters are float32; products run in the dtype of the activation they meet.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_embed import config as config_lib
from moe_embed.model import attention


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], *, fan_in: int) -> nnx.Param:
    """A weight drawn from N(0, 1 / fan_in): unit variance in, unit variance out, at any width."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def product(dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """An einsum whose result is kept for the backward pass where other results are computed again (encoder.apply)."""
    return checkpoint_name(jnp.einsum(dims, x, w), attention.KEPT)


def standardise(x: jax.Array, *, epsilon: float) -> jax.Array:
    """Mean 0 and variance 1 along the last dim."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)


class Norm(nnx.Module):
    """LayerNorm in float32."""

    def __init__(self, dim: int, *, epsilon: float):
        self.scale_D = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias_D = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x = standardise(x_BLD.astype(jnp.float32), epsilon=self.epsilon)
        return (x * self.scale_D[...] + self.bias_D[...]).astype(x_BLD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(dtype: str, word_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """x_BLD float32: the tokens' rows, rounded to `dtype`, so that half the table travels and is read.

    Its gradient is summed in float32: some pieces are in every text.
    """
    return word_VD.astype(dtype)[tokens_BL].astype(jnp.float32)


look_up.defvjp(
    lambda dtype, word_VD, tokens_BL: (look_up(dtype, word_VD, tokens_BL), (word_VD, tokens_BL)),
    lambda dtype, kept, dx_BLD: (jnp.zeros_like(kept[0]).at[kept[1]].add(dx_BLD), None),
)


class Embedding(nnx.Module):
    """Piece plus token type 0, plus the position where positions are learned, normalised; rotary ones enter in the attention."""

    def __init__(self, c: config_lib.Encoder, *, rngs: nnx.Rngs):
        self.word_VD = nnx.Param(jax.random.normal(rngs.params(), (c.vocab_size, c.dim), jnp.float32) * 0.02)
        self.type_YD = nnx.Param(jnp.zeros((c.num_token_types, c.dim), jnp.float32))
        if c.position == "learned":
            self.position_PD = nnx.Param(jax.random.normal(rngs.params(), (c.num_positions, c.dim), jnp.float32) * 0.02)
            self.position_offset = c.position_offset
        self.norm = Norm(c.dim, epsilon=c.norm_epsilon)
        self.dtype = c.dtype

    def __call__(self, tokens_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        x_BLD = look_up(self.dtype, self.word_VD[...], tokens_BL) + self.type_YD[...][0]
        if hasattr(self, "position_PD"):
            x_BLD += self.position_PD[...][positions_BL + self.position_offset]
        return self.norm(x_BLD).astype(self.dtype)


def rotary_angles(positions_BL: jax.Array, *, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, L, 1, K/2] of position * base^(-2i/K) (RoFormer, arXiv 2104.09864)."""
    inverse = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BL[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + K/2) of each head: the half-split layout of the released weights, not the interleaved."""
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)


class Attention(nnx.Module):
    """Bidirectional self-attention inside each segment; fused q, k, v with biases."""

    def __init__(self, c: config_lib.Encoder, *, rngs: nnx.Rngs):
        head_dim = c.dim // c.num_heads
        self.w_qkv_DGHK = matrix(rngs, (c.dim, 3, c.num_heads, head_dim), fan_in=c.dim)
        self.b_qkv_GHK = nnx.Param(jnp.zeros((3, c.num_heads, head_dim), jnp.float32))
        self.w_out_HKD = matrix(rngs, (c.num_heads, head_dim, c.dim), fan_in=c.dim)
        self.b_out_D = nnx.Param(jnp.zeros(c.dim, jnp.float32))

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array, angles) -> jax.Array:
        """`angles` are rotary_angles' cos and sin, or None where positions are learned."""
        dtype = x_BLD.dtype
        qkv_GBLHK = product("BLD,DGHK->GBLHK", x_BLD, self.w_qkv_DGHK[...].astype(dtype))
        q_BLHK, k_BJHK, v_BJHK = qkv_GBLHK + self.b_qkv_GHK[...].astype(dtype)[:, None, None]
        if angles is not None:
            q_BLHK, k_BJHK = rotate(q_BLHK, *angles), rotate(k_BJHK, *angles)
        mixed_BLHK = attention.attend(q_BLHK, k_BJHK, v_BJHK, segments_BL)
        out_BLD = product("BLHK,HKD->BLD", mixed_BLHK, self.w_out_HKD[...].astype(dtype))
        return out_BLD + self.b_out_D[...].astype(dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) with the exact erf, as the released weights were trained with (arXiv 1606.08415).

    The derivative is spelled out because jax 0.12 refuses its own, of erf, inside shard_map; it also shares the erf.
    """
    return x * (1 + jax.lax.erf(x * 2**-0.5)) / 2


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    phi = (1 + jax.lax.erf(x * 2**-0.5)) / 2
    density = jnp.exp(-x * x / 2) * (2 * math.pi) ** -0.5
    return x * phi, (phi + x * density) * dx


class Mlp(nnx.Module):
    """up, GELU, down."""

    def __init__(self, c: config_lib.Encoder, *, rngs: nnx.Rngs):
        self.w_up_DF = matrix(rngs, (c.dim, c.ffn_dim), fan_in=c.dim)
        self.b_up_F = nnx.Param(jnp.zeros(c.ffn_dim, jnp.float32))
        self.w_down_FD = matrix(rngs, (c.ffn_dim, c.dim), fan_in=c.ffn_dim)
        self.b_down_D = nnx.Param(jnp.zeros(c.dim, jnp.float32))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dtype = x_BLD.dtype
        up_BLF = product("BLD,DF->BLF", x_BLD, self.w_up_DF[...].astype(dtype)) + self.b_up_F[...].astype(dtype)
        up_BLF = gelu(up_BLF)
        down_BLD = product("BLF,FD->BLD", up_BLF, self.w_down_FD[...].astype(dtype))
        return down_BLD + self.b_down_D[...].astype(dtype)


def mean_pool(hidden_BLD: jax.Array, segments_BL: jax.Array, *, num_segments: int) -> jax.Array:
    """Mean over each text's tokens, prompt and special tokens included -> [B, S, D] float32; empty slots are zero."""
    member_BLS = segments_BL[..., None] == jnp.arange(1, num_segments + 1)
    sum_BSD = jnp.einsum("BLS,BLD->BSD", member_BLS.astype(jnp.float32), hidden_BLD.astype(jnp.float32),
                         precision=jax.lax.Precision.HIGHEST)  # fmt: skip
    return sum_BSD / jnp.maximum(member_BLS.sum(1), 1)[..., None]

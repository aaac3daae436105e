"""The encoder: embedding, then a unit of layers scanned over its repeats. Pure `init` and `apply` over named arrays.

A unit is `moe.every` blocks, the last of which is a mixture (or one dense block). NNX modules end at this file's two
functions: outside of it the parameters are a plain nested dict whose names carry the dims, R for the repeats first.
"""

import functools

import jax
from flax import nnx

from moe_embed import config as config_lib
from moe_embed.model import attention, layers, mlm_head
from moe_embed.model import moe as moe_lib


class Block(nnx.Module):
    """Post-LN: h = norm1(x + attention(x)), y = norm2(h + mlp(h)) (BERT, arXiv 1810.04805; Nomic Embed v2, arXiv 2502.07972)."""

    def __init__(self, c: config_lib.Encoder, moe: config_lib.Moe | None, *, rngs: nnx.Rngs):
        self.attention = layers.Attention(c, rngs=rngs)
        self.norm1 = layers.Norm(c.dim, epsilon=c.norm_epsilon)
        self.norm2 = layers.Norm(c.dim, epsilon=c.norm_epsilon)
        if moe is None:
            self.mlp = layers.Mlp(c, rngs=rngs)
        else:
            self.moe = moe_lib.Moe(c, moe, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array, angles):
        """Returns y_BLD and the router's sums, None in a dense block."""
        h_BLD = self.norm1(x_BLD + self.attention(x_BLD, segments_BL, angles))
        if hasattr(self, "moe"):
            y_BLD, sums = self.moe(h_BLD, segments_BL)
        else:
            y_BLD, sums = self.mlp(h_BLD), None
        return self.norm2(h_BLD + y_BLD), sums


class Unit(nnx.Module):
    """The blocks that repeat; the names "0", "1", ... are their places."""

    def __init__(self, c: config_lib.Encoder, moe: config_lib.Moe, *, rngs: nnx.Rngs):
        self.num_blocks = moe.unit_length
        for i in range(self.num_blocks):
            is_mixture = moe.num_experts > 0 and i == self.num_blocks - 1
            setattr(self, str(i), Block(c, moe if is_mixture else None, rngs=rngs))

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array, angles):
        sums = None
        for i in range(self.num_blocks):
            x_BLD, sums = getattr(self, str(i))(x_BLD, segments_BL, angles)
        return x_BLD, sums


class Encoder(nnx.Module):
    """Tokens to hidden states; `unit` holds the parameters of all repeats, stacked on a first dim R."""

    def __init__(self, c: config_lib.Encoder, moe: config_lib.Moe, *, rngs: nnx.Rngs):
        self.c = c
        self.embedding = layers.Embedding(c, rngs=rngs)
        repeats = c.num_layers // moe.unit_length

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_units(rngs: nnx.Rngs) -> Unit:
            return Unit(c, moe, rngs=rngs)

        self.unit = make_units(rngs)

    def __call__(
        self, tokens_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, *, recompute: bool = False
    ):
        angles = None
        if self.c.position == "rotary":
            head_dim = self.c.dim // self.c.num_heads
            angles = layers.rotary_angles(positions_BL, head_dim=head_dim, base=self.c.rotary_base)
        unit_graph, unit_state = nnx.split(self.unit)

        def one_unit(x_BLD, state):
            return nnx.merge(unit_graph, state)(x_BLD, segments_BL, angles)

        if recompute:
            policy = jax.checkpoint_policies.save_only_these_names(attention.KEPT)
            one_unit = jax.checkpoint(one_unit, policy=policy, prevent_cse=False)  # a scan's body is apart anyway
        return jax.lax.scan(one_unit, self.embedding(tokens_BL, positions_BL), unit_state)


@functools.cache
def _abstract(c: config_lib.Encoder, moe: config_lib.Moe):
    """The module's graph and its abstract state; nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(c, moe, rngs=nnx.Rngs(0))))


def init(c: config_lib.Encoder, moe: config_lib.Moe, *, key: jax.Array, with_head: bool = False) -> dict:
    """Fresh float32 parameters: a nested dict whose last names carry the dims (`unit/1/moe/w_up_REDF`).

    `with_head` adds `head`, that of masked language modelling (mlm_head.py).
    """
    state = nnx.state(Encoder(c, moe, rngs=nnx.Rngs(params=key)))
    params = _rename(nnx.to_pure_dict(state), stacked=False, rename=_with_repeats)
    return params | {"head": mlm_head.init(c, key=jax.random.fold_in(key, 1))} if with_head else params


def apply(
    params: dict,
    tokens_BL,
    segments_BL,
    positions_BL,
    *,
    c: config_lib.Encoder,
    moe: config_lib.Moe,
    recompute: bool = False,
):
    """Run the encoder.

    Args:
      params: nested dict of named arrays, as `init` returns them; a `head` has no part in this.
      tokens_BL: int32 ids. segments_BL: int32, texts of a row numbered from 1, 0 is padding. positions_BL: int32,
        counted from 0 in each text.
      recompute: keep of each layer the results of its products alone for the backward pass, which computes norms, GELU,
        rotations and what attention holds again.

    Returns:
      hidden_BLD in c.dtype, and moe.RouterSums of [R, E] (None for a dense encoder).
    """
    graph, state = _abstract(c, moe)
    state = nnx.merge_state(state)  # a copy: replace_by_pure_dict writes into it
    params = {name: value for name, value in params.items() if name != "head"}
    nnx.replace_by_pure_dict(state, _rename(params, stacked=False, rename=_without_repeats))
    return nnx.merge(graph, state)(tokens_BL, segments_BL, positions_BL, recompute=recompute)


def _rename(tree: dict, *, stacked: bool, rename) -> dict:
    return {
        (name if isinstance(value, dict) else rename(name, stacked)): (
            _rename(value, stacked=stacked or name == "unit", rename=rename) if isinstance(value, dict) else value
        )
        for name, value in tree.items()
    }


def _with_repeats(name: str, stacked: bool) -> str:
    head, _, dims = name.rpartition("_")
    return f"{head}_R{dims}" if stacked else name


def _without_repeats(name: str, stacked: bool) -> str:
    head, _, dims = name.rpartition("_")
    return f"{head}_{dims.removeprefix('R')}" if stacked else name

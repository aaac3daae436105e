"""The encoder: embedding, then a unit of layers scanned over its repeats. Pure `init` and `apply` over named arrays.

A unit is `moe.every` blocks, the last of which is a mixture (or one dense block). NNX modules end at this file's
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


@functools.cache
def _graph(make, *arguments):
    """A module's graph and its abstract state; nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: make(*arguments, rngs=nnx.Rngs(0))))


def _merge(params: dict, make, *arguments) -> nnx.Module:
    """The module with these arrays in it; their shapes may be others than those it would draw."""
    graph, state = _graph(make, *arguments)
    state = nnx.merge_state(state)  # a copy: replace_by_pure_dict writes into it
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def init(c: config_lib.Encoder, moe: config_lib.Moe, *, key: jax.Array, with_head: bool = False) -> dict:
    """Fresh float32 parameters: a nested dict whose last names carry the dims (`unit/1/moe/w_up_REDF`).

    `with_head` adds `head`, that of masked language modelling (mlm_head.py).
    """
    rngs = nnx.Rngs(params=key)
    embedding = layers.Embedding(c, rngs=rngs)

    @nnx.split_rngs(splits=c.num_layers // moe.unit_length)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_units(rngs: nnx.Rngs) -> Unit:
        return Unit(c, moe, rngs=rngs)

    draw = lambda module: nnx.to_pure_dict(nnx.state(module))  # noqa: E731
    params = {"embedding": draw(embedding), "unit": _rename(draw(make_units(rngs)), lambda dims: f"R{dims}")}
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
    x_BLD, angles = enter(params["embedding"], tokens_BL, positions_BL, c=c)
    one_unit = lambda x_BLD, unit: run_unit(unit, x_BLD, segments_BL, angles, c=c, moe=moe)  # noqa: E731
    if recompute:
        policy = jax.checkpoint_policies.save_only_these_names(attention.KEPT)
        one_unit = jax.checkpoint(one_unit, policy=policy, prevent_cse=False)  # a scan's body is apart anyway
    return jax.lax.scan(one_unit, x_BLD, _without_r(params["unit"]))


def enter(embedding: dict, tokens_BL, positions_BL, *, c: config_lib.Encoder):
    """What the first unit takes: x_BLD in c.dtype, and the rotary angles (None where positions are learned)."""
    x_BLD = _merge(embedding, layers.Embedding, c)(tokens_BL, positions_BL)
    if c.position != "rotary":
        return x_BLD, None
    return x_BLD, layers.rotary_angles(positions_BL, head_dim=c.dim // c.num_heads, base=c.rotary_base)


def run_unit(unit: dict, x_BLD, segments_BL, angles, *, c: config_lib.Encoder, moe: config_lib.Moe):
    """One repeat's blocks, `unit` as `one_of` names it: y_BLD, and moe.RouterSums of [E] (None for a dense encoder)."""
    return _merge(unit, Unit, c, moe)(x_BLD, segments_BL, angles)


def one_of(unit: dict, r: int) -> dict:
    """The arrays of repeat `r`, as `run_unit` takes them: w_up_REDF -> w_up_EDF."""
    return _without_r(jax.tree.map(lambda x: x[r], unit))


def _without_r(unit: dict) -> dict:
    return _rename(unit, lambda dims: dims.removeprefix("R"))


def _rename(tree: dict, of_dims) -> dict:
    """Other dims at the end of each array's name."""

    def name(key: str) -> str:
        head, _, dims = key.rpartition("_")
        return f"{head}_{of_dims(dims)}"

    return {name(k) if not isinstance(v, dict) else k: _rename(v, of_dims) if isinstance(v, dict) else v
            for k, v in tree.items()}  # fmt: skip

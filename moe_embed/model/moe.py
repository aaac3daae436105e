"""A dropless mixture-of-experts MLP: route, sort by expert, grouped matmuls, combine.

The maths is Nomic Embed v2's (arXiv 2502.07972): softmax over all experts in float32, then top-k, weights used as they
are; no biases inside the experts, one shared bias after the sum. Padding is routed nowhere. With experts split over the
mesh, tokens travel: gather over the expert axis, local experts, reduce-scatter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.model import attention, layers
from moe_embed.model import grouped_matmul as gm


class RouterSums(NamedTuple):
    """Balance statistics as sums over real tokens, so that they add up over micro-batches and devices."""

    choices_E: jax.Array  # float32: how often each expert was chosen
    probability_E: jax.Array  # float32: its router probability, summed


class Dispatch(NamedTuple):
    """Where each token's choices stand among the rows grouped by expert. A choice is t * A + a, flat."""

    choice_X: jax.Array  # int32: the choice in each row, T * A in an empty row
    row_TA: jax.Array  # int32: the row of each choice, X for a choice that is computed nowhere here
    tile_expert: jax.Array  # int32, one for each tile of rows
    num_tiles: jax.Array  # int32 []


def route(x_TD: jax.Array, real_T: jax.Array, w_router_ED: jax.Array, *, top_k: int):
    """Choose experts for each token.

    Returns:
      expert_TA int32 (ties to the lowest index; num_experts for padding), weight_TA float32, RouterSums.
    """
    logits_TE = jnp.einsum("TD,ED->TE", x_TD.astype(jnp.float32), w_router_ED, precision=jax.lax.Precision.HIGHEST)
    probability_TE = jax.nn.softmax(logits_TE, axis=-1)
    weight_TA, expert_TA = jax.lax.top_k(probability_TE, top_k)
    num_experts = w_router_ED.shape[0]
    expert_TA = jnp.where(real_T[:, None], expert_TA, num_experts)
    chosen_TE = (expert_TA[..., None] == jnp.arange(num_experts)).sum(1)
    sums = RouterSums(chosen_TE.sum(0).astype(jnp.float32), (probability_TE * real_T[:, None]).sum(0))
    return expert_TA, weight_TA, sums


def plan_dispatch(expert_TA: jax.Array, *, num_experts: int) -> Dispatch:
    """Group choices by expert, stably, each group starting on a tile; experts outside [0, num_experts) get no rows."""
    flat = jnp.where((expert_TA >= 0) & (expert_TA < num_experts), expert_TA, num_experts).reshape(-1)
    num_choices, rows = flat.shape[0], gm.num_rows(flat.shape[0], num_experts=num_experts)
    tile = gm.tile_rows(num_choices, num_experts=num_experts)
    order = jnp.argsort(flat, stable=True)
    count_E = (flat[:, None] == jnp.arange(num_experts)).sum(0)
    tiles_E = -(-count_E // tile)
    tile_end_E = jnp.cumsum(tiles_E)
    row_start_E = (tile_end_E - tiles_E) * tile
    sorted_start_E = jnp.cumsum(count_E) - count_E

    tile_expert = jnp.searchsorted(tile_end_E, jnp.arange(rows // tile), side="right")
    tile_expert = jnp.minimum(tile_expert, num_experts - 1)
    expert_X = jnp.repeat(tile_expert, tile)
    rank_X = jnp.arange(rows) - row_start_E[expert_X]
    sorted_X = jnp.clip(sorted_start_E[expert_X] + rank_X, 0, num_choices - 1)
    choice_X = jnp.where(rank_X < count_E[expert_X], order[sorted_X], num_choices)

    sorted_expert = flat[order]
    shift_E = jnp.append(row_start_E - sorted_start_E, 0)
    row = jnp.where(sorted_expert < num_experts, jnp.arange(num_choices) + shift_E[sorted_expert], rows)
    row_TA = jnp.zeros(num_choices, row.dtype).at[order].set(row, unique_indices=True).reshape(expert_TA.shape)
    return Dispatch(choice_X, row_TA, tile_expert, tile_end_E[-1])


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], zero where the index is one past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


# The two permutations are each other's transposes. Written as gathers both ways: a gather's own transpose is a
# scatter-add, serial on CPU, and of no fixed order on GPU.


@jax.custom_vjp
def to_rows(x_TD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Copy each token to the rows of its choices: x_XD."""
    return _rows(x_TD, dispatch.choice_X // dispatch.row_TA.shape[1])


def _to_rows_backward(dispatch: Dispatch, dx_XD: jax.Array):
    return _rows(dx_XD, dispatch.row_TA).sum(1), None


to_rows.defvjp(lambda x_TD, dispatch: (to_rows(x_TD, dispatch), dispatch), _to_rows_backward)


@jax.custom_vjp
def from_rows(y_XD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Collect each token's results: y_TAD, zero for choices computed nowhere here."""
    return _rows(y_XD, dispatch.row_TA)


def _from_rows_backward(dispatch: Dispatch, dy_TAD: jax.Array):
    return _rows(dy_TAD.reshape(-1, dy_TAD.shape[-1]), dispatch.choice_X), None


from_rows.defvjp(lambda y_XD, dispatch: (from_rows(y_XD, dispatch), dispatch), _from_rows_backward)


class Moe(nnx.Module):
    """`num_experts` MLPs of which each token visits `top_k`."""

    def __init__(self, c: config_lib.Encoder, moe: config_lib.Moe, *, rngs: nnx.Rngs):
        self.w_router_ED = layers.matrix(rngs, (moe.num_experts, c.dim), fan_in=c.dim)
        self.w_up_EDF = layers.matrix(rngs, (moe.num_experts, c.dim, c.ffn_dim), fan_in=c.dim)
        self.w_down_EFD = layers.matrix(rngs, (moe.num_experts, c.ffn_dim, c.dim), fan_in=c.ffn_dim)
        self.b_out_D = nnx.Param(jnp.zeros(c.dim, jnp.float32))
        self.top_k = moe.top_k

    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> tuple[jax.Array, RouterSums]:
        dtype = x_BLD.dtype
        keep = lambda tree: jax.tree.map(lambda x: checkpoint_name(x, attention.KEPT), tree)  # noqa: E731
        x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), segments_BL.reshape(-1) > 0
        w_router_ED = sharding.gather(self.w_router_ED[...], "E")  # every token is scored against all experts
        expert_TA, weight_TA, sums = route(x_TD, real_T, w_router_ED, top_k=self.top_k)
        w_up_EDF, w_down_EFD = self.w_up_EDF[...].astype(dtype), self.w_down_EFD[...].astype(dtype)

        num_local = w_up_EDF.shape[0]  # inside shard_map this device holds its part of the experts, and runs those
        x_TD, expert_TA, weight_TA = (sharding.gather(x, "E") for x in (x_TD, expert_TA, weight_TA))
        dispatch = keep(plan_dispatch(expert_TA - sharding.index("E") * num_local, num_experts=num_local))
        with jax.named_scope("grouped_matmul"):  # by this name hlo_count's caller knows its loops
            up_XF = gm.grouped_matmul(to_rows(x_TD, dispatch), w_up_EDF, dispatch.tile_expert, dispatch.num_tiles)
            up_XF = layers.gelu(keep(up_XF))
            down_XD = keep(gm.grouped_matmul(up_XF, w_down_EFD, dispatch.tile_expert, dispatch.num_tiles))
        y_TD = (from_rows(down_XD, dispatch) * weight_TA[..., None].astype(dtype)).sum(1)
        y_TD = sharding.scatter(y_TD, "E")
        return y_TD.reshape(x_BLD.shape) + self.b_out_D[...].astype(dtype), sums

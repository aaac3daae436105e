"""What is optimised: (params, batch) -> (loss, metrics). Runs inside program's shard_map, on this device's rows.

Encoding is a scan over micro-batches. With `run.recompute` each is under jax.checkpoint, which is GradCache (arXiv
2101.06983) without its machinery: the backward pass encodes again, one micro-batch at a time, the loss saw all texts.
"""

import jax
import jax.numpy as jnp

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.infonce import infonce
from moe_embed.model import encoder, layers
from moe_embed.model.moe import RouterSums

ROWS = ("tokens_MBL", "segments_MBL", "positions_MBL")


def encode(
    params: dict, batch: dict, *, c: config_lib.Encoder, moe: config_lib.Moe, num_segments: int, recompute: bool
):
    """Packed rows -> one float32 vector a text, not normalised.

    Returns:
      pooled_MBSD, RouterSums of [R, E] over all micro-batches of this device (None for a dense encoder), and how many
      real tokens those had, float32 [] (counted in the loop: a collective of it then comes after the encoder's own).
    """

    def micro_batch(params, rows):
        tokens_BL, segments_BL, positions_BL = rows
        hidden_BLD, sums = encoder.apply(params, tokens_BL, segments_BL, positions_BL, c=c, moe=moe)
        num_tokens = (segments_BL > 0).sum().astype(jnp.float32)
        return layers.mean_pool(hidden_BLD, segments_BL, num_segments=num_segments), sums, num_tokens

    if recompute:
        micro_batch = jax.checkpoint(micro_batch)
    rows = tuple(batch[name] for name in ROWS)
    _, (pooled_MBSD, *counted) = jax.lax.scan(lambda _, rows: (None, micro_batch(params, rows)), None, rows)
    return pooled_MBSD, *jax.tree.map(lambda x: x.sum(0), counted)


def normalise(x: jax.Array) -> jax.Array:
    """Unit norm along the last dim, float32; a zero vector stays zero."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def balance_loss(sums: RouterSums, *, num_tokens: jax.Array, top_k: int) -> jax.Array:
    """E * sum_e f_e p_e, mean over mixture layers: 1 when balanced (Switch, arXiv 2101.03961 eq. 4, for top-k).

    f_e is the share of the choices that went to expert e, p_e its mean probability. `sums` [R, E] and `num_tokens` are
    global, over real tokens: the product is taken after all sums, so it does not depend on how the batch was cut.
    """
    share_RE = sums.choices_E / (num_tokens * top_k)
    probability_RE = sums.probability_E / num_tokens
    return (share_RE.shape[-1] * share_RE * probability_RE).sum(-1).mean()


def contrastive(params: dict, batch: dict, *, config: config_lib.Config):
    """InfoNCE plus the router's balance loss, both of the global batch.

    Args:
      batch: tokens_MBL, segments_MBL, positions_MBL; query_slot_N and document_slot_N, the place of each text among
        this device's M * B * S pooled vectors; document_id_N (infonce.py).

    Returns:
      loss [], metrics: float32 scalars, and `router_load_RE`, each expert's share of the choices times E.
    """
    pooled_MBSD, sums, num_tokens = encode(params, batch, c=config.encoder, moe=config.moe,
                               num_segments=config.data.texts_per_row, recompute=config.run.recompute)  # fmt: skip
    embedding = normalise(pooled_MBSD.reshape(-1, pooled_MBSD.shape[-1]))
    loss, metrics = infonce(
        embedding[batch["query_slot_N"]],
        embedding[batch["document_slot_N"]],
        batch["document_id_N"],
        temperature=config.loss.temperature,
        bidirectional=config.loss.bidirectional,
        mask_duplicates=config.loss.mask_duplicates,
    )
    metrics["contrastive_loss"] = loss
    metrics["tokens"] = num_tokens = sharding.reduce(num_tokens, "B")
    if sums is not None:
        sums = sharding.reduce(sums, "B")
        balance = balance_loss(sums, num_tokens=num_tokens, top_k=config.moe.top_k)
        loss = loss + config.loss.balance_coefficient * balance
        metrics["balance_loss"] = balance
        metrics["router_load_RE"] = sums.choices_E * config.moe.num_experts / (num_tokens * config.moe.top_k)
    return loss, metrics

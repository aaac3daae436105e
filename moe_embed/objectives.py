"""What is optimised: (params, batch) -> (loss, metrics). Runs inside program's shard_map, on this device's rows.

Encoding is a scan over micro-batches. With `run.recompute` each is under jax.checkpoint, which is GradCache (arXiv
2101.06983) without its machinery: the backward pass encodes again, one micro-batch at a time, the loss saw all texts. Of the
micro-batch in hand it keeps the results of products, and computes once more what lies between them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.infonce import Ids, Teacher, infonce
from moe_embed.model import encoder, layers, mlm_head
from moe_embed.model.moe import RouterSums
from moe_embed.ring_infonce import ring_infonce

SCORES = (
    1 << 28
)  # bytes of scores and their gradient; a device that would hold more computes the loss in tiles, as a ring
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
        hidden_BLD, sums = encoder.apply(params, *rows, c=c, moe=moe, recompute=recompute)
        segments_BL = rows[1]
        num_tokens = (segments_BL > 0).sum().astype(jnp.float32)
        return layers.mean_pool(hidden_BLD, segments_BL, num_segments=num_segments), sums, num_tokens

    if recompute:
        micro_batch = jax.checkpoint(micro_batch)
    rows = tuple(batch[name] for name in ROWS)
    _, (pooled_MBSD, *counted) = jax.lax.scan(lambda _, rows: (None, micro_batch(params, rows)), None, rows)
    return pooled_MBSD, *jax.tree.map(lambda x: x.sum(0), counted)


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
        this device's M * B * S pooled vectors; document_id_N and query_id_N (infonce.Ids); with config.loss.distill also
        teacher_score_N, or teacher_query_ND and teacher_document_ND (infonce.Teacher).

    Returns:
      loss [], metrics: float32 scalars, and `router_load_RE`, each expert's share of the choices times E.
    """
    pooled_MBSD, sums, num_tokens = encode(params, batch, c=config.encoder, moe=config.moe,
                               num_segments=config.data.texts_per_row, recompute=config.run.recompute)  # fmt: skip
    pooled_ND, in_tiles = pooled_MBSD.reshape(-1, pooled_MBSD.shape[-1]), config.loss.form == "ring"
    if in_tiles:  # they travel, and are multiplied, in what the encoder computes in
        pooled_ND = pooled_ND.astype(config.encoder.dtype)
    teacher = {name.removeprefix("teacher_"): value for name, value in batch.items() if name.startswith("teacher_")}
    loss, metrics = (ring_infonce if in_tiles else infonce)(
        pooled_ND[batch["query_slot_N"]],
        pooled_ND[batch["document_slot_N"]],
        Ids(batch["document_id_N"], batch["query_id_N"]),
        c=config.loss,
        teacher=Teacher(**teacher),
    )
    return _with_balance(loss, metrics, sums, num_tokens, config)


def score_bytes(num_queries: int, num_documents: int, *, c: config_lib.Loss) -> int:
    """What a device holds of the gathered loss: float32 scores of its queries and all documents, a prefix each, and their gradient."""
    return 8 * num_queries * num_documents * (1 + len(c.dims))


def with_form(config: config_lib.Config, *, num_devices: int) -> config_lib.Config:
    """`config` with its `loss.form` decided. Distillation compares whole rows of scores: the ring has none."""
    if config.loss.form != "auto":
        return config
    tiled = config.loss.objective == "contrastive" and not config.loss.distill
    pairs = config.data.batch_size
    held = score_bytes(pairs // num_devices, pairs * (1 + config.data.num_negatives), c=config.loss)
    tiled = tiled and held > SCORES
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, form="ring" if tiled else "gathered"))


def mlm(params: dict, batch: dict, *, config: config_lib.Config, num_ids: int | None = None):
    """Masked language modelling (arXiv 1810.04805): cross-entropy of the true piece at the masked places, global mean.

    The tied head, most of a small encoder's FLOPs at a large vocabulary, is computed at those places only.

    Args:
      batch: tokens_MBL (masked), segments_MBL, positions_MBL; place_MBZ, the masked places of each row, and target_MBZ,
        the pieces that stood there, -1 where a row has fewer.
      num_ids: rows of the embedding table that are pieces; what follows pads the table. None: all of them.

    Returns:
      loss [], metrics: float32 scalars (accuracy: how often the true piece scores highest), and `router_load_RE`.
    """
    c = config.encoder
    num_ids = c.vocab_size if num_ids is None else num_ids

    def micro_batch(params, rows):
        *rows, place_BZ, target_BZ = rows
        segments_BL = rows[1]
        hidden_BLD, sums = encoder.apply(params, *rows, c=c, moe=config.moe, recompute=config.run.recompute)
        hidden_TD = jnp.take_along_axis(hidden_BLD, place_BZ[..., None], axis=1).reshape(-1, c.dim)
        target_T = target_BZ.reshape(-1)
        word_VD = params["embedding"]["word_VD"]
        score_TV = mlm_head.scores(params["head"], word_VD, hidden_TD, num_ids=num_ids, epsilon=c.norm_epsilon)
        target_score_T = jnp.take_along_axis(score_TV, jnp.maximum(target_T, 0)[:, None], axis=1)[:, 0]
        loss_T = jnp.where(target_T >= 0, jax.nn.logsumexp(score_TV, axis=1) - target_score_T, 0.0)
        hits_T = (score_TV.argmax(1) == target_T).astype(jnp.float32)
        counted = jnp.stack([loss_T.sum(), hits_T.sum(), (target_T >= 0).sum().astype(jnp.float32)])
        return counted, sums, (segments_BL > 0).sum().astype(jnp.float32)

    if config.run.recompute:
        micro_batch = jax.checkpoint(micro_batch)
    rows = tuple(batch[name] for name in (*ROWS, "place_MBZ", "target_MBZ"))
    _, counted = jax.lax.scan(lambda _, rows: (None, micro_batch(params, rows)), None, rows)
    total, sums, num_tokens = jax.tree.map(lambda x: x.sum(0), counted)
    total = sharding.reduce(total, "B")
    metrics = {"mlm_loss": total[0] / total[2], "accuracy": total[1] / total[2], "masked": total[2]}
    return _with_balance(metrics["mlm_loss"], metrics, sums, num_tokens, config)


def _with_balance(loss, metrics: dict, sums: RouterSums | None, num_tokens: jax.Array, config: config_lib.Config):
    """Add the balance loss and the router's metrics, of all devices; a dense encoder has none."""
    metrics = metrics | {"tokens": sharding.reduce(num_tokens, "B")}
    if sums is None:
        return loss, metrics
    sums, num_tokens = sharding.reduce(sums, "B"), metrics["tokens"]
    metrics["balance_loss"] = balance_loss(sums, num_tokens=num_tokens, top_k=config.moe.top_k)
    metrics["router_load_RE"] = sums.choices_E * config.moe.num_experts / (num_tokens * config.moe.top_k)
    return loss + config.loss.balance_coefficient * metrics["balance_loss"], metrics

"""The contrastive loss (InfoNCE, arXiv 1807.03748) over the documents of all devices, gathered form.

A function of local rows and gathered columns: called inside shard_map, each device scores its own queries against every
document of the global batch, hard negatives of others included. Outside of shard_map it is the one-device loss.
"""

import jax
import jax.numpy as jnp

from moe_embed import sharding

MASKED = -1e30  # as a score: exp() of it is 0 in float32


def infonce(
    query_ND: jax.Array,
    document_ND: jax.Array,
    document_id_N: jax.Array,
    *,
    temperature: float,
    bidirectional: bool = False,
    mask_duplicates: bool = True,
):
    """Global mean over queries of -log softmax(q . d / temperature)[positive], embeddings of unit norm.

    Args:
      query_ND: float32, this device's N queries.
      document_ND: float32, this device's N * (1 + h) documents; query i's positive is row i * (1 + h), its hard
        negatives follow.
      document_id_N: int32, equal for equal texts, -1 for a missing hard negative (masked everywhere).
      bidirectional: average with the loss of finding each positive's query among all queries (arXiv 2103.00020).
      mask_duplicates: a document with the positive's id, other than the positive itself, is no candidate.

    Returns:
      loss [], and {"accuracy": how often the positive scores highest}; both global, the same on every device.
    """
    num_queries, num_documents = query_ND.shape[0], document_ND.shape[0]
    per_query = num_documents // num_queries
    document_CD, document_id_C = _gather_documents(document_ND, document_id_N)
    label_N = sharding.index("N") * num_documents + jnp.arange(num_queries) * per_query
    masked_NC = jnp.broadcast_to(document_id_C < 0, (num_queries, document_id_C.shape[0]))
    if mask_duplicates:
        is_positive_NC = jnp.arange(document_id_C.shape[0]) == label_N[:, None]
        same_NC = document_id_C == document_id_N[::per_query, None]
        masked_NC |= same_NC & ~is_positive_NC
    score_NC = jnp.where(masked_NC, MASKED, _scores(query_ND, document_CD, temperature))
    loss_N = _cross_entropy(score_NC, label_N)
    if bidirectional:
        positive_ND, positive_id_N = document_ND[::per_query], document_id_N[::per_query]
        query_CD, positive_id_C = sharding.gather(query_ND, "N"), document_id_C[::per_query]
        label_back_N = sharding.index("N") * num_queries + jnp.arange(num_queries)
        score_back_NC = _scores(positive_ND, query_CD, temperature)
        if mask_duplicates:
            is_own_NC = jnp.arange(query_CD.shape[0]) == label_back_N[:, None]
            copy_NC = (positive_id_C == positive_id_N[:, None]) & ~is_own_NC
            score_back_NC = jnp.where(copy_NC, MASKED, score_back_NC)
        loss_N = (loss_N + _cross_entropy(score_back_NC, label_back_N)) / 2
    total = sharding.reduce(jnp.stack([loss_N.sum(), (score_NC.argmax(1) == label_N).sum().astype(jnp.float32)]), "N")
    count = document_CD.shape[0] // per_query
    return total[0] / count, {"accuracy": total[1] / count}


def _gather_documents(document_ND: jax.Array, document_id_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every device's documents and ids in one collective, the ids' bits as one more column.

    A collective of the ids alone would depend on nothing the encoder computes: XLA's CPU client may then start it on one
    device before, on another after, the encoder's own collectives, and the two wait for each other for ever.
    """
    bits_N = jax.lax.bitcast_convert_type(document_id_N, jnp.float32)
    both_CD = sharding.gather(jnp.concatenate([document_ND, bits_N[:, None]], axis=1), "N")
    return both_CD[:, :-1], jax.lax.bitcast_convert_type(both_CD[:, -1], jnp.int32)


def _scores(a_ND: jax.Array, b_CD: jax.Array, temperature: float) -> jax.Array:
    return jnp.einsum("ND,CD->NC", a_ND, b_CD, precision=jax.lax.Precision.HIGHEST) / temperature


def _cross_entropy(score_NC: jax.Array, label_N: jax.Array) -> jax.Array:
    positive_N = jnp.take_along_axis(score_NC, label_N[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(score_NC, axis=1) - positive_N

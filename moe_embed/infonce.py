"""The contrastive loss (InfoNCE, arXiv 1807.03748) over the documents of all devices, gathered form.

A function of local rows and gathered columns: called inside shard_map, each device scores its own queries against every
document of the global batch, hard negatives of others included. Outside of shard_map it is the one-device loss.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_embed import config as config_lib
from moe_embed import sharding

MASKED = -1e30  # as a score: exp() of it is 0 in float32


class Ids(NamedTuple):
    """Numbers that are equal for equal things, int32."""

    document_N: jax.Array  # a document's text; -1 for a missing hard negative (masked everywhere)
    query_N: jax.Array  # a query: pairs that share it answer it, each with its own document


class Teacher(NamedTuple):
    """What another model says of this device's texts, for distillation; what is not distilled is None."""

    score_N: jax.Array | None = None  # float32 [N * (1 + h)]: of each query's own documents, NaN where unknown
    query_ND: jax.Array | None = None  # float32, any norm, any dim
    document_ND: jax.Array | None = None  # of the N positives


NONE = Teacher()


def infonce(query_ND: jax.Array, document_ND: jax.Array, ids: Ids, *, c: config_lib.Loss, teacher: Teacher = NONE):
    """Global mean over queries of -log softmax(cos(q, d) / temperature)[positive], summed over Matryoshka prefixes.

    Args:
      query_ND: float32, this device's N queries, of any norm.
      document_ND: float32, this device's N * (1 + h) documents; query i's positive is row i * (1 + h), its hard
        negatives follow.
      c: which terms. The whole vector is always scored. With `bidirectional` the loss of finding each positive's query
        among all queries is averaged in (arXiv 2103.00020); with `dims` the sum runs over prefixes, weighted (arXiv
        2205.13147); with `distill` the divergence from the teacher is added. No candidate for a query are: copies of
        its positive and positives of the same query (`mask_duplicates`), and what scores above its positive by more
        than `false_negative_margin`.

    Returns:
      loss [], and metrics [] (accuracy: how often the positive scores highest, by the whole vector); all global, the
      same on every device.
    """
    num_queries, per_query = query_ND.shape[0], document_ND.shape[0] // query_ND.shape[0]
    document_CD, document_id_C, query_id_C = _gather_documents(document_ND, ids, per_query)
    label_N = (sharding.index("N") * num_queries + jnp.arange(num_queries)) * per_query
    is_positive_NC = jnp.arange(document_id_C.shape[0]) == label_N[:, None]
    never_NC = jnp.broadcast_to(document_id_C < 0, is_positive_NC.shape)
    if c.mask_duplicates:
        same_NC = document_id_C == ids.document_N[::per_query, None]
        also_NC = (query_id_C == ids.query_N[:, None]) & (jnp.arange(document_id_C.shape[0]) % per_query == 0)
        never_NC |= (same_NC | also_NC) & ~is_positive_NC
    weights = prefix_weights(c, query_ND.shape[1])
    dims = tuple(weights)
    cosines = dict(_prefix_cosines(query_ND, document_CD, dims))
    whole_NC = cosines[max(dims)]
    never_NC |= whole_NC > _at(whole_NC, label_N)[:, None] + c.false_negative_margin
    score = {dim: jnp.where(never_NC, MASKED, cosine_NC / c.temperature) for dim, cosine_NC in cosines.items()}
    loss = {dim: _cross_entropy(score_NC, label_N) for dim, score_NC in score.items()}

    if c.bidirectional or teacher.document_ND is not None:
        theirs = () if teacher.document_ND is None else (teacher.document_ND,)
        query_CD, *teacher_CD = _gather_together(query_ND, *theirs)
    if c.bidirectional:
        back = _backward_loss(
            document_ND[::per_query], query_CD, document_id_C[::per_query], query_id_C[::per_query], c
        )
        loss = {dim: (loss_N + back[dim]) / 2 for dim, loss_N in loss.items()}

    sums = {"accuracy": (score[max(dims)].argmax(1) == label_N).astype(jnp.float32).sum()}
    sums["masked_candidates"] = (never_NC & (document_id_C >= 0)).astype(jnp.float32).sum()
    if teacher.score_N is not None:
        own_NS = (document_ND.reshape(num_queries, per_query, -1) * query_ND[:, None]).sum(-1)
        own_NS *= inverse_norm(query_ND)[:, None] * inverse_norm(document_ND).reshape(num_queries, per_query)
        # S: a query's own documents
        score_NS = teacher.score_N.reshape(num_queries, per_query)
        unknown_NS = jnp.isnan(score_NS)
        sums["distill_loss"] = _divergence(jnp.where(unknown_NS, 0, score_NS), own_NS, unknown_NS, c).sum()
    elif teacher.document_ND is not None:
        ((_, theirs_NC),) = _prefix_cosines(teacher.query_ND, teacher_CD[0], (teacher.query_ND.shape[1],))
        positive_NC = whole_NC[:, ::per_query]
        sums["distill_loss"] = _divergence(theirs_NC, positive_NC, never_NC[:, ::per_query], c).sum()
    return global_means(sums, loss, weights, distill_weight=c.distill_weight)


def global_means(
    sums: dict[str, jax.Array], loss: dict[int, jax.Array], weights: dict[int, float], *, distill_weight=1.0
):
    """This device's sums and each prefix's loss [N] -> the global loss [] and metrics []: one collective."""
    sums = sums | ({f"contrastive_loss_{dim}": loss_N.sum() for dim, loss_N in loss.items()} if len(loss) > 1 else {})
    sums["contrastive_loss"] = sum(weights[dim] * loss_N.sum() for dim, loss_N in loss.items())
    count = next(iter(loss.values())).shape[0] * sharding.size("N")
    names = list(sums)
    means = sharding.reduce(jnp.stack([sums[name] for name in names]), "N") / count
    metrics = dict(zip(names, means, strict=True))
    total = metrics["contrastive_loss"]
    return total + distill_weight * metrics["distill_loss"] if "distill_loss" in metrics else total, metrics


def prefix_weights(c: config_lib.Loss, dim: int) -> dict[int, float]:
    """The prefixes that are scored, the whole vector of `dim` numbers among them, and what each counts."""
    return {dim: 1.0} | dict(zip(c.dims, c.dim_weights or (1.0,) * len(c.dims), strict=True))


def _gather_together(*parts: jax.Array) -> list[jax.Array]:
    """Arrays of as many rows, gathered in one collective: side by side as columns."""
    both = sharding.gather(jnp.concatenate(parts, axis=1), "N")
    out, start = [], 0
    for part in parts:
        out.append(both[:, start : start + part.shape[1]])
        start += part.shape[1]
    return out


def _gather_documents(document_ND: jax.Array, ids: Ids, per_query: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every device's documents, their ids and their queries' ids, in one collective: the ids' bits as two more columns.

    A collective of the ids alone would depend on nothing the encoder computes: XLA's CPU client may then start it on one
    device before, on another after, the encoder's own collectives, and the two wait for each other for ever.
    """
    as_bits = lambda id_N: jax.lax.bitcast_convert_type(id_N, jnp.float32)[:, None]  # noqa: E731
    as_ids = lambda bits_C1: jax.lax.bitcast_convert_type(bits_C1[:, 0], jnp.int32)  # noqa: E731
    columns = document_ND, as_bits(ids.document_N), as_bits(jnp.repeat(ids.query_N, per_query))
    document_CD, document_bits, query_bits = _gather_together(*columns)
    return document_CD, as_ids(document_bits), as_ids(query_bits)


def _backward_loss(positive_ND, query_CD, document_id_C, query_id_C, c: config_lib.Loss) -> dict[int, jax.Array]:
    """For each prefix the loss [N] of finding the query of each of this device's positives among all queries."""
    num_queries = positive_ND.shape[0]
    label_N = sharding.index("N") * num_queries + jnp.arange(num_queries)
    dims = tuple(prefix_weights(c, positive_ND.shape[1]))
    cosines = dict(_prefix_cosines(positive_ND, query_CD, dims))
    whole_NC = cosines[max(dims)]
    never_NC = whole_NC > _at(whole_NC, label_N)[:, None] + c.false_negative_margin
    if c.mask_duplicates:
        same_NC = (document_id_C == document_id_C[label_N][:, None]) | (query_id_C == query_id_C[label_N][:, None])
        never_NC |= same_NC & (jnp.arange(query_CD.shape[0]) != label_N[:, None])
    return {
        dim: _cross_entropy(jnp.where(never_NC, MASKED, cosine_NC / c.temperature), label_N)
        for dim, cosine_NC in cosines.items()
    }


def _prefix_cosines(a_ND: jax.Array, b_CD: jax.Array, dims: tuple[int, ...]) -> Iterator[tuple[int, jax.Array]]:
    """(dim, cosine_NC of the first `dim` numbers) for each of `dims`, shortest first: nested partial sums share the work."""
    product_NC, start = 0.0, 0
    for dim in sorted(dims):
        a, b = a_ND[:, start:dim], b_CD[:, start:dim]
        product_NC += jnp.einsum("ND,CD->NC", a, b, precision=jax.lax.Precision.HIGHEST)
        yield dim, product_NC * inverse_norm(a_ND[:, :dim])[:, None] * inverse_norm(b_CD[:, :dim])
        start = dim


def inverse_norm(x_ND: jax.Array) -> jax.Array:
    """1 / norm of each row; a zero vector has cosine 0 with all."""
    return jax.lax.rsqrt(jnp.maximum((x_ND * x_ND).sum(-1), 1e-24))


def _at(score_NC: jax.Array, label_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(score_NC, label_N[:, None], axis=1)[:, 0]


def _cross_entropy(score_NC: jax.Array, label_N: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(score_NC, axis=1) - _at(score_NC, label_N)


def _divergence(teacher_NC: jax.Array, student_NC: jax.Array, never_NC: jax.Array, c: config_lib.Loss) -> jax.Array:
    """KL(teacher || student) [N] of the softmax over the candidates that both score (arXiv 1503.02531); 0 where < 2 do."""
    teacher_NC = jnp.where(never_NC, MASKED, teacher_NC / c.distill_temperature)
    student_NC = jnp.where(never_NC, MASKED, student_NC / c.temperature)
    log_p, log_q = jax.nn.log_softmax(teacher_NC), jax.nn.log_softmax(student_NC)
    divergence_N = jnp.where(never_NC, 0.0, jnp.exp(log_p) * (log_p - log_q)).sum(1)
    return jnp.where((~never_NC).sum(1) > 1, divergence_N, 0.0)

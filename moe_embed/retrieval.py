"""Exact search and the published metrics: what train, embed and evaluate measure with."""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytrec_eval

from moe_embed.data.sources import Task

METRICS = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "mrr@10": "recip_rank"}
BLOCK = 16_384  # documents scored at once
QUERIES = 1_024  # queries scored at once
DEPTH = 100  # documents kept for a query


@functools.partial(jax.jit, static_argnames="k")
def _merge_block(best_score_NC, best_index_NC, query_ND, document_CD, first, real, *, k: int):
    score_NC = jnp.einsum("ND,CD->NC", query_ND, document_CD, precision=jax.lax.Precision.HIGHEST)
    place_C = jnp.arange(document_CD.shape[0])
    score_NC = jnp.where(place_C < real, score_NC, -jnp.inf)
    score_NC = jnp.concatenate([best_score_NC, score_NC], axis=1)
    index_NC = jnp.concatenate(
        [best_index_NC, jnp.broadcast_to(first + place_C, (len(query_ND), len(place_C)))], axis=1
    )
    score_NC, order_NC = jax.lax.top_k(score_NC, k)
    return score_NC, jnp.take_along_axis(index_NC, order_NC, axis=1)


def top_k(query_ND: np.ndarray, document_CD: np.ndarray, *, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest inner product for each query, exactly, in blocks: never the N x C matrix.

    Returns:
      scores float32 and indices int32, [N, min(k, C)], best first, ties to the lower index.
    """
    k = min(k, len(document_CD))
    block = min(BLOCK, len(document_CD))
    parts = []
    for start in range(0, max(len(query_ND), 1), QUERIES):
        some_ND = query_ND[start : start + QUERIES]
        best = jnp.full((len(some_ND), k), -jnp.inf, jnp.float32), jnp.zeros((len(some_ND), k), jnp.int32)
        for first in range(0, len(document_CD), block):
            part = document_CD[first : first + block]
            padded = np.pad(part, ((0, block - len(part)), (0, 0)))
            best = _merge_block(*best, some_ND, padded, first, len(part), k=k)
        parts.append(jax.device_get(best))
    scores, indices = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(indices)


def embed_tasks(encode: Callable, tasks: Iterable[Task]) -> Iterator[tuple[Task, np.ndarray, np.ndarray]]:
    """Each task with query_ND and document_CD, by encode(texts, "query" or "document").

    A corpus that stands in consecutive tasks (cross-lingual ones share theirs) is encoded once.
    """
    corpus = document_CD = None
    for task in tasks:
        if corpus != list(task.corpus.values()):
            corpus = list(task.corpus.values())
            document_CD = encode(corpus, "document")
        yield task, encode(list(task.queries.values()), "query"), document_CD


def run_of(task: Task, query_ND: np.ndarray, document_CD: np.ndarray) -> dict[str, dict[str, float]]:
    """Rank a task's corpus for its queries: query id -> document id -> score, the first DEPTH. Rows in the task's order."""
    documents = list(task.corpus)
    scores, indices = top_k(query_ND, document_CD, k=DEPTH)
    return {
        query_id: {documents[c]: float(s) for s, c in zip(score, index, strict=True)}
        for query_id, score, index in zip(task.queries, scores, indices, strict=True)
    }


def measure(task: Task, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """nDCG@10, recall@10 and MRR@10 of a run, means over the task's queries, in [0, 1], by trec_eval's own code."""
    evaluator = pytrec_eval.RelevanceEvaluator(task.relevance, {"ndcg_cut.10", "recall.10"})
    reciprocal = pytrec_eval.RelevanceEvaluator(task.relevance, {"recip_rank"})
    run = {query_id: run[query_id] if query_id in run else {} for query_id in task.queries}  # nothing found counts as 0
    by_rank = lambda item: (item[1], item[0])  # noqa: E731 - trec_eval breaks ties by document id, descending
    cut = {query_id: dict(sorted(found.items(), key=by_rank, reverse=True)[:10]) for query_id, found in run.items()}
    per_query = evaluator.evaluate(run)
    for query_id, values in reciprocal.evaluate(cut).items():
        per_query[query_id] |= values
    return {name: float(np.mean([values[key] for values in per_query.values()])) for name, key in METRICS.items()}

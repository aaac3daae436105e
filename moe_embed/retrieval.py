"""Exact search and the published metrics: what train, embed and evaluate measure with."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytrec_eval
import tqdm

from moe_embed import config as config_lib
from moe_embed import sharding
from moe_embed.data.corpus import Corpus
from moe_embed.data.sources import Task

METRICS = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "mrr@10": "recip_rank"}
SURPRISE = ("/de", "/yo")  # MIRACL's last two languages: many papers report the mean of the other 16
BLOCK = 16_384  # documents a device scores at once
QUERIES = 1_024  # queries scored at once
DEPTH = 100  # documents kept for a query
RESIDENT = 2**31  # bytes of documents a device keeps between blocks of queries; more is read again for each


@dataclasses.dataclass(frozen=True)
class Rows:
    """An array whose rows are read through a function: documents of a memory map, cut or quantized a block at a time."""

    array_ND: np.ndarray
    of: Callable[[np.ndarray], np.ndarray]  # of some rows, each by itself

    def __len__(self) -> int:
        """Rows."""
        return len(self.array_ND)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Those rows, as `of` gives them."""
        return self.of(self.array_ND[rows])


def top_k(
    query_ND: np.ndarray,
    document_CD: np.ndarray,
    *,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest inner product for each query, exactly, in blocks: never the N x C matrix.

    Args:
      document_CD: any float dtype, scored in float32; it may be a memory map, or Rows of one.
      mesh: its devices share the documents; None is one device. The result is the same, bit for bit.

    Returns:
      scores float32 and indices int32, [N, min(k, C)], best first, ties to the lower index.
    """
    parts = search(query_ND, document_CD, k=k, mesh=mesh)
    total = -(-len(query_ND) // QUERIES)
    bar = tqdm.tqdm(parts, "searching", total, unit="block", disable=not progress, dynamic_ncols=True)
    scores, indices = zip(*bar, strict=True)
    return np.concatenate(scores), np.concatenate(indices)


def search(
    query_ND: np.ndarray, document_CD: np.ndarray, *, k: int, mesh: jax.sharding.Mesh | None = None, first: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`top_k` as it comes: (scores, indices) of each QUERIES queries in order, from the query `first` on; at least once."""
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.local_devices()[:1]) if mesh is None else mesh
    k = min(k, len(document_CD))
    resident = document_CD[:1].size * 4 * len(document_CD) <= RESIDENT * mesh.size
    kept = list(_blocks(document_CD, mesh)) if resident else None
    num_queries = min(QUERIES, len(query_ND))
    for start in range(first, max(len(query_ND), 1), QUERIES):
        some_ND = np.asarray(query_ND[start : start + QUERIES], np.float32)
        padded_ND = np.pad(some_ND, ((0, num_queries - len(some_ND)), (0, 0)))  # one shape: one compilation
        lists = {
            "score_NC": np.full((mesh.size * num_queries, k), -np.inf, np.float32),
            "index_NC": np.zeros((mesh.size * num_queries, k), np.int32),
        }
        best = tuple(sharding.put_batch(lists, mesh=mesh).values())
        for place, document_ND in kept or _blocks(document_CD, mesh):
            before, best = best, _score_block(*best, padded_ND, document_ND, place, len(document_CD), mesh=mesh)
            jax.block_until_ready(before)  # one block is under way while the next is read, not all of them
        if mesh.size > 1:
            best = _merge(*best, num_lists=mesh.size)
        scores, indices = jax.device_get(best)
        yield scores[: len(some_ND)], indices[: len(some_ND)]


def _blocks(document_CD: np.ndarray, mesh: jax.sharding.Mesh) -> Iterator[tuple[int, jax.Array]]:
    """(index of its first document, document_ND float32 split over the devices), the last one padded.

    A device's part has one shape, whatever the mesh: the sums inside a matrix product depend on it in their last bit.
    """
    size = min(BLOCK, len(document_CD)) * mesh.size
    for first in range(0, len(document_CD), max(size, 1)):
        part_ND = np.asarray(document_CD[first : first + size], np.float32)
        part_ND = np.pad(part_ND, ((0, size - len(part_ND)), (0, 0)))
        yield first, sharding.put_batch({"document_ND": part_ND}, mesh=mesh)["document_ND"]


@functools.partial(jax.jit, static_argnames="mesh")
def _score_block(best_score_NC, best_index_NC, query_CD, document_ND, first, real, *, mesh):
    """Each device's best lists after one more block. Here the documents are split (N) and the queries whole (C)."""

    def local(best_score_CN, best_index_CN, query_CD, document_ND, first, real):
        first += sharding.index("N") * len(document_ND)
        score_CN = jnp.einsum("CD,ND->CN", query_CD, document_ND, precision=jax.lax.Precision.HIGHEST)
        score_CN = jnp.where(score_CN == 0, 0, score_CN)  # for top_k, -0.0 is less than 0.0
        score_CN = jnp.where(first + jnp.arange(len(document_ND)) < real, score_CN, -jnp.inf)
        k = best_score_CN.shape[1]
        score_CN, place_CN = jax.lax.top_k(score_CN, min(k, len(document_ND)))
        score_CN = jnp.concatenate([best_score_CN, score_CN], axis=1)  # a tie goes to what stands first
        index_CN = jnp.concatenate([best_index_CN, first + place_CN], axis=1)
        score_CN, order_CN = jax.lax.top_k(score_CN, k)
        return score_CN, jnp.take_along_axis(index_CN, order_CN, axis=1)

    split, whole = sharding.spec("document_ND", column="activation"), sharding.EVERYWHERE
    in_specs = (split, split, whole, split, whole, whole)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(split, split))(
        best_score_NC, best_index_NC, query_CD, document_ND, first, real
    )


@functools.partial(jax.jit, static_argnames="num_lists")
def _merge(best_score_NC, best_index_NC, *, num_lists: int):
    """The devices' lists of each query, one under the other in N, to one: by score, then by index."""
    k = best_score_NC.shape[1]
    beside = lambda x: x.reshape(num_lists, -1, k).swapaxes(0, 1).reshape(-1, num_lists * k)  # noqa: E731
    below_NC, index_NC = jax.lax.sort((-beside(best_score_NC), beside(best_index_NC)), num_keys=2)
    return -below_NC[:, :k], index_NC[:, :k]


def embed_tasks(encode: Callable, tasks: Iterable[Task]) -> Iterator[tuple[Task, np.ndarray, np.ndarray]]:
    """Each task with query_ND and document_CD, by encode(texts, "query" or "document"); a Corpus is handed on as it is.

    A corpus that stands in consecutive tasks (cross-lingual ones share theirs) is encoded once.
    """
    corpus = document_CD = None
    for task in tasks:
        texts = task.corpus if isinstance(task.corpus, Corpus) else list(task.corpus.values())
        if corpus != texts:
            corpus = texts
            document_CD = encode(corpus, "document")
        yield task, encode(list(task.queries.values()), "query"), document_CD


def run_of(
    task: Task, query_ND: np.ndarray, document_CD: np.ndarray, *, mesh: jax.sharding.Mesh | None = None
) -> dict[str, dict[str, float]]:
    """Rank a task's corpus for its queries: query id -> document id -> score, the first DEPTH. Rows in the task's order."""
    documents = task.corpus.ids if isinstance(task.corpus, Corpus) else list(task.corpus)
    scores, indices = top_k(query_ND, document_CD, k=DEPTH, mesh=mesh)
    return {
        query_id: {documents[c]: float(s) for s, c in zip(score, index, strict=True)}
        for query_id, score, index in zip(task.queries, scores, indices, strict=True)
    }


def counted(task: Task, run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """A run without the documents of a query's own id, where the task's data say that they do not count."""
    if not task.origin.ignore_identical_ids:
        return run
    return {query_id: {c: score for c, score in found.items() if c != query_id} for query_id, found in run.items()}


def measure(task: Task, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """nDCG@10, recall@10 and MRR@10 of a run, means over the task's queries, in [0, 1]."""
    return {name: float(np.mean(values)) for name, values in measure_queries(task, run).items()}


def measure_queries(task: Task, run: dict[str, dict[str, float]]) -> dict[str, np.ndarray]:
    """`measure` before the mean: of each metric float64 [queries] in [0, 1], in the task's order, by trec_eval's own code."""
    evaluator = pytrec_eval.RelevanceEvaluator(task.relevance, {"ndcg_cut.10", "recall.10"})
    reciprocal = pytrec_eval.RelevanceEvaluator(task.relevance, {"recip_rank"})
    run = counted(task, run)
    run = {query_id: run[query_id] if query_id in run else {} for query_id in task.queries}  # nothing found counts as 0
    by_rank = lambda item: (item[1], item[0])  # noqa: E731 - trec_eval breaks ties by document id, descending
    cut = {query_id: dict(sorted(found.items(), key=by_rank, reverse=True)[:10]) for query_id, found in run.items()}
    per_query = evaluator.evaluate(run)
    for query_id, values in reciprocal.evaluate(cut).items():
        per_query[query_id] |= values
    return {
        name: np.array([per_query[q][key] for q in task.queries if q in per_query]) for name, key in METRICS.items()
    }


def mean_of(figures: Mapping[str, Mapping], names: Sequence[str], metric: str) -> float:
    """The mean over tasks, by their `shares`."""
    return float(np.dot(shares(names), [figures[name][metric] for name in names]))


def shares(names: Sequence[str]) -> np.ndarray:
    """What each task counts for in a mean, of sum 1: the parts of one ("cqadupstack/android", ...) count as one, as BEIR has it."""
    wholes = [name.partition("/")[0] for name in names]
    parts = collections.Counter(wholes)
    return np.array([1 / (len(parts) * parts[whole]) for whole in wholes])

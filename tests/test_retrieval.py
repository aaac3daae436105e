"""Exact search against numpy's argsort, and the metrics against their definitions by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import retrieval, sharding
from moe_embed.data.origin import Origin
from moe_embed.data.sources import Task


def by_argsort(query_ND, document_CD, k):
    score_NC = query_ND.astype(np.float64) @ document_CD.astype(np.float64).T
    index_NC = np.argsort(-score_NC, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(score_NC, index_NC, axis=1), index_NC


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK", 7)
    monkeypatch.setattr(retrieval, "QUERIES", 3)


@pytest.mark.parametrize(("num_queries", "num_documents", "k"), [(8, 30, 5), (3, 28, 10), (1, 5, 5), (4, 6, 20)])
def test_top_k_against_argsort(small_blocks, num_queries, num_documents, k):
    rng = np.random.default_rng(0)
    query_ND, document_CD = (rng.normal(size=(n, 6)).astype(np.float32) for n in (num_queries, num_documents))
    scores, indices = retrieval.top_k(query_ND, document_CD, k=k)
    wanted_scores, wanted = by_argsort(query_ND, document_CD, k)
    assert indices.tolist() == wanted.tolist()
    assert indices.shape == (num_queries, min(k, num_documents))
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5, atol=1e-6)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int32)
    assert retrieval.top_k(query_ND, document_CD[::-1], k=k)[1].tolist() != wanted.tolist()


def test_ties_go_to_the_lower_index_in_all_blocks(small_blocks):
    rng = np.random.default_rng(1)
    query_ND, document_CD = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (5, 40))  # whole numbers: ties
    _, indices = retrieval.top_k(query_ND, document_CD, k=12)
    assert indices.tolist() == by_argsort(query_ND, document_CD, 12)[1].tolist()
    assert retrieval.top_k(np.zeros((1, 3), np.float32), document_CD, k=9)[1].tolist() == [list(range(9))]


def test_negative_scores_win_over_padding(small_blocks):
    scores, indices = retrieval.top_k(np.ones((1, 2), np.float32), -np.ones((9, 2), np.float32), k=9)
    assert indices.tolist() == [list(range(9))]
    assert scores.tolist() == [[-2.0] * 9]


def test_blocks_of_the_real_size_give_the_same():
    rng = np.random.default_rng(2)
    query_ND, document_CD = (rng.normal(size=(n, 4)).astype(np.float32) for n in (2, retrieval.BLOCK + 100))
    _, indices = retrieval.top_k(query_ND, document_CD, k=50)
    assert indices.tolist() == by_argsort(query_ND, document_CD, 50)[1].tolist()


def ranked(*documents: str) -> dict[str, float]:
    return {name: 1.0 - i / 100 for i, name in enumerate(documents)}


def task(relevance: dict) -> Task:
    corpus = {f"d{i}": f"text {i}" for i in range(20)}
    return Task("t", corpus, {query: "?" for query in relevance}, relevance)


def by_hand(relevant: dict[str, int], order: list[str]) -> dict[str, float]:
    gains = [relevant.get(name, 0) for name in order[:10]]
    best = sorted(relevant.values(), reverse=True)[:10]
    dcg, ideal = (sum(g / math.log2(i + 2) for i, g in enumerate(some)) for some in (gains, best))
    hits = [i for i, g in enumerate(gains) if g > 0]
    positive = sum(grade > 0 for grade in relevant.values())
    return {"ndcg@10": dcg / ideal, "recall@10": len(hits) / positive, "mrr@10": 1 / (hits[0] + 1) if hits else 0.0}


def test_measure_by_hand():
    relevance = {"a": {"d3": 1}, "b": {"d1": 2, "d5": 1, "d9": 1, "d7": 0}, "c": {"d0": 1}}
    orders = {"a": ["d1", "d3", "d2"], "b": ["d7", "d5", "d0", "d1"], "c": [f"d{i}" for i in (*range(1, 11), 0, 11)]}
    found = retrieval.measure(task(relevance), {query: ranked(*order) for query, order in orders.items()})
    each = [by_hand(relevance[query], orders[query]) for query in relevance]
    assert each[0] == {"ndcg@10": pytest.approx(1 / math.log2(3)), "recall@10": 1.0, "mrr@10": 0.5}
    assert each[2] == {"ndcg@10": 0, "recall@10": 0, "mrr@10": 0}  # eleventh: beyond every cut
    assert found == {name: pytest.approx(np.mean([values[name] for values in each])) for name in retrieval.METRICS}
    orders["a"] = ["d3", "d1", "d2"]
    better = retrieval.measure(task(relevance), {query: ranked(*order) for query, order in orders.items()})
    assert all(better[name] > found[name] for name in ("ndcg@10", "mrr@10"))
    assert better["recall@10"] == found["recall@10"]


@pytest.mark.parametrize("second", [{"b": {}}, {}, {"b": {"d1": 1.0}}], ids=["nothing", "not in the run", "another"])
def test_a_query_that_finds_nothing_counts_as_zero(second):
    relevance = {"a": {"d3": 1}, "b": {"d4": 1}}
    found = retrieval.measure(task(relevance), {"a": ranked("d3")} | second)
    assert found == {"ndcg@10": 0.5, "recall@10": 0.5, "mrr@10": 0.5}


def test_ties_are_ranked_alike_by_all_metrics():
    tied = {f"d{i}": 1.0 for i in range(12)}
    for relevant in tied:
        found = retrieval.measure(task({"a": {relevant: 1}}), {"a": tied})
        assert found["ndcg@10"] == pytest.approx(1 / math.log2(1 / found["mrr@10"] + 1) if found["mrr@10"] else 0.0)


def test_run_of_names_the_documents_in_the_tasks_order(monkeypatch):
    monkeypatch.setattr(retrieval, "DEPTH", 3)
    some = task({"q1": {"d2": 1}, "q0": {"d4": 1}})
    document_CD = np.eye(20, dtype=np.float32)
    query_ND = document_CD[[2, 5]] + 0.5 * document_CD[[7, 4]]
    run = retrieval.run_of(some, query_ND, document_CD)
    assert run == {"q1": {"d2": 1.0, "d7": 0.5, "d0": 0.0}, "q0": {"d5": 1.0, "d4": 0.5, "d0": 0.0}}
    assert retrieval.run_of(some, query_ND, document_CD, mesh=mesh_of(8)) == run
    assert retrieval.measure(some, run)["mrr@10"] == 0.75


def mesh_of(count: int):
    return sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:count])


@pytest.mark.parametrize(
    ("num_documents", "dim", "k"), [(40, 3, 12), (130, 3, 40), (57, 32, 5), (56, 768, 30), (5, 8, 9), (8, 4, 1)]
)
@pytest.mark.parametrize("whole_numbers", [True, False], ids=["ties", "no ties"])
def test_eight_devices_give_the_bits_of_one(
    small_blocks, eight_devices, monkeypatch, num_documents, dim, k, whole_numbers
):
    rng = np.random.default_rng(3)
    query_ND, document_CD = (rng.normal(size=(n, dim)).astype(np.float32) for n in (8, num_documents))
    if whole_numbers:
        query_ND, document_CD = np.sign(query_ND.round()), np.sign(document_CD.round())
    one = retrieval.top_k(query_ND, document_CD, k=k)
    for resident in (retrieval.RESIDENT, 0):  # kept on the devices, or read again for each block of queries
        monkeypatch.setattr(retrieval, "RESIDENT", resident)
        eight = retrieval.top_k(query_ND, document_CD, k=k, mesh=mesh_of(8))
        assert [a.tobytes() for a in one] == [a.tobytes() for a in eight]
    assert one[1].tolist() == by_argsort(query_ND, document_CD, k)[1].tolist()
    other = retrieval.top_k(query_ND, document_CD[::-1], k=k, mesh=mesh_of(8))
    assert other[1].tobytes() != one[1].tobytes()


def test_eight_devices_give_the_bits_of_one_in_blocks_of_the_real_size(eight_devices):
    rng = np.random.default_rng(4)
    query_ND, document_CD = (rng.normal(size=(n, 768)).astype(np.float32) for n in (3, 2 * retrieval.BLOCK + 77))
    one = retrieval.top_k(query_ND, document_CD, k=20)
    eight = retrieval.top_k(query_ND, document_CD, k=20, mesh=mesh_of(8))
    assert [a.tobytes() for a in one] == [a.tobytes() for a in eight]
    document_CD[one[1][0, 0]] *= 1.0001
    changed = retrieval.top_k(query_ND, document_CD, k=20, mesh=mesh_of(8))
    assert one[0].tobytes() != changed[0].tobytes()


def test_no_device_holds_more_than_its_part(eight_devices, monkeypatch):
    held = []
    score_block = retrieval._score_block

    def spy(best_score_NC, best_index_NC, query_CD, document_ND, *rest, mesh):
        held.extend(shard.data.shape for shard in document_ND.addressable_shards)
        return score_block(best_score_NC, best_index_NC, query_CD, document_ND, *rest, mesh=mesh)

    monkeypatch.setattr(retrieval, "_score_block", spy)
    monkeypatch.setattr(retrieval, "BLOCK", 10)
    retrieval.top_k(np.ones((2, 4), np.float32), np.ones((80, 4), np.float32), k=3, mesh=mesh_of(8))
    assert held == [(10, 4)] * 8


def test_a_search_that_goes_on_gives_the_bits_of_a_whole_one(small_blocks):
    rng = np.random.default_rng(5)
    query_ND, document_CD = (rng.normal(size=(n, 768)).astype(np.float32) for n in (7, 30))
    whole = list(retrieval.search(query_ND, document_CD, k=5))
    rest = list(retrieval.search(query_ND, document_CD, k=5, first=6))  # one query: less than a block
    assert [len(scores) for scores, _ in whole] == [3, 3, 1]
    assert [a.tobytes() for a in rest[0]] == [a.tobytes() for a in whole[2]]
    assert len(rest) == 1
    assert rest[0][0].tobytes() != whole[1][0][:1].tobytes()


def test_a_memory_map_of_half_precision_is_scored_in_single(small_blocks, tmp_path):
    rng = np.random.default_rng(6)
    query_ND, document_CD = (rng.normal(size=(n, 6)).astype(np.float16) for n in (4, 30))
    np.save(tmp_path / "d.npy", document_CD)
    scores, indices = retrieval.top_k(query_ND, np.load(tmp_path / "d.npy", mmap_mode="r"), k=5)
    wanted = retrieval.top_k(query_ND.astype(np.float32), document_CD.astype(np.float32), k=5)
    assert (scores.tobytes(), indices.tobytes()) == (wanted[0].tobytes(), wanted[1].tobytes())
    assert scores.dtype == np.float32
    assert np.abs(scores - scores.astype(np.float16)).max() > 0


def test_rows_are_read_through_their_function(small_blocks, tmp_path, monkeypatch):
    rng = np.random.default_rng(7)
    query_ND, document_CD = (rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 30))
    np.save(tmp_path / "d.npy", document_CD)
    first = lambda x_ND: x_ND[:, :2] / np.linalg.norm(x_ND[:, :2], axis=1, keepdims=True)  # noqa: E731
    wanted = retrieval.top_k(first(query_ND), first(document_CD), k=5)
    for resident in (retrieval.RESIDENT, 0):
        monkeypatch.setattr(retrieval, "RESIDENT", resident)
        rows = retrieval.Rows(np.load(tmp_path / "d.npy", mmap_mode="r"), first)
        found = retrieval.top_k(first(query_ND), rows, k=5)
        assert [a.tobytes() for a in found] == [a.tobytes() for a in wanted]
    other = retrieval.top_k(first(query_ND), document_CD[:, :2], k=5)
    assert other[0].tobytes() != wanted[0].tobytes()


def test_minus_zero_ties_with_zero(small_blocks):
    document_CD = np.array([[-1e-30], [0], [1e-30], [-1]], np.float32)  # times 1e-30: below what float32 can say
    assert retrieval.top_k(np.full((1, 1), 1e-30, np.float32), document_CD, k=4)[1].tolist() == [[0, 1, 2, 3]]


def test_nothing_to_search_with_and_nothing_to_find():
    empty, some = np.zeros((0, 3), np.float32), np.ones((2, 3), np.float32)
    assert retrieval.top_k(empty, some, k=5)[1].shape == (0, 2)
    assert retrieval.top_k(some, empty, k=5)[1].shape == (2, 0)


def test_a_document_of_the_querys_own_id_does_not_count_where_the_data_say_so():
    run = {"a": {"a": 1.0, "b": 0.5}, "b": {"a": 0.1}}
    plain = Task("t", {"a": "x", "b": "y"}, {"a": "x", "b": "y"}, {"a": {"b": 1}, "b": {"a": 1}})
    alone = dataclasses.replace(plain, origin=Origin(ignore_identical_ids=True))
    assert retrieval.counted(plain, run) == run
    assert retrieval.counted(alone, run) == {"a": {"b": 0.5}, "b": {"a": 0.1}}
    assert list(retrieval.measure_queries(alone, run)["mrr@10"]) == [1.0, 1.0]
    assert list(retrieval.measure_queries(plain, run)["mrr@10"]) == [0.5, 1.0]

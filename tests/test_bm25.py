"""Words, and BM25 beside a loop of ten lines."""

import math

import pytest

from moe_embed import bm25, retrieval
from moe_embed.data.sources import Task

TEXTS = ["The cell, the table and the page", "Insert a table: a table has cells", "表を挿入する", "THE page", "margins"]
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS)}
QUERIES = {"a": "the table", "b": "page page insert", "c": "表の挿入", "d": "margins of unknown"}


def task(queries=QUERIES, corpus=CORPUS, name="t", relevant="d1") -> Task:
    return Task(name, corpus, queries, {query: {relevant: 1} for query in queries})


def by_loop(queries: dict, corpus: dict, *, k1=0.9, b=0.4) -> dict:
    """BM25 with Lucene's idf (Kamphuis et al., ECIR 2020)."""
    documents = {name: bm25.words(text) for name, text in corpus.items()}
    mean = sum(map(len, documents.values())) / len(documents)
    run = {}
    for query, text in queries.items():
        scores = dict.fromkeys(documents, 0.0)
        for word in bm25.words(text):
            df = sum(word in document for document in documents.values())
            for name, document in documents.items():
                tf = document.count(word)
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                scores[name] += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        run[query] = {name: score for name, score in scores.items() if score > 0}
    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, WORLD! it's 3.5", ["hello", "world", "it", "s", "3", "5"]),
        ("Straße_1 Ärger", ["straße_1", "ärger"]),
        ("как Изменить", ["как", "изменить"]),
        ("表", ["表"]),
        ("表を挿入", ["表を", "を挿", "挿入"]),
        ("Excelの表", ["excel", "の表"]),
        ("여백을 바꿔", ["여백", "백을", "바꿔"]),
        ("हिन्दी दिवस, ২০২৪ সালের", ["हिन्दी", "दिवस", "২০২৪", "সালের"]),
        ("తెలుగు مُحَمَّد nai\u0308ve", ["తెలుగు", "مُحَمَّد", "nai\u0308ve"]),
        ("วันนี้ PDF", ["วัน", "นนี้", "pdf"]),
        ("❤\ufe0f ok", ["ok"]),
        ("", []),
        (" ... ", []),
    ],
)
def test_words(text, expected):
    assert bm25.words(text) == expected


def test_bm25_against_a_loop():
    run, expected = bm25.rank(task()), by_loop(QUERIES, CORPUS)
    assert run.keys() == expected.keys()
    for query in QUERIES:
        assert expected[query]
        assert run[query] == {name: pytest.approx(score, rel=1e-5) for name, score in expected[query].items()}
    for other in (by_loop(QUERIES, CORPUS, k1=1.2), by_loop(QUERIES, CORPUS, b=0.75)):
        assert run["a"] != {name: pytest.approx(score, rel=1e-5) for name, score in other["a"].items()}


def test_bm25_keeps_the_first_hundred(monkeypatch):
    monkeypatch.setattr(retrieval, "DEPTH", 1)
    expected = by_loop(QUERIES, CORPUS)
    assert {query: list(found) for query, found in bm25.rank(task()).items()} == {
        query: [max(scores, key=scores.get)] for query, scores in expected.items()
    }


@pytest.mark.parametrize("relevant", list(CORPUS))
def test_a_query_of_unknown_words_scores_nothing_whatever_is_relevant(relevant):
    queries = {"x": "zzz qqq", "y": "..."}
    some = task(queries, relevant=relevant)
    assert retrieval.measure(some, bm25.rank(some)) == {"ndcg@10": 0.0, "recall@10": 0.0, "mrr@10": 0.0}


def test_words_of_hindi_are_told_apart_by_more_than_their_consonants():
    """Cut at its vowel signs a word is its consonants, and these four are one another."""
    corpus = {"d0": "किताब", "d1": "कोताबी", "d2": "केतिब", "d3": "पानी"}
    assert list(bm25.rank(task({"a": "किताब"}, corpus))["a"]) == ["d0"]
    assert list(bm25.rank(task({"a": "केतिब"}, corpus))["a"]) == ["d2"]

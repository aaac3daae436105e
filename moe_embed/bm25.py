"""BM25 as BEIR and Anserini set it (k1 0.9, b 0.4), over words and CJK bigrams: the baseline beside a model.

It knows no language: lower-cased words, no stemming, no stop words; Chinese, Japanese and Korean, whose words no space parts,
as character bigrams, as Lucene's CJK analyser has them.
"""

import itertools
import logging
import re

from moe_embed import retrieval
from moe_embed.data.sources import Task

LETTERS = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]+|[^\W぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]+")
CJK = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿ｦ-ﾟ]")
K1, B = 0.9, 0.4


def rank(task: Task) -> dict[str, dict[str, float]]:
    """A BM25 run (k1 0.9, b 0.4): lower-cased words, Chinese, Japanese and Korean as character bigrams, no stemming."""
    import bm25s  # here: at its import it computes with jax, before verb.run has said on what

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    documents = list(task.corpus)
    corpus = [words(text) for text in task.corpus.values()]
    if not any(corpus):
        return {query_id: {} for query_id in task.queries}
    retriever = bm25s.BM25(k1=K1, b=B)
    retriever.index(corpus, show_progress=False)
    depth = min(retrieval.DEPTH, len(documents))
    run = {}
    for query_id, text in task.queries.items():
        known = [word for word in words(text) if word in retriever.vocab_dict]
        if not known:
            run[query_id] = {}
            continue
        found, scores = retriever.retrieve([known], k=depth, show_progress=False)
        run[query_id] = {documents[i]: float(s) for i, s in zip(found[0], scores[0], strict=True) if s > 0}
    return run


def words(text: str) -> list[str]:
    """Lower-cased words; a run of CJK letters becomes its bigrams, alone a letter stays.

    >>> words("Die Tabelle 表を挿入")
    ['die', 'tabelle', '表を', 'を挿', '挿入']
    """
    found = []
    for word in LETTERS.findall(text.lower()):
        if CJK.match(word) and len(word) > 1:
            found += [a + b for a, b in itertools.pairwise(word)]
        else:
            found.append(word)
    return found

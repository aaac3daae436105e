"""BM25 as BEIR and Anserini set it (k1 0.9, b 0.4), over words and CJK bigrams: the baseline beside a model.

It knows no language: lower-cased words, no stemming, no stop words; Chinese, Japanese and Korean, whose words no space parts,
as character bigrams, as Lucene's CJK analyser has them; Thai, Lao, Burmese and Khmer likewise, of letters with their marks.
"""

import itertools
import logging
import re

from moe_embed import retrieval
from moe_embed.data import hygiene
from moe_embed.data.sources import Task

CJK = hygiene.CJK + "ｦ-ﾟ"
LETTER = rf"[{CJK}]|(?=[{hygiene.UNSPACED}])\w[{hygiene.MARKS}]*"  # of scripts that part no words by spaces
PLAIN = rf"[^\W{CJK}{hygiene.UNSPACED}]"
WORDS = re.compile(rf"(?:{LETTER})+|{PLAIN}(?:{PLAIN}|[{hygiene.MARKS}])*")  # a vowel sign is no border of a word
K1, B = 0.9, 0.4


def rank(task: Task) -> dict[str, dict[str, float]]:
    """A BM25 run (k1 0.9, b 0.4): lower-cased words, those of scripts without spaces as bigrams of letters, no stemming."""
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
    """Lower-cased words; a run of letters that no spaces part into words becomes its bigrams, alone a letter stays.

    >>> words("Die Tabelle 表を挿入")
    ['die', 'tabelle', '表を', 'を挿', '挿入']
    """
    found = []
    for word in WORDS.findall(text.lower()):
        letters = re.findall(LETTER, word)
        found += [a + b for a, b in itertools.pairwise(letters)] if len(letters) > 1 else [word]
    return found

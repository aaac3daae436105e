"""Which pairs are not worth training on: too short, too long, symbols, other languages, copies, and parts of benchmarks."""

import bisect
import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe_embed.data.pairs import Pair

MARKS = "".join(
    c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "M"
)  # vowel signs; \w has none of them
CJK = "぀-ヿ㐀-䶿一-鿿가-힯豈-﫿"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
# Words, their marks with them; of scripts that part none by spaces single characters, or letters with their marks.
WORDS = re.compile(rf"[{CJK}]|(?=[{UNSPACED}])[^\W_][{MARKS}]*|(?:[^\W_{CJK}{UNSPACED}]|[{MARKS}])+")
OF_UNSPACED = re.compile(f"[{UNSPACED}]")
LETTERS = 3  # of UNSPACED, that count as a word: thirteen are four words of Thai, which any two texts share
WORTH_SAYING = 5  # words: a benchmark's text of fewer is no evidence that a pair comes from it
BUCKET = 2**25  # keys that are sorted at once


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a pair must be; each side by itself where it is about a text."""

    min_characters: int = 1
    max_characters: int = 1_000_000
    max_symbols: float = 1.0  # share of a text's characters that are neither letters, digits nor blanks
    languages: tuple[str, ...] = ()  # of the column "lang"; () is all
    ngram: int = 13  # words in a row that a pair may not share with a benchmark's text (Brown et al., arXiv 2005.14165)


def fault(pair: Pair, rules: Rules, benchmark: frozenset[int] = frozenset()) -> str:
    """Why a pair is left out, in a word or two; "" for a good one."""
    if rules.languages and pair.lang not in rules.languages:
        return "other language"
    texts = (pair.query, pair.document)
    if pair.query.strip() == pair.document.strip():
        return "query is the document"
    if min(map(len, texts)) < rules.min_characters:
        return "too short"
    if max(map(len, texts)) > rules.max_characters:
        return "too long"
    if rules.max_symbols < 1 and any(symbols(text) > rules.max_symbols for text in texts):
        return "symbols"
    if any(_is_of(text, rules, benchmark) for text in texts):
        return "in a benchmark"
    return ""


def _is_of(text: str, rules: Rules, benchmark: frozenset[int]) -> bool:
    return bool(benchmark) and not benchmark.isdisjoint(ngrams(text, rules.ngram))


def without_answers(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs of one row without those of its negatives that are one of its documents; and how many negatives those are.

    A negative's score goes with it.
    """
    answers = {pair.document for pair in pairs}
    keep = [text not in answers for text in pairs[0].negatives]
    return [with_negatives(pair, keep) for pair in pairs], keep.count(False)


def without_benchmark(pair: Pair, rules: Rules, benchmark: frozenset[int]) -> tuple[Pair, int]:
    """The pair without those of its negatives that share words with a benchmark, as `fault` counts them; and how many those are.

    They would be pushed away from a query that is not the benchmark's, all the same: an answer seen in training as a wrong one.
    """
    keep = [not _is_of(text, rules, benchmark) for text in pair.negatives]
    return with_negatives(pair, keep), keep.count(False)


def with_negatives(pair: Pair, keep: Sequence[bool]) -> Pair:
    """The pair with those of its negatives that `keep` marks, and with their scores."""
    if all(keep):
        return pair
    negatives, scores = (tuple(itertools.compress(of, keep)) for of in (pair.negatives, pair.scores[1:]))
    return dataclasses.replace(pair, negatives=negatives, scores=(*pair.scores[:1], *scores))


def symbols(text: str) -> float:
    """The share of a text's characters that are neither letters (with their marks), digits nor blanks."""
    plain = sum(unicodedata.category(c)[0] in "LMNZ" or c.isspace() for c in text)
    return 1 - plain / len(text)


def ngrams(text: str, n: int) -> Iterator[int]:
    """Hashes of the runs of n lower-cased words in a text (NFKC); a shorter text is one run, if it is worth saying.

    Letters of UNSPACED count as 1 / LETTERS. The hashes are those of this process.
    """
    words = WORDS.findall(unicodedata.normalize("NFKC", text).lower())
    worth = (1 if OF_UNSPACED.match(word) else LETTERS for word in words)
    before = list(itertools.accumulate(worth, initial=0))  # letters before each word, and of all
    if WORTH_SAYING * LETTERS <= before[-1] <= n * LETTERS:
        yield hash(" ".join(words))
    else:
        for start in range(len(words)):
            end = bisect.bisect_left(before, before[start] + n * LETTERS)
            if end == len(before):
                return
            yield hash(" ".join(words[start:end]))


def of_benchmarks(texts: Iterable[str], n: int) -> frozenset[int]:
    """The runs of words of a benchmark's queries and judged documents, for `fault`."""
    return frozenset(value for text in texts for value in ngrams(text, n))


def key(pair: Pair) -> int:
    """64 bits of a pair's two texts: what makes two rows copies of each other."""
    query = pair.query.encode()
    digest = hashlib.blake2b(b"%d " % len(query) + query + pair.document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def first_of_its_kind(keys: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For uint64 keys in several files: bool, whether a key is the first of its value over all files in order.

    Only BUCKET of them or so are in memory at once; the arrays may be memory maps.
    """
    total = sum(map(len, keys))
    blocks = [range(0, len(array), BUCKET) for array in keys]
    shift = np.uint64(64 - max(int(total // BUCKET).bit_length(), 1))
    first = [np.zeros(len(array), bool) for array in keys]
    for bucket in range(1 << (64 - int(shift))):
        here = [np.concatenate([np.zeros(0, np.int64), *(
            at + np.flatnonzero(array[at : at + BUCKET] >> shift == bucket) for at in starts
        )]) for array, starts in zip(keys, blocks, strict=True)]  # fmt: skip
        values = np.concatenate([array[i] for array, i in zip(keys, here, strict=True)])
        _, where = np.unique(values, return_index=True)
        chosen = np.zeros(len(values), bool)
        chosen[where] = True
        ends = np.cumsum([len(i) for i in here])
        for of_file, i, end in zip(first, here, ends, strict=True):
            of_file[i] = chosen[end - len(i) : end]
    return first

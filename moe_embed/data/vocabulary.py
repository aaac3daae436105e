"""A smaller vocabulary: keep the pieces that some texts need, and cut what text with only those pieces never touches.

Why it is exact. SentencePiece's unigram model takes the cut of a text with the highest sum of scores; among equals, the one
its search meets first (Kudo, arXiv 1804.10959). Scores stay as they are, so a cut made of kept pieces has the score it had,
and all that is taken away are its rivals. One new rival can appear: an unknown character, at 10 below the lowest score of
the model, where a piece for that one character was. The lowest-scored piece is kept, hence this rival scores below the
piece it stands in for, which had lost already. (So is the highest: user-defined pieces score by it.) A text whose pieces
are all kept has the same pieces, and the same vector.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from moe_embed.config import UserError
from moe_embed.data import inputs, sources
from moe_embed.data.tokenizer import Tokenizer

CHUNK = 20_000  # texts tokenised at once
NO_CAP = 2**30  # tokens
MULTIPLE = 64  # of the rows of a table


class Pruned(NamedTuple):
    """What `prune` returns."""

    tokenizer: Tokenizer
    old_V: np.ndarray  # int64: for each id of `tokenizer`, <pad> and <mask> included, the id it had
    coverage: float  # share of the counted tokens whose piece is kept


def read_texts(path: str) -> Iterator[str]:
    """The texts of a file: the "text" of each line, or all queries, documents and negatives of a file of pairs.

    UserError names file, line and fault.
    """
    if _has_text(path):
        yield from sources.read_text_source(path).texts
        return
    for pair in (pair for source in sources.read_sources(path) for pair in source.pairs):
        yield from (pair.query, pair.document, *pair.negatives)


def count(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """How often each id occurs in `texts`, int64 [num_ids]; <s> and </s> once a text."""
    count_V = np.zeros(tokenizer.num_ids, np.int64)
    for some in _chunks(texts):
        count_V += np.bincount(np.concatenate(tokenizer.encode(some, max_length=NO_CAP)[0]), minlength=len(count_V))
    return count_V


def prune(tokenizer: Tokenizer, count_V: np.ndarray, *, keep: int, prompts: Iterable[str] = ()) -> Pruned:
    """The `keep` pieces of the model that matter most, in their order and with their scores.

    First what has to stay: special pieces, user-defined ones and bytes; the lowest- and the highest-scored piece; those of
    `prompts`; every counted character that is a piece. Then pieces by count, then by score. <unk>, <s> and </s> are among the `keep`;
    <pad> and <mask>, which are ids but no pieces, come on top. UserError: no unigram model, or `keep` too small or large.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError("the tokenizer is no unigram model; merges of others depend on each other and cannot be cut.")
    if keep >= len(proto.pieces):
        raise UserError(f"--keep={keep} keeps everything: the tokenizer has {len(proto.pieces)} pieces.")
    always = _always(proto, tokenizer, count_V, prompts)
    if keep < len(always):
        raise UserError(
            f"--keep={keep} is too few: {len(always)} pieces have to stay (special ones, those of the prompts, and each "
            "single character of the texts)."
        )
    count_of = lambda i: int(count_V[i + 1])  # noqa: E731 - piece i is id i + 1, for all but the special three
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL and i not in always]
    normal.sort(key=lambda i: (-count_of(i), -proto.pieces[i].score, i))
    kept = sorted({*always, *normal[: keep - len(always)]})
    pieces = [proto.pieces[i] for i in kept]
    # Not a copy of proto: that would carry its self-test along, samples of the whole model that loading compares.
    smaller = sentencepiece_model_pb2.ModelProto(
        pieces=pieces, trainer_spec=proto.trainer_spec, normalizer_spec=proto.normalizer_spec
    )
    smaller.trainer_spec.vocab_size = len(pieces)
    old_V = np.array([0, 1, 2, 3, *(i + 1 for i in kept[3:]), tokenizer.mask_id])
    counted = count_V.sum() - count_V[:3].sum()  # without <s>, <pad>, </s>, which any vocabulary has
    coverage = float(count_V[old_V[3:]].sum() / counted) if counted else 1.0
    return Pruned(Tokenizer(smaller.SerializeToString(), origin="the pruned tokenizer"), old_V, coverage)


def cut_rows(array: np.ndarray, old_V: np.ndarray) -> np.ndarray:
    """Rows `old_V` of an array over the old ids, then zeros up to a multiple of 64 rows; the zeros have no id."""
    array = np.asarray(array)
    rows = np.zeros((-(-len(old_V) // MULTIPLE) * MULTIPLE, *array.shape[1:]), array.dtype)
    rows[: len(old_V)] = array[old_V]
    return rows


def _always(proto, tokenizer: Tokenizer, count_V: np.ndarray, prompts: Iterable[str]) -> set[int]:
    """Indices of the pieces that stay, whatever `keep` is."""
    special = {i for i, piece in enumerate(proto.pieces) if piece.type not in (piece.NORMAL, piece.UNUSED)}
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL]
    scores = [proto.pieces[i].score for i in normal]
    ends = {normal[int(np.argmin(scores))], normal[int(np.argmax(scores))]}
    of_prompts = {int(i) - 1 for ids in tokenizer.encode(list(prompts), max_length=NO_CAP)[0] for i in ids if i > 3}
    characters = {letter for i in normal if count_V[i + 1] for letter in proto.pieces[i].piece}
    single = {i for i in normal if proto.pieces[i].piece in characters}
    return special | ends | of_prompts | single


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    some: list[str] = []
    for text in texts:
        some.append(text)
        if len(some) == CHUNK:
            yield some
            some = []
    if some:
        yield some


def _has_text(path: str) -> bool:
    """Whether the first row has a "text". What cannot be read has none: the reader of pairs names the fault."""
    try:
        _, row = next(iter(inputs.rows(path)), ("", None))
    except UserError:
        return False
    return isinstance(row, dict) and "text" in row

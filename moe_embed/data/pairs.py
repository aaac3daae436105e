"""Rows to pairs: our columns, sentence-transformers', FlagEmbedding's, and those of Nomic's public data; and back to lines."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from moe_embed.config import UserError
from moe_embed.data import tables
from moe_embed.data.tables import BadRow, is_text
from moe_embed.data.tally import Tally

FLOAT_MAX = float(np.finfo(np.float32).max)  # prepare keeps scores as such
LONGEST_LANG = 64  # characters of a language's name


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query, one document that answers it, and hard negatives (documents that do not)."""

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    lang: str = ""
    id: str = ""  # of the query: what other pairs with this id answer it too. "" is the query's own text
    scores: tuple[float, ...] = ()  # a teacher's: of the document, then of each negative; () is none


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file of pairs, to be written again: what mine and filter read."""

    line: str  # one JSON object, as it stands in the file; made of the columns for CSV
    columns: dict
    pairs: list[Pair]  # one for each of its documents


def read_rows(path: str, *, query: str = "query", document: str = "document") -> Iterator[Row]:
    """The rows of a file of pairs in order. BadRow, a UserError, at the first that is none."""
    make = functools.partial(of_row, query=query, document=document)
    with contextlib.ExitStack() as files:
        opened = lambda iterator: files.enter_context(contextlib.closing(iterator))  # noqa: E731
        lines = itertools.repeat("")
        if tables.kind(path) == ".jsonl":
            decoded = (line.decode("utf-8-sig").removesuffix("\n") for line in opened(tables.read_lines(path)))
            lines = (line for line in decoded if line.strip())  # a byte-order mark alone is a blank line
        rows, again = itertools.tee(opened(tables.rows(path)))
        for pairs, (_, columns) in zip(
            Tally(path).good_of(rows, make), again, strict=False
        ):  # its checks come at the end
            line = next(lines)
            if not line:  # a short CSV row lacks values
                columns = {name: value for name, value in columns.items() if value is not None}
            yield Row(line or _json(columns), columns, pairs)


def with_negatives(row: Row, negatives: Sequence[str], scores: Sequence[float], *, document: str = "document") -> str:
    """A row's line with these negatives for its own, and the scores of its documents and then of the negatives.

    Its other columns stay. A row in BGE's columns stays in them: neg, pos_scores, neg_scores.
    """
    columns, num_documents = dict(row.columns), len(row.pairs)
    if _columns(columns, document)[1] == "neg":
        columns.pop("scores", None)
        columns |= {"neg": list(negatives), "pos_scores": list(scores[:num_documents])}
        columns["neg_scores"] = list(scores[num_documents:])
    else:
        columns |= {"negatives": list(negatives), "scores": list(scores)}
    return _json(columns)


def with_documents(row: Row, keep: Sequence[bool], *, document: str = "document") -> str:
    """A row's line with those of its documents that `keep` marks, and their scores; as it stands if that is all."""
    if all(keep):
        return row.line
    columns = dict(row.columns)
    positive = _columns(columns, document)[0]
    columns[positive] = list(itertools.compress(columns[positive], keep))
    for name in ("scores", "pos_scores"):
        if columns.get(name):
            scores = columns[name]
            columns[name] = list(itertools.compress(scores, keep)) + scores[len(keep) :]
    return _json(columns)


def of_row(row, where: str, *, query: str, document: str) -> list[Pair]:
    """A row -> a pair for each of its documents. Ours, sentence-transformers' {anchor, positive[, negative, ...]}, BGE's
    {query, pos, neg[, pos_scores, neg_scores]}, or what a row's own {"metadata": {"objective": ...}} names (Nomic's data).

    `where` is the row's place for a person. BadRow says what is wrong with it.
    """
    if not isinstance(row, dict):
        raise BadRow(f"{where} is not an object with the columns {query!r} and {document!r}.", reason="no object")
    if query not in row and isinstance(row.get("metadata"), dict):
        row = _from_objective(row, where, query, document)
    if query not in row and "anchor" in row and "positive" in row:
        row = _from_anchor(row, query, document)
    positive, negative = _columns(row, document)
    for column in (query, positive):
        if column not in row:
            side = "query" if column == query else "document"
            raise BadRow(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}; name it by --config.data.{side}=COLUMN (train) or --{side}=COLUMN.",
                reason="column missing",
            )
    documents = row[positive] if positive in ("documents", "pos") else [row[positive]]
    if not isinstance(documents, list) or not documents:
        raise BadRow(f"{where} has {positive!r}: {documents!r:.60}; it must be a list of texts.", reason="no list")
    for column, text in ((query, row[query]), *((positive, text) for text in documents)):
        if not is_text(text):
            raise BadRow(
                f"{where} has {column!r}: {text!r:.60}, which is empty or no text; a pair needs both.",
                reason="empty text" if isinstance(text, str) else "no text",
            )
    negatives = row[negative] if negative in row and row[negative] is not None else []
    if not isinstance(negatives, list) or not all(map(is_text, negatives)):
        raise BadRow(f"{where} has {negative} that are not a list of texts.", reason="negatives")
    of_documents, of_negatives = _scores(row, where, len(documents), len(negatives))
    strings = {key: name_of(row, key, where) for key in ("lang", "id")}
    return [
        Pair(row[query], text, tuple(negatives), **strings, scores=(*of_documents[i : i + 1], *of_negatives))
        for i, text in enumerate(documents)
    ]


def _from_anchor(row: dict, query: str, document: str) -> dict:
    """sentence-transformers' {anchor, positive[, negative, negative_1, ...]} under our names."""
    named = {query: row["anchor"], document: row["positive"]} | row
    if "negatives" in row and row["negatives"] is not None:  # mined ones come first; a null column is an absent one
        return named
    negatives = [row[name] for name in row if name and re.fullmatch(r"negative(_\d+)?", name) and row[name]]
    return named | {"negatives": negatives}


def _from_objective(row: dict, where: str, query: str, document: str) -> dict:
    """A row of Nomic's public data under our names: its objective lists which of its columns are a pair or a triplet."""
    objective = row["metadata"].get("objective")
    found = [(kind, columns) for kind in ("triplet", "paired") for columns in (objective or {}).get(kind) or []] if (
        isinstance(objective, dict | None)
    ) else []  # fmt: skip
    if (
        len(found) != 1
        or not isinstance(found[0][1], list)
        or len(found[0][1]) != (3 if found[0][0] == "triplet" else 2)
    ):
        raise BadRow(
            f"{where} has the objective {objective!r:.80}; one pair or one triplet of columns is read.",
            reason="objective",
        )
    columns = found[0][1]
    missing = [name for name in columns if name not in row]
    if missing:
        raise BadRow(f"{where} has no column {missing[0]!r}, which its objective names.", reason="column missing")
    named = {query: row[columns[0]], document: row[columns[1]]}
    if len(columns) == 3:
        negatives = row[columns[2]]
        named["negatives"] = negatives if isinstance(negatives, list) else [negatives]
    return named | {
        key: row[key] for key in ("lang", "id", "negatives", "scores") if key in row and row[key] is not None
    }  # mined ones come first


def name_of(row: dict, key: str, where: str) -> str:
    """A row's "lang" or "id": a string, or a whole number as one; "" where it has none."""
    value = row[key] if key in row and row[key] is not None else ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"{where} has {key!r}: {value!r:.60}, which is neither text nor a whole number.", reason=key)
    if key == "lang" and len(str(value)) > LONGEST_LANG:
        raise BadRow(f"{where} has 'lang': {value!r:.60}, which is no language's name.", reason=key)
    return str(value) if isinstance(value, int) else value.encode("utf-8", "replace").decode()


def _columns(row: dict, document: str) -> tuple[str, str]:
    """Which columns hold a row's documents and negatives."""
    if document not in row and "documents" in row:
        return "documents", "negatives"
    return ("pos", "neg") if document not in row and "pos" in row else (document, "negatives")


def _json(columns: dict) -> str:
    line = json.dumps(columns, ensure_ascii=False, default=_text)
    if tables.SURROGATE.search(line):  # half a pair cannot be said in UTF-8
        return json.dumps(columns, default=_text)
    return line


def _text(value) -> str:
    """What JSON has no kind for, of a Parquet file's columns: dates and decimals. UserError for bytes, which are no text."""
    if isinstance(value, bytes):
        raise UserError(
            f"a column holds bytes ({value!r:.40}), which a line of JSON cannot; write the file without it."
        )
    return str(value)


def _scores(row: dict, where: str, num_documents: int, num_negatives: int) -> tuple[list[float], list[float]]:
    """A teacher's scores of the documents and of the negatives: "scores", in this order, or BGE's two lists.

    An empty list is none, as null is: TFDS has no nulls, and gives one for a pair that prepare wrote without scores.
    """
    scores, aligned = row["scores"] if "scores" in row else None, True
    if scores in (None, []) and "pos_scores" in row and "neg_scores" in row and row["pos_scores"] is not None:
        scores = row["pos_scores"], row["neg_scores"] or []
        aligned = all(isinstance(part, list) for part in scores) and len(scores[0]) == num_documents
        scores = [*scores[0], *scores[1]] if aligned else scores
    if scores in (None, [], ([], [])):
        return [], []
    numbers = isinstance(scores, list) and all(isinstance(s, int | float) and abs(s) <= FLOAT_MAX for s in scores)
    if not aligned or not numbers or len(scores) != num_documents + num_negatives:
        raise BadRow(
            f"{where} has scores {scores!r:.60}; give a number for each of its {num_documents} documents, then for each "
            f"of its {num_negatives} negatives.",
            reason="scores",
        )
    return [float(s) for s in scores[:num_documents]], [float(s) for s in scores[num_documents:]]

"""Files to texts: pairs in rows of any kind (tables.py), retrieval tasks in BEIR folders. Strict: a bad row is named, never skipped."""

import contextlib
import dataclasses
import glob
import gzip
import itertools
import json
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moe_embed.config import UserError
from moe_embed.data import corpus as corpus_lib
from moe_embed.data import tables
from moe_embed.data.tables import SURROGATE, is_text

GRADE = re.compile(r"-?[0-9]{1,9}")
SIDES = ("query", "document")
FLOAT_MAX = sys.float_info.max
GROUPS = ("cqadupstack", "miracl")  # folders of tasks that count as one: BEIR's twelve forums, MIRACL's languages


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query, one document that answers it, and hard negatives (documents that do not)."""

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    lang: str = ""
    id: str = ""  # of the query: what other pairs with this id answer it too. "" is the query's own text
    scores: tuple[float, ...] = ()  # a teacher's: of the document, then of each negative; () is none
    # Of the file, from 0; a row with several documents becomes as many pairs. No part of what a pair is.
    row: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """The pairs of one file, in its order."""

    path: str
    pairs: list[Pair]
    digest: int  # CRC-32 of the file's bytes: part of the data fingerprint
    teacher: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # "query", "document": a row a pair

    def __len__(self) -> int:
        """Pairs."""
        return len(self.pairs)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one file, in its order, for masked language modelling."""

    path: str
    texts: list[str]
    langs: list[str]
    digest: int

    def __len__(self) -> int:
        """Texts."""
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file of pairs, to be written again: what mine and filter read."""

    line: str  # one JSON object, as it stands in the file; made of the columns for CSV
    columns: dict
    pairs: list[Pair]  # one for each of its documents


@dataclasses.dataclass(frozen=True)
class Task:
    """A retrieval task: find each query's relevant documents in the corpus."""

    name: str
    corpus: dict[str, str] | corpus_lib.Corpus  # document id -> text, title first; or the same left on disk
    queries: dict[str, str]  # those with a judgement
    relevance: dict[str, dict[str, int]]  # query id -> document id -> grade


def read_source(path: str, *, query: str = "query", document: str = "document", teacher: str = "") -> Source:
    """Read a file of pairs; `query` and `document` name its columns. UserError names file, line and fault.

    `teacher`: also memory-map another model's vectors, PATH.<teacher>.query.npy and PATH.<teacher>.document.npy.
    """
    data = tables.read_bytes(path)
    pairs = [
        pair
        for number, (where, row) in enumerate(tables.rows(path, data))
        for pair in _pairs(row, where, number, query=query, document=document)
    ]
    if not pairs:
        raise UserError(f"{path} holds no pairs.")
    vectors = {side: _read_vectors(f"{path}.{teacher}.{side}.npy", len(pairs)) for side in SIDES if teacher}
    dims = [array.shape[1] for array in vectors.values()]
    if len(set(dims)) > 1:
        raise UserError(
            f"{path}.{teacher}.query.npy has {dims[0]} dims, .document.npy {dims[1]}; give one model's vectors."
        )
    return Source(path=path, pairs=pairs, digest=zlib.crc32(data), teacher=vectors)


def read_text_source(path: str, *, column: str = "document") -> Texts:
    """Read the "text" of each row of a file, or else `column` (a file of pairs). UserError names file, line and fault."""
    data = tables.read_bytes(path)
    texts, langs = [], []
    for where, row in tables.rows(path, data):
        name = "text" if isinstance(row, dict) and "text" in row else column
        if not isinstance(row, dict) or name not in row or not is_text(row[name]):
            raise UserError(f"{where} has no text in a column 'text' or {column!r}.")
        texts.append(row[name])
        langs.append(_name(row, "lang", where))
    if not texts:
        raise UserError(f"{path} holds no texts.")
    return Texts(path, texts, langs, zlib.crc32(data))


def read_rows(path: str, *, query: str = "query", document: str = "document") -> Iterator[Row]:
    """The rows of a file of pairs in order; `read_source` and its faults, row by row."""
    data = tables.read_bytes(path)
    if tables.kind(path) != ".jsonl":
        lines = itertools.repeat("")
    else:
        lines = iter([line for line in tables.decode(path, data).split("\n") if line.strip()])
    number = -1
    for number, (where, columns) in enumerate(tables.rows(path, data)):
        line, pairs = next(lines), _pairs(columns, where, number, query=query, document=document)
        if not line:  # a short CSV row lacks values, a long one has some without a name
            columns = {name: value for name, value in columns.items() if name is not None and value is not None}
        yield Row(line or _json(columns), columns, pairs)
    if number < 0:
        raise UserError(f"{path} holds no pairs.")


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


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    """Write a .jsonl or .jsonl.gz file, whole or not at all: under PATH.partial until the last line is on disk."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        plain = contextlib.nullcontext(file)
        # without a name and a date inside: the same lines are the same bytes
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.name.endswith(".gz") else plain as out:
            for line in lines:
                out.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def find_files(text: str) -> list[str]:
    """Paths and patterns (`pairs/*.jsonl.gz`), separated by commas -> files, each once. UserError for what matches none."""
    found = []
    for part in filter(None, text.split(",")):
        paths = [part] if os.path.isfile(part) else sorted(glob.glob(part, recursive=True))
        if not paths:
            raise UserError(f"{part} does not exist, and is no pattern of files that do.")
        found += [path for path in paths if path not in found]
    if not found:
        raise UserError(f"{text!r} names no file.")
    return found


def read_task(folder: str, *, split: str = "test", on_disk: bool = False) -> Task:
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv. UserError names file, line and fault.

    With `on_disk` the documents' texts are left there, and read again when they are asked for.
    """
    root = pathlib.Path(folder)
    qrels = root / "qrels" / f"{split}.tsv"
    for path in (root / "corpus.jsonl", root / "queries.jsonl", qrels):
        if not path.is_file():
            raise UserError(f"{folder} is not a BEIR folder with the split {split!r}: {path} does not exist.")
    texts = corpus_lib.by_id(root / "queries.jsonl", lambda row: row["text"])
    relevance: dict[str, dict[str, int]] = {}
    header, *lines = tables.decode(qrels, tables.read_bytes(str(qrels))).splitlines() or [""]
    if GRADE.fullmatch(header.rpartition("\t")[2]):
        raise UserError(f"{qrels}:1 is a judgement; the first line of qrels is 'query-id<TAB>corpus-id<TAB>score'.")
    judgements = [line.split("\t") for line in lines]
    for number, fields in enumerate(judgements, start=2):
        if len(fields) != 3 or not GRADE.fullmatch(fields[2]):
            raise UserError(f"{qrels}:{number} is not 'query-id<TAB>corpus-id<TAB>grade'.")
    corpus, known = corpus_lib.read(root / "corpus.jsonl", judged={fields[1] for fields in judgements}, on_disk=on_disk)
    for number, (query_id, document_id, grade) in enumerate(judgements, start=2):
        if query_id not in texts or document_id not in known:
            raise UserError(f"{qrels}:{number} names {query_id} and {document_id}; one of them does not exist.")
        relevance.setdefault(query_id, {})[document_id] = int(grade)
    if not relevance:
        raise UserError(f"{qrels} judges no query.")
    for query_id in relevance:
        if not is_text(texts[query_id]):
            raise UserError(f"{root / 'queries.jsonl'}: the query {query_id} is empty or no text.")
    group = root.resolve().parent.name
    name = f"{group}/{root.name}" if group in GROUPS else root.name
    return Task(name, corpus, {query_id: texts[query_id] for query_id in relevance}, relevance)


def read_corpus(path: str | pathlib.Path) -> dict[str, str]:
    """A BEIR corpus.jsonl: document id -> text, title first, without the empty ones. UserError names file and fault."""
    corpus, _ = corpus_lib.read(pathlib.Path(path))
    if not corpus:
        raise UserError(f"{path} holds no documents.")
    return corpus


def read_texts(path: str, *, stream: Iterable[bytes] | None = None) -> Iterator[str]:
    """The "text" of each line of a JSONL file (or of `stream`) as it comes; UserError names the line that has none."""
    for where, row in tables.json_rows(path, tables.read_lines(path) if stream is None else stream, every_line=True):
        if not isinstance(row, dict) or not is_text(row.get("text")):
            raise UserError(f'{where} has no text; each line is {{"text": "..."}} with something in it.')
        yield row["text"]


def _read_vectors(path: str, num_rows: int) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the teacher's vectors {path} cannot be read: {error}.") from error
    if not isinstance(vectors, np.ndarray):
        raise UserError(f"the teacher's vectors {path} cannot be read: it is an archive of arrays.")
    if vectors.ndim != 2 or vectors.shape[0] != num_rows or vectors.dtype.kind != "f":
        raise UserError(f"{path} is {vectors.dtype} {list(vectors.shape)}; it must be floats, [{num_rows} pairs, dim].")
    return vectors


def _pairs(row, where: str, number: int, *, query: str, document: str) -> list[Pair]:
    """A row -> a pair for each of its documents. Ours, or BGE's {query, pos, neg[, pos_scores, neg_scores]}."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with the columns {query!r} and {document!r}.")
    if query not in row and "anchor" in row and "positive" in row:
        row = _from_anchor(row, query, document)
    positive, negative = _columns(row, document)
    for column in (query, positive):
        if column not in row:
            side = "query" if column == query else "document"
            raise UserError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}; name it by --config.data.{side}=COLUMN."
            )
    documents = row[positive] if positive in ("documents", "pos") else [row[positive]]
    if not isinstance(documents, list) or not documents:
        raise UserError(f"{where} has {positive!r}: {documents!r:.60}; it must be a list of texts.")
    for column, text in ((query, row[query]), *((positive, text) for text in documents)):
        if not is_text(text):
            raise UserError(f"{where} has {column!r}: {text!r:.60}, which is empty or no text; a pair needs both.")
    negatives = row[negative] if negative in row else []
    if not isinstance(negatives, list) or not all(map(is_text, negatives)):
        raise UserError(f"{where} has {negative} that are not a list of texts.")
    of_documents, of_negatives = _scores(row, where, len(documents), len(negatives))
    strings = {key: _name(row, key, where) for key in ("lang", "id")}
    return [
        Pair(
            row[query], text, tuple(negatives), **strings, scores=(*of_documents[i : i + 1], *of_negatives), row=number
        )
        for i, text in enumerate(documents)
    ]


def _from_anchor(row: dict, query: str, document: str) -> dict:
    """sentence-transformers' {anchor, positive[, negative, negative_1, ...]} under our names."""
    negatives = [row[name] for name in row if name and re.fullmatch(r"negative(_\d+)?", name) and row[name]]
    named = {query: row["anchor"], document: row["positive"]}
    return named | ({} if "negatives" in row else {"negatives": negatives}) | row


def _name(row: dict, key: str, where: str) -> str:
    """A row's "lang" or "id": a string, or a whole number as one; "" where it has none."""
    value = row[key] if key in row and row[key] is not None else ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where} has {key!r}: {value!r:.60}, which is neither text nor a whole number.")
    return str(value)


def _columns(row: dict, document: str) -> tuple[str, str]:
    """Which columns hold a row's documents and negatives."""
    if document not in row and "documents" in row:
        return "documents", "negatives"
    return ("pos", "neg") if document not in row and "pos" in row else (document, "negatives")


def _json(columns: dict) -> str:
    line = json.dumps(columns, ensure_ascii=False)
    return json.dumps(columns) if SURROGATE.search(line) else line  # half a pair cannot be said in UTF-8


def _scores(row: dict, where: str, num_documents: int, num_negatives: int) -> tuple[list[float], list[float]]:
    """A teacher's scores of the documents and of the negatives: "scores", in this order, or BGE's two lists."""
    scores, aligned = row["scores"] if "scores" in row else None, True
    if scores is None and "pos_scores" in row and "neg_scores" in row and row["pos_scores"] is not None:
        scores = row["pos_scores"], row["neg_scores"] or []
        aligned = all(isinstance(part, list) for part in scores) and len(scores[0]) == num_documents
        scores = [*scores[0], *scores[1]] if aligned else scores
    if scores is None:
        return [], []
    numbers = isinstance(scores, list) and all(isinstance(s, int | float) and abs(s) <= FLOAT_MAX for s in scores)
    if not aligned or not numbers or len(scores) != num_documents + num_negatives:
        raise UserError(
            f"{where} has scores {scores!r:.60}; give a number for each of its {num_documents} documents, then for each "
            f"of its {num_negatives} negatives."
        )
    return [float(s) for s in scores[:num_documents]], [float(s) for s in scores[num_documents:]]

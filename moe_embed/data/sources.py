"""Files to texts: pairs in JSONL(.gz) or CSV, retrieval tasks in BEIR folders. Strict: a bad row is named, never skipped."""

import csv
import dataclasses
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Iterator

from moe_embed.config import UserError

GRADE = re.compile(r"-?[0-9]{1,9}")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query, its document, and hard negatives (documents that do not answer it)."""

    query: str
    document: str
    negatives: tuple[str, ...] = ()
    lang: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """The pairs of one file, in its order."""

    path: str
    pairs: list[Pair]
    digest: int  # CRC-32 of the file's bytes: part of the data fingerprint


@dataclasses.dataclass(frozen=True)
class Task:
    """A retrieval task: find each query's relevant documents in the corpus."""

    name: str
    corpus: dict[str, str]  # document id -> text, title first
    queries: dict[str, str]  # those with a judgement
    relevance: dict[str, dict[str, int]]  # query id -> document id -> grade


def read_source(path: str, *, query: str = "query", document: str = "document") -> Source:
    """Read a file of pairs; `query` and `document` name its columns. UserError names file, line and fault."""
    data = _read_bytes(path)
    pairs = [_pair(row, where, query=query, document=document) for where, row in _rows(path, data)]
    if not pairs:
        raise UserError(f"{path} holds no pairs.")
    return Source(path=path, pairs=pairs, digest=zlib.crc32(data))


def read_task(folder: str, *, split: str = "test") -> Task:
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv. UserError names file, line and fault."""
    root = pathlib.Path(folder)
    qrels = root / "qrels" / f"{split}.tsv"
    for path in (root / "corpus.jsonl", root / "queries.jsonl", qrels):
        if not path.is_file():
            raise UserError(f"{folder} is not a BEIR folder with the split {split!r}: {path} does not exist.")
    documents = _read_documents(root / "corpus.jsonl")
    texts = {row["_id"]: row["text"] for _, row in _beir_rows(root / "queries.jsonl")}
    relevance: dict[str, dict[str, int]] = {}
    header, *lines = _decode(qrels, _read_bytes(str(qrels))).splitlines() or [""]
    if GRADE.fullmatch(header.rpartition("\t")[2]):
        raise UserError(f"{qrels}:1 is a judgement; the first line of qrels is 'query-id<TAB>corpus-id<TAB>score'.")
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != 3 or not GRADE.fullmatch(fields[2]):
            raise UserError(f"{qrels}:{number} is not 'query-id<TAB>corpus-id<TAB>grade'.")
        query_id, document_id, grade = fields
        if query_id not in texts or document_id not in documents:
            raise UserError(f"{qrels}:{number} names {query_id} and {document_id}; one of them does not exist.")
        relevance.setdefault(query_id, {})[document_id] = int(grade)
    if not relevance:
        raise UserError(f"{qrels} judges no query.")
    for query_id in relevance:
        if not is_text(texts[query_id]):
            raise UserError(f"{root / 'queries.jsonl'}: the query {query_id} is empty or no text.")
    corpus = {document_id: text for document_id, text in documents.items() if is_text(text)}  # BEIR has empty ones
    return Task(root.name, corpus, {query_id: texts[query_id] for query_id in relevance}, relevance)


def read_corpus(path: str | pathlib.Path) -> dict[str, str]:
    """A BEIR corpus.jsonl: document id -> text, title first, without the empty ones. UserError names file and fault."""
    corpus = {document_id: text for document_id, text in _read_documents(pathlib.Path(path)).items() if is_text(text)}
    if not corpus:
        raise UserError(f"{path} holds no documents.")
    return corpus


def read_texts(path: str, *, stream=None) -> list[str]:
    """The "text" of each line of a JSONL file (or of `stream`); UserError names the line that has none."""
    data = _read_bytes(path) if stream is None else stream.read()
    texts = []
    for where, row in _json_rows(path, data, every_line=True):
        if not isinstance(row, dict) or not is_text(row.get("text")):
            raise UserError(f'{where} has no text; each line is {{"text": "..."}} with something in it.')
        texts.append(row["text"])
    return texts


def _read_documents(path: pathlib.Path) -> dict[str, str]:
    return {row["_id"]: _document(row) for _, row in _beir_rows(path)}


def is_text(value) -> bool:
    """Whether a value is a string with something in it that UTF-8 can say (JSON can hold half a surrogate pair)."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def _read_bytes(path: str) -> bytes:
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path} does not exist, or is no file.")
    try:
        data = pathlib.Path(path).read_bytes()
        return gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _rows(path: str, data: bytes) -> Iterator[tuple[str, dict]]:
    name = path.removesuffix(".gz")
    if name.endswith(".csv"):
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(io.StringIO(_decode(path, data), newline=""), strict=True)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not CSV: {error}.") from error
    elif name.endswith(".jsonl"):
        yield from _json_rows(path, data)
    else:
        raise UserError(f"{path} is no file of pairs we read; its name ends in .jsonl, .jsonl.gz or .csv.")


def _json_rows(path, data: bytes, *, every_line: bool = False) -> Iterator[tuple[str, dict]]:
    """(file:line, value) of each line; blank lines are passed over, unless a line's place matters (`every_line`)."""
    lines = _decode(path, data).rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() and (not every_line or len(lines) == 1):
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); each line is one object.") from error


def _decode(path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # a spreadsheet's byte-order mark is not part of the first column's name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8; convert the file.") from error


def _pair(row, where: str, *, query: str, document: str) -> Pair:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with the columns {query!r} and {document!r}.")
    for column in (query, document):
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}.")
        if not is_text(row[column]):
            raise UserError(
                f"{where} has {column!r}: {row[column]!r:.60}, which is empty or no text; a pair needs both."
            )
    negatives = row["negatives"] if "negatives" in row else []
    if not isinstance(negatives, list) or not all(map(is_text, negatives)):
        raise UserError(f"{where} has negatives that are not a list of texts.")
    lang = row["lang"] if "lang" in row and isinstance(row["lang"], str) else ""
    return Pair(row[query], row[document], tuple(negatives), lang)


def _beir_rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    seen = set()
    for where, row in _json_rows(path, _read_bytes(str(path))):
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise UserError(f'{where} needs the strings "_id" and "text".')
        if row["_id"] in seen:
            raise UserError(f"{where} has the _id {row['_id']!r} a second time.")
        seen.add(row["_id"])
        yield where, row


def _document(row: dict) -> str:
    title = row["title"] if isinstance(row.get("title"), str) else ""
    return f"{title} {row['text']}".strip()

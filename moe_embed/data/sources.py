"""Files to texts: pairs and texts in files of rows (tables.py, pairs.py), retrieval tasks in BEIR folders."""

import contextlib
import dataclasses
import functools
import gzip
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.data import corpus as corpus_lib
from moe_embed.data import inputs, mixture, prepared, tables
from moe_embed.data import origin as origin_lib
from moe_embed.data import pairs as pairs_lib
from moe_embed.data.pairs import Pair
from moe_embed.data.tables import BadRow, is_text
from moe_embed.data.tally import Tally

GRADE = re.compile(r"-?[0-9]{1,9}")
SIDES = ("query", "document")


@dataclasses.dataclass(frozen=True)
class Source:
    """The pairs of one file, in its order: a list, or what reads them where they lie (prepared.py)."""

    path: str
    pairs: Sequence[Pair]
    digest: int  # CRC-32 of the file's bytes: part of the data fingerprint
    teacher: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # "query", "document": a row a pair
    left_out: str = ""  # a sentence on its bad rows

    def __getstate__(self) -> dict:
        """To another process go the names of the teacher's files: a pickled memory map is all of its bytes."""
        return self.__dict__ | {"teacher": {side: vectors.filename for side, vectors in self.teacher.items()}}

    def __setstate__(self, state: dict) -> None:
        teacher = {side: stored.map_array(pathlib.Path(name)) for side, name in state["teacher"].items()}
        self.__dict__.update(state | {"teacher": teacher})

    def __len__(self) -> int:
        """Pairs."""
        return len(self.pairs)

    def by_language(self) -> dict[str, mixture.Places]:
        """Where the pairs of each language are."""
        if isinstance(self.pairs, list):
            return mixture.by_language([pair.lang for pair in self.pairs])
        return self.pairs.by_language

    def take(self, places: np.ndarray) -> list[Pair]:
        """The pairs at these places."""
        return [self.pairs[i] for i in places] if isinstance(self.pairs, list) else self.pairs.take(places)


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one file, in its order, for masked language modelling."""

    path: str
    texts: list[str]
    langs: list[str]
    digest: int
    left_out: str = ""

    def __len__(self) -> int:
        """Texts."""
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Task:
    """A retrieval task: find each query's relevant documents in the corpus."""

    name: str
    corpus: dict[str, str] | corpus_lib.Corpus  # document id -> text, title first; or the same left on disk
    queries: dict[str, str]  # those with a judgement
    relevance: dict[str, dict[str, int]]  # query id -> document id -> grade
    origin: origin_lib.Origin = dataclasses.field(default_factory=origin_lib.Origin)


def read_sources(path: str, **options) -> list[Source]:
    """The sources of a path: those of a folder that `prepare` made, each input one; else `read_source`, one."""
    root = pathlib.Path(path)
    if not root.is_dir():
        return [read_source(path, **options)]
    if options.get("teacher"):
        raise UserError(f"{path} is a prepared data set; another model's vectors are read beside plain files only.")
    return [Source(name, pairs, digest) for name, pairs, digest in _prepared(root)]


def read_text_sources(path: str, **options) -> list[Texts]:
    """The same for masked language modelling: the documents of a folder that `prepare` made, in memory."""
    root = pathlib.Path(path)
    if not root.is_dir():
        return [read_text_source(path, **options)]
    found = [(name, list(pairs), digest) for name, pairs, digest in _prepared(root)]
    return [Texts(name, [p.document for p in pairs], [p.lang for p in pairs], digest) for name, pairs, digest in found]


def _prepared(root: pathlib.Path) -> Iterator[tuple[str, prepared.Records, int]]:
    """prepared.sources of a folder; of a BEIR folder the sentence says what makes it one."""
    if not (root / prepared.MANIFEST).exists() and all((root / file).is_file() for file in inputs.BEIR):
        raise UserError(
            f"{root} is a BEIR folder; run prepare on it first, and name what that makes: "
            f"python -m moe_embed.prepare --input={root} --output=DIR"
        )
    return prepared.sources(root)


def read_source(
    path: str, *, query: str = "query", document: str = "document", teacher: str = "", max_bad_fraction: float = 0.0
) -> Source:
    """Read a file of pairs; `query` and `document` name its columns. UserError names file, line and fault.

    `teacher`: also memory-map another model's vectors, PATH.<teacher>.query.npy and PATH.<teacher>.document.npy.
    Bad rows are left out and counted, up to `max_bad_fraction` of all.
    """
    tally = Tally(path, max_bad_fraction=max_bad_fraction)
    make = functools.partial(pairs_lib.of_row, query=query, document=document)
    pairs = [pair for of_row in tally.good_of(inputs.rows(path), make) for pair in of_row]
    vectors = {side: _read_vectors(f"{path}.{teacher}.{side}.npy", len(pairs)) for side in SIDES if teacher}
    dims = [array.shape[1] for array in vectors.values()]
    if len(set(dims)) > 1:
        raise UserError(
            f"{path}.{teacher}.query.npy has {dims[0]} dims, .document.npy {dims[1]}; give one model's vectors."
        )
    return Source(path, pairs, inputs.digest(path), vectors, left_out=str(tally) if tally.bad else "")


def read_text_source(path: str, *, column: str = "document", max_bad_fraction: float = 0.0) -> Texts:
    """Read the "text" of each row of a file, or else `column` (a file of pairs). Faults as for `read_source`."""

    def make(row, where: str) -> tuple[str, str]:
        name = "text" if isinstance(row, dict) and "text" in row else column
        if not isinstance(row, dict) or name not in row or not is_text(row[name]):
            raise BadRow(f"{where} has no text in a column 'text' or {column!r}.", reason="no text")
        return row[name], pairs_lib.name_of(row, "lang", where)

    tally = Tally(path, of="texts", max_bad_fraction=max_bad_fraction)
    texts, langs = zip(*tally.good_of(inputs.rows(path), make), strict=True)
    return Texts(path, list(texts), list(langs), inputs.digest(path), left_out=str(tally) if tally.bad else "")


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


def read_task(folder: str, *, split: str | None = None, on_disk: bool = False) -> Task:
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv. UserError names file, line and fault.

    `split` None is the one that its task.json names (origin.py), else test. With `on_disk` the documents' texts are left
    there, and read again when they are asked for.
    """
    root = pathlib.Path(folder)
    origin = origin_lib.of_folder(root)
    split = origin.split if split is None else split
    qrels = root / "qrels" / f"{split}.tsv"
    for path in (root / "corpus.jsonl", root / "queries.jsonl", qrels):
        if not path.is_file():
            inside = sorted(found.parent.name for found in root.glob("*/corpus.jsonl"))
            hint = f" There are some in it: {', '.join(inside[:5])}." if inside else ""
            raise UserError(f"{folder} is not a BEIR folder with the split {split!r}: {path} does not exist.{hint}")
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
    queries = {query_id: texts[query_id] for query_id in relevance}
    return Task(origin.name, corpus, queries, relevance, dataclasses.replace(origin, split=split))


def read_corpus(path: str | pathlib.Path) -> dict[str, str]:
    """A BEIR corpus.jsonl: document id -> text, title first, without the empty ones. UserError names file and fault."""
    corpus, _ = corpus_lib.read(pathlib.Path(path))
    if not corpus:
        raise UserError(f"{path} holds no documents.")
    return corpus


def read_texts(path: str, *, stream: BinaryIO | None = None) -> Iterator[str]:
    """The "text" of each line of a JSONL file (or of `stream`) as it comes; UserError names the line that has none."""
    for where, row in tables.json_rows(
        path, tables.read_lines(path) if stream is None else tables.lines(path, stream), every_line=True
    ):
        if not isinstance(row, dict) or not is_text(row.get("text")):
            raise UserError(f'{where} has no text; each line is {{"text": "..."}} with something in it.')
        yield row["text"]


def _read_vectors(path: str, num_rows: int) -> np.ndarray:
    try:
        vectors = stored.map_array(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"the teacher's vectors {path} cannot be read: {error}.") from error
    if vectors.ndim != 2 or vectors.shape[0] != num_rows or vectors.dtype.kind != "f":
        raise UserError(f"{path} is {vectors.dtype} {list(vectors.shape)}; it must be floats, [{num_rows} pairs, dim].")
    return vectors

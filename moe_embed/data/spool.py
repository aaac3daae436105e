"""The passes of `prepare`: inputs are read into spools, copies are found over all of them, and the rest goes to shards.

A spool is an input's good pairs as they will stand in the shards, one after the other in a file, with arrays of where
each begins and of facts about it. A folder's report.json is written last and makes the pass done; a shard's is beside it in
the work folder.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python import array_record_module
from etils import epath

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.data import hygiene, inputs, prepared, tables
from moe_embed.data import pairs as pairs_lib
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.data.hygiene import Rules
from moe_embed.data.pairs import Pair
from moe_embed.data.sources import read_task
from moe_embed.data.tally import Tally

FACTS = np.dtype([("key", "<u8"), ("bytes", "<u4"), ("lang", "<u4"), ("query", "<u4"), ("document", "<u4")])
CHUNK = 4096  # pairs tokenised together, or of fewer so many
CHARACTERS = 2**24
READ = 2**22  # bytes of a file read at once
BINS = 2 ** np.arange(4, 14)  # of the histogram of tokens: up to 16, 32, ... 8,192, and more


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides which pairs of an input are kept."""

    query: str = "query"  # columns
    document: str = "document"
    lang: str = ""  # of rows without one
    tokenizer: str = ""  # counts tokens
    max_bad_fraction: float = 0.0
    rules: Rules = dataclasses.field(default_factory=Rules)
    benchmarks: tuple[str, ...] = ()  # BEIR folders


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every kept pair will stand: pieces in order, each some rows of one input."""

    pieces: list[tuple[int, np.ndarray]]  # (input, its rows), a language of an input each
    folders: list[pathlib.Path]
    sources: list[dict]  # of the manifest: {"name", "languages": [[lang, count], ...]}
    copies: list[int]  # dropped, by input

    @property
    def total(self) -> int:
        """Pairs."""
        return sum(len(rows) for _, rows in self.pieces)


def check(settings: Settings) -> None:
    """UserError, before any work, where the tokenizer or a benchmark cannot be read."""
    tokenizer_lib.read(settings.tokenizer)
    _benchmark(settings.benchmarks, settings.rules.ngram)


def identity(name: str) -> dict:
    """What tells an input from a changed one of the same name: of a file the CRC-32 of its bytes, packed as they are.

    Packed they are quickly read, and what is wrong with them is for `fill` to say, which knows the row.
    """
    path = epath.Path(name)
    if name.startswith((inputs.TFDS, inputs.HUB)) or path.is_dir():
        files = [path / file for file in inputs.BEIR] if path.is_dir() else []
        size = sum(file.stat().length for file in files if file.exists())
        return {"name": name, "bytes": size, "digest": inputs.digest(name)}
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ):
                crc = zlib.crc32(chunk, crc)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error}.") from error
    return {"name": name, "bytes": path.stat().length, "digest": crc}


def benchmark_identity(folder: str) -> dict:
    """What tells a benchmark from a changed one of the same name. UserError where it is no BEIR folder."""
    files = ("queries.jsonl", "corpus.jsonl", *(f"qrels/{split}.tsv" for split in _splits(folder)))
    return {"name": folder, "digests": {file: tables.digest(f"{folder}/{file}") for file in files}}


def fill(name: str, folder: pathlib.Path, settings: Settings) -> None:
    """Read an input into its spool, unless that is done. UserError names the input, and the row where there is one."""
    if (folder / "report.json").exists() and (folder / "starts").exists():
        return
    # An earlier version wrote no starts: beside its report half of them would be believed to be all.
    (folder / "report.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    tally = Tally(name, max_bad_fraction=settings.max_bad_fraction)
    langs, counts = {}, Counts()
    with (
        open(folder / "records", "wb") as records,
        open(folder / "starts", "wb") as starts,
        open(folder / "facts", "wb") as facts,
    ):
        for kept in _chunks(_kept(_pairs(name, tally, settings, counts), settings, counts)):
            array, start = np.zeros(len(kept), FACTS), records.tell()
            array["query"], array["document"] = _lengths(kept, settings.tokenizer)
            for fact, pair in zip(array, kept, strict=True):
                record = prepared.to_bytes(pair)
                records.write(record)
                fact["key"], fact["bytes"] = hygiene.key(pair), len(record)
                fact["lang"] = langs.setdefault(pair.lang, len(langs))
            facts.write(array.tobytes())
            starts.write((start + np.cumsum(array["bytes"], dtype="<u8") - array["bytes"]).tobytes())
        for file in (records, starts, facts):
            file.flush()
            os.fsync(file.fileno())
    report = {"name": name, "rows": tally.good + tally.bad.total(), "pairs": counts.pairs, "bad": dict(tally.bad)}
    report |= {"examples": tally.first, "dropped": dict(counts.dropped), "langs": list(langs)}
    report |= {"digest": inputs.digest(name), "answers": counts.answers, "of_benchmark": counts.of_benchmark}
    stored.write_json(folder / "report.json", report)


@dataclasses.dataclass
class Counts:
    """What `fill` counts of an input, beside bad rows: pairs, those left out by rule, and negatives left out of pairs that stay."""

    pairs: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    answers: int = 0  # of their own row
    of_benchmark: int = 0


def _pairs(name: str, tally: Tally, settings: Settings, counts: Counts) -> Iterator[Pair]:
    """The good pairs of an input, in order; of a BEIR folder, whose texts are held in memory, queries with relevant documents.

    Negatives that are answers of their own row are left out.
    """
    if epath.Path(name).is_dir() and not name.startswith((inputs.TFDS, inputs.HUB)):
        yield from tally.good_of(_judged(name, settings.lang), lambda pair, place: pair)
        return
    make = functools.partial(pairs_lib.of_row, query=settings.query, document=settings.document)
    for of_row in tally.good_of(inputs.rows(name), make):
        pairs, count = hygiene.without_answers(of_row)
        counts.answers += count
        for pair in pairs:
            yield pair if pair.lang or not settings.lang else dataclasses.replace(pair, lang=settings.lang)


def _judged(folder: str, lang: str) -> Iterator[tuple[str, Pair | tables.BadRow]]:
    """A BEIR folder's pairs; a judged document without a text, or of which there is none, is a bad row."""
    task = read_task(folder, split="train")
    for q, judged in task.relevance.items():
        for d, grade in judged.items():
            if grade > 0 and d in task.corpus:
                yield f"{folder}, {q}", Pair(task.queries[q], task.corpus[d], (), lang, q)
            elif grade > 0:
                sentence = f"{folder}: the document {d!r:.60} that answers {q!r:.60} has no text in corpus.jsonl."
                yield f"{folder}, {q}", tables.BadRow(sentence, reason="empty text")


def _kept(pairs: Iterator[Pair], settings: Settings, counts: Counts) -> Iterator[Pair]:
    """What the rules leave of pairs, and of their negatives."""
    benchmark = _benchmark(settings.benchmarks, settings.rules.ngram)
    for pair in pairs:
        counts.pairs += 1
        if fault := hygiene.fault(pair, settings.rules, benchmark):
            counts.dropped[fault] += 1
        else:
            pair, count = hygiene.without_benchmark(pair, settings.rules, benchmark)
            counts.of_benchmark += count
            yield pair


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    chunk, characters = [], 0
    for pair in pairs:
        chunk.append(pair)
        characters += len(pair.query) + len(pair.document) + sum(map(len, pair.negatives))
        if len(chunk) == CHUNK or characters > CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def _lengths(pairs: Sequence[Pair], tokenizer: str) -> tuple[np.ndarray, np.ndarray]:
    count = _tokenizer(tokenizer).count
    return count([pair.query for pair in pairs]), count([pair.document for pair in pairs])


@functools.cache
def _tokenizer(path: str):
    return tokenizer_lib.read(path)


@functools.cache
def _benchmark(folders: tuple[str, ...], ngram: int) -> frozenset[int]:
    texts = []
    for folder in folders:
        for split in _splits(folder):
            task = read_task(folder, split=split)
            texts += task.queries.values()
            texts += {task.corpus[d] for judged in task.relevance.values() for d in judged if d in task.corpus}
    return hygiene.of_benchmarks(texts, ngram)


def _splits(folder: str) -> list[str]:
    splits = sorted(path.stem for path in (pathlib.Path(folder) / "qrels").glob("*.tsv"))
    if not splits:
        raise UserError(f"{folder} is not a BEIR folder: it has no qrels/*.tsv.")
    return splits


def without_copies(folders: Sequence[pathlib.Path]) -> list[np.ndarray]:
    """For each input bool [pairs]: those that are not a copy of an earlier pair, in this input or another."""
    return hygiene.first_of_its_kind([_facts(folder)["key"] for folder in folders])


def lay_out(names: Sequence[str], folders: Sequence[pathlib.Path], kept: Sequence[np.ndarray]) -> Layout:
    """Input by input, and within one language by language. UserError for an input of which nothing is left."""
    pieces, sources, copies = [], [], []
    for number, (name, folder, keep) in enumerate(zip(names, folders, kept, strict=True)):
        facts, langs = _facts(folder), report_of(folder)["langs"]
        if not keep.any():
            why = "all of its pairs are copies of earlier inputs'" if len(keep) else "the rules leave nothing"
            raise UserError(f"{name}: {why}; leave it out, or relax them.")
        order = sorted(range(len(langs)), key=lambda code: langs[code])
        rows = [np.flatnonzero(keep & (facts["lang"] == code)) for code in order]
        pieces += [(number, some) for some in rows if len(some)]
        counts = [[langs[code], len(some)] for code, some in zip(order, rows, strict=True) if len(some)]
        tokens = [_histogram(np.asarray(facts[side][keep])) for side in ("query", "document")]
        sums = [int(facts[side][keep].sum(dtype=np.int64)) for side in ("query", "document")]
        sources.append({"name": name, "languages": counts, "tokens": sums, "histogram": tokens})
        copies.append(int((~keep).sum()))
    return Layout(pieces, list(folders), sources, copies)


def pieces_of(layout: Layout, number: int, count: int) -> list[tuple[pathlib.Path, np.ndarray]]:
    """What goes to shard `number` of `count`: some rows of a spool after the other. A process is given no more than that."""
    first, last = (layout.total * i // count for i in (number, number + 1))
    start, pieces = 0, []
    for source, rows in layout.pieces:
        some = rows[max(first - start, 0) : max(last - start, 0)]
        start += len(rows)
        pieces += [(layout.folders[source], some)] if len(some) else []
    return pieces


def write_shard(
    output: pathlib.Path, work: pathlib.Path, pieces: Sequence[tuple[pathlib.Path, np.ndarray]], number: int, count: int
) -> dict:
    """Write shard `number` of `count`, its `pieces_of`, unless that is done: {"file", "records", "bytes", "sha256"}."""
    done = work / f"shard-{number:05d}.json"
    path = output / prepared.shard_name(number, count)
    if done.exists() and path.exists():
        return json.loads(done.read_text())
    partial = path.with_name(path.name + ".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), prepared.WRITER)
    for folder, rows in pieces:
        for record in _records(folder, rows):
            writer.write(record)
    writer.close()
    with open(partial, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    partial.replace(path)
    records = sum(len(rows) for _, rows in pieces)
    shard = {"file": path.name, "records": records, "bytes": path.stat().st_size, "sha256": sha256}
    stored.write_json(done, shard)
    return shard


def _records(folder: pathlib.Path, rows: np.ndarray) -> Iterator[bytes]:
    """Some rows of a spool, in order. Only what is asked for is read: a spool may be all that memory holds."""
    starts, sizes = np.memmap(folder / "starts", "<u8", "r")[rows], _facts(folder)["bytes"][rows]
    data = np.memmap(folder / "records", np.uint8, "r")
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        yield data[start : start + size].tobytes()


def write_tfds_metadata(output: pathlib.Path, shards: Sequence[dict]) -> None:
    """What makes the folder a data set of TFDS, of one split."""
    import tensorflow_datasets as tfds  # a second to import

    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    features = {name: text for name in ("query", "document", "lang", "id")}
    features |= {"negatives": texts, "scores": tfds.features.Sequence(np.float32)}
    template = tfds.core.ShardedFileTemplate(
        data_dir=output, dataset_name=prepared.NAME, split=prepared.SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=prepared.SPLIT,
        shard_lengths=[shard["records"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=output, features=tfds.features.FeaturesDict(features), split_infos=[split], check_data=False,
        description="Pairs prepared by moe_embed; manifest.json says of what.",
    )  # fmt: skip


def reports(folders: Sequence[pathlib.Path]) -> list[dict]:
    """What `fill` wrote down of each input."""
    return [report_of(folder) for folder in folders]


def report_of(folder: pathlib.Path) -> dict:
    """What `fill` wrote down of one input."""
    return json.loads((folder / "report.json").read_text("utf-8"))


def _facts(folder: pathlib.Path) -> np.ndarray:
    file = folder / "facts"
    return np.memmap(file, FACTS, "r") if file.stat().st_size else np.zeros(0, FACTS)


def _histogram(tokens: np.ndarray) -> list[int]:
    """How many of `tokens` are at most each of BINS, and above the last."""
    return np.bincount(np.searchsorted(BINS, tokens), minlength=len(BINS) + 1).tolist()

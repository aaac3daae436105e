"""A prepared data set: shards of ArrayRecord that TFDS reads too, and a manifest. Pairs are read where they lie, by place.

Written by `python -m moe_embed.prepare`. The records stand source by source, and within a source language by language, so
that a language of a source is a stretch of places and nothing as long as the data has to be in memory.
"""

import collections
import concurrent.futures
import hashlib
import json
import pathlib
import threading
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python import array_record_module
from google.protobuf import message

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.data.mixture import Places
from moe_embed.data.pairs import Pair

MANIFEST = "manifest.json"  # written last: without it a folder is no prepared data set
FORMAT = 1
NAME, SPLIT = "pairs", "train"
# Records a chunk: one by one a shard of a million takes 16 MB of index and twice the disk, and is read no faster.
WRITER = "group_size:16,zstd:3"
OPEN = 256  # shards kept open
THREADS = 32  # shards read at once: where a read takes 20 ms, they wait together


def shard_name(number: int, count: int) -> str:
    """As TFDS names them."""
    return f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


def to_bytes(pair: Pair) -> bytes:
    """A pair as a tf.train.Example, the record of a TFDS data set; the same bytes every time."""
    example = _example_type()()
    feature = example.features.feature
    for name in ("query", "document", "lang", "id"):
        feature[name].bytes_list.value.append(getattr(pair, name).encode())
    feature["negatives"].bytes_list.value.extend(text.encode() for text in pair.negatives)
    feature["scores"].float_list.value.extend(pair.scores)
    return example.SerializeToString(deterministic=True)


def from_bytes(record: bytes) -> Pair:
    """What `to_bytes` was given."""
    feature = _example_type().FromString(record).features.feature
    text = lambda name: feature[name].bytes_list.value[0].decode()  # noqa: E731
    negatives = tuple(value.decode() for value in feature["negatives"].bytes_list.value)
    scores = tuple(feature["scores"].float_list.value)
    return Pair(text("query"), text("document"), negatives, text("lang"), text("id"), scores)


def _example_type():
    from tensorflow_datasets.proto import tf_example_generated_pb2  # a second to import; most runs have no such data

    return tf_example_generated_pb2.Example


class Shards:
    """The records of all shards as one sequence, read by several threads. Files are opened when they are first needed."""

    def __init__(self, root: pathlib.Path, shards: Sequence[dict]):
        self.root, self.shards = root, shards
        self.ends = np.cumsum([shard["records"] for shard in shards])
        self.readers, self.lock = collections.OrderedDict(), threading.Lock()
        self.threads = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="shards")

    def __reduce__(self):
        return Shards, (self.root, self.shards)  # another process opens its own files

    def read(self, places: np.ndarray) -> list[bytes]:
        """Records at these int64 places, in their order. UserError names a shard that is damaged."""
        shard_of = np.searchsorted(self.ends, places, side="right")
        order = np.argsort(shard_of, kind="stable")
        numbers, starts = np.unique(shard_of[order], return_index=True)
        parts = np.split(order, starts[1:])
        found: list[bytes] = [b""] * len(places)
        with self.lock:  # a reader serves one thread at a time; this call's threads have one shard each
            for start in range(0, len(numbers), OPEN):
                some, of_some = numbers[start : start + OPEN], parts[start : start + OPEN]
                read = self.threads.map(self._read, some, [places[here] for here in of_some])
                for number, here, records in zip(some, of_some, read, strict=True):
                    self.readers.move_to_end(int(number))
                    for i, record in zip(here, records, strict=True):
                        found[i] = record
                while len(self.readers) > OPEN:
                    self.readers.popitem(last=False)[1].close()
        return found

    def _read(self, number: int, places: np.ndarray) -> list[bytes]:
        first = self.ends[number] - self.shards[number]["records"]
        try:
            return self._reader(int(number)).read([int(i) for i in places - first])
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise UserError(f"{self.root / self.shards[number]['file']} is damaged: {error}.") from error

    def _reader(self, number: int):
        if number not in self.readers:
            path, records = self.root / self.shards[number]["file"], self.shards[number]["records"]
            reader = array_record_module.ArrayRecordReader(str(path))
            if reader.num_records() != records:  # one that is cut short opens without a word, with none
                raise UserError(
                    f"{path} holds {reader.num_records()} records; {MANIFEST} says {records}. Prepare it again."
                )
            self.readers[number] = reader
        return self.readers[number]


class Records(Sequence[Pair]):
    """The pairs of one source of a prepared data set: a stretch of its records."""

    def __init__(self, shards: Shards, *, first: int, languages: Sequence[tuple[str, int]]):
        self.shards, self.first = shards, first
        counts = np.array([count for _, count in languages], np.int64)
        starts = np.cumsum(counts) - counts
        self.count = int(counts.sum())
        self.by_language = {
            lang: Places([start], [count])
            for (lang, _), start, count in zip(languages, starts, counts, strict=True)
            if count
        }

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Pair:
        if not 0 <= place < self.count:
            raise IndexError(place)
        return self.take(np.array([place]))[0]

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, self.count, 4096):
            yield from self.take(np.arange(start, min(start + 4096, self.count)))

    def take(self, places: np.ndarray) -> list[Pair]:
        """The pairs at these places of the source."""
        records = self.shards.read(np.asarray(places, np.int64) + self.first)
        pairs = []
        try:
            for record in records:
                pairs.append(from_bytes(record))
        except (ValueError, IndexError, message.DecodeError) as error:
            raise UserError(
                f"{self.shards.root}: record {self.first + places[len(pairs)]} is no pair that prepare wrote ({error!r:.100})."
            ) from error
        return pairs


def read_manifest(root: pathlib.Path) -> dict:
    """The manifest of a prepared data set. UserError if it is none, or was changed, or a shard is missing or cut short."""
    path = root / MANIFEST
    try:
        manifest = stored.read_json(path)
        said, form = manifest.pop("digest"), manifest["format"]
        changed = said != digest_of(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{root} is no prepared data set: {path} cannot be read ({error!r}).") from error
    if changed:
        raise UserError(f"{path} was changed after it was written (digest mismatch); prepare the data again.")
    if form != FORMAT:
        raise UserError(f"{path} has the format {form!r:.20}; this version reads {FORMAT}. Prepare it again.")
    try:
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest that prepare wrote: {error!r:.200}.") from error
    for shard in manifest["shards"]:
        file = root / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{file} {found}; {MANIFEST} says {shard['bytes']}. Copy or prepare it again.")
    return manifest


def _check(manifest: dict) -> None:
    """Something is raised unless its parts fit: a digest can be right in what somebody else made up."""
    records = 0
    for shard in manifest["shards"]:
        stored.name_within(shard["file"])
        if not isinstance(shard["sha256"], str) or not all(_is_count(shard[key]) for key in ("records", "bytes")):
            raise ValueError(f"a shard is {shard!r}")
        records += shard["records"]
    for source in manifest["sources"]:
        if not isinstance(source["name"], str) or not all(
            isinstance(lang, str) and _is_count(count) for lang, count in source["languages"]
        ):
            raise ValueError(f"a source is {source!r}")
        names = [lang for lang, _ in source["languages"]]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a source has the languages {names!r:.80}")
        if not (number := sum(count for _, count in source["languages"])):
            raise ValueError(f"the source {source['name']!r:.80} is empty")
        records -= number
    if records or not manifest["shards"] or not manifest["sources"]:
        raise ValueError(f"its shards hold {records} records more than its sources")
    if not isinstance(manifest["card"], dict) or not isinstance(manifest["order"], dict):
        raise ValueError("it has no card, or no order")


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def write_manifest(root: pathlib.Path, manifest: dict) -> None:
    """Put the manifest in its place, whole, with its own digest."""
    stored.write_json(root / MANIFEST, manifest | {"digest": digest_of(manifest)})


def digest_of(value) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def verify(root: pathlib.Path, manifest: dict) -> None:
    """Read every shard. UserError names the first whose bytes are not the manifest's."""
    for shard in manifest["shards"]:
        with open(root / shard["file"], "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            raise UserError(f"{root / shard['file']}: digest mismatch; copy or prepare it again.")


def sources(root: pathlib.Path) -> Iterator[tuple[str, Records, int]]:
    """(name, pairs, digest) of each source of a prepared data set. UserError as for `read_manifest`."""
    manifest = read_manifest(root)
    shards, first = Shards(root, manifest["shards"]), 0
    whole = digest_of(manifest["shards"])
    for number, source in enumerate(manifest["sources"]):
        records = Records(shards, first=first, languages=[(lang, count) for lang, count in source["languages"]])
        first += len(records)
        # Not of the source's name: the same data prepared from another path is the same data.
        yield f"{root}/{source['name']}", records, zlib.crc32(f"{whole} {number} {len(records)}".encode())

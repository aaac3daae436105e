"""A BEIR corpus.jsonl, in memory or left on disk. On disk its texts are read as they are asked for, and memory holds the ids."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moe_embed.config import UserError
from moe_embed.data import tables

IDS = 65_536  # held as Python strings at a time, of four times the size


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a file that have a text, in its order: what a dict of ids and texts says, without the texts."""

    path: pathlib.Path
    digest: str  # of the texts, see `survey`
    ids: np.ndarray = dataclasses.field(compare=False, repr=False)  # [N] of numpy's StringDType, 16 bytes a short id

    def __len__(self) -> int:
        """Documents."""
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """The ids."""
        return iter(self.ids)

    def values(self) -> Iterator[str]:
        """The texts, read from the file once more."""
        return filter(tables.is_text, (text_of(row) for _, row in rows(self.path)))


def survey(texts: Iterable[str]) -> tuple[int, str]:
    """How many texts there are, and a digest of them in their order: what a file of their vectors is known by."""
    count, digest = 0, hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        digest.update(b"%d:" % len(data) + data)  # the length keeps ("ab", "c") and ("a", "bc") apart
        count += 1
    return count, digest.hexdigest()


def read(
    path: pathlib.Path, *, judged: Iterable[str] = (), on_disk: bool = False
) -> tuple[dict[str, str] | Corpus, set[str]]:
    """The documents that have a text (BEIR has empty ones), and which of the `judged` ids the file has, with a text or not.

    UserError names file, line and fault; an _id that stands twice is one.
    """
    if not on_disk:
        documents = by_id(path, text_of)
        return {i: text for i, text in documents.items() if tables.is_text(text)}, documents.keys() & set(judged)
    judged, known, kept, parts, empty = set(judged), set(), [], [], []

    def texts() -> Iterator[str]:
        for _, row in rows(path):
            name, text = row["_id"], text_of(row)
            if name in judged:
                known.add(name)
            if not tables.is_text(text):
                empty.append(name)
                continue
            kept.append(name)
            if len(kept) == IDS:
                parts.append(_packed(kept))
                kept.clear()
            yield text

    _, digest = survey(texts())
    ids = np.concatenate([*parts, _packed(kept)])
    in_order = np.sort(np.concatenate([ids, _packed(empty)]))
    twice = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(twice):
        where, _ = next(itertools.islice((row for row in rows(path) if row[1]["_id"] == twice[0]), 1, None))
        raise UserError(f"{where} has the _id {str(twice[0])!r} a second time.")
    return Corpus(path, digest, ids), known


def by_id(path: pathlib.Path, text_of: Callable[[dict], str]) -> dict[str, str]:
    """_id -> text of each row. UserError for an _id that stands twice."""
    found = {}
    for where, row in rows(path):
        if row["_id"] in found:
            raise UserError(f"{where} has the _id {row['_id']!r} a second time.")
        found[row["_id"]] = text_of(row)
    return found


def rows(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """(file:line, row) of each line of a corpus.jsonl or queries.jsonl, as it comes."""
    for where, row in tables.json_rows(path, tables.read_lines(str(path))):
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise UserError(f'{where} needs the strings "_id" and "text".')
        if tables.SURROGATE.search(row["_id"]):
            raise UserError(f"{where} has the _id {row['_id']!r}, which UTF-8 cannot say.")
        yield where, row


def text_of(row: dict) -> str:
    """A document's text, its title first."""
    title = row["title"] if isinstance(row.get("title"), str) else ""
    return f"{title} {row['text']}".strip()


def _packed(ids: list[str]) -> np.ndarray:
    return np.array(ids, np.dtypes.StringDType())

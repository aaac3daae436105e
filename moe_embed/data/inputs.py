"""What `data.sources` and `prepare --input` may name: files, patterns, TFDS's and the hub's data sets.

Of folders `data.sources` takes those that prepare made, and prepare those in BEIR's layout.
"""

import functools
import glob
import importlib.util
import os
import pathlib
import re
import zlib
from collections.abc import Iterator

from etils import epath

from moe_embed import stored
from moe_embed.config import UserError
from moe_embed.data import tables
from moe_embed.data.tables import BadRow
from moe_embed.fields import first_line

TFDS, HUB = "tfds:", "hf:"
BEIR = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv")  # of a folder of that kind, what pairs are made of
SIGNED = re.compile(r"://[^/]*@|\?.*=")  # an address with a password, or with a query that signs it


def find(text: str) -> list[str]:
    """Names and patterns (`pairs/*.jsonl.gz`), separated by commas -> inputs, each once. UserError for what matches none."""
    found = []
    for part in filter(None, text.split(",")):
        if "://" in part and SIGNED.search(part):  # it would stand in the workdir, the log and the card
            plain = re.sub(r"://[^/]*@", "://", part.partition("?")[0])
            raise UserError(f"the address {plain} has credentials in it; give it without, and them by the environment.")
        try:
            if part.startswith((TFDS, HUB)) or epath.Path(part).exists():
                paths = [part]
            elif "://" in part:
                folder, _, pattern = part.rpartition("/")
                paths = sorted(map(str, epath.Path(folder).glob(pattern)))
            else:
                paths = sorted(glob.glob(part, recursive=True))
        except (
            ImportError,
            KeyError,
            ValueError,
            OSError,
        ) as error:  # of etils: an unknown scheme, or one that needs a package
            raise UserError(f"{part} cannot be looked up: {error}.") from error
        if not paths:
            raise UserError(f"{part} does not exist, and is no pattern of files that do.")
        found += paths
    first: dict[str, str] = {}
    for path in found:
        first.setdefault(same(path), path)
    found = list(first.values())
    if not found:
        raise UserError(f"{text!r} names no file.")
    return found


def same(name: str) -> str:
    """What two names of one input have in common: of local files the path without links."""
    return name if name.startswith((TFDS, HUB)) or "://" in name else os.path.realpath(name)


def rows(name: str) -> Iterator[tuple[str, dict | BadRow]]:
    """("place", row) of each row of an input in order, a BadRow in the place of one that cannot be read."""
    if name.startswith(TFDS):
        yield from _tfds(name)
    elif name.startswith(HUB):
        yield from _hub(name)
    else:
        found, expected = 0, _expected(name)
        for row in tables.rows(name):
            found += 1
            yield row
        if expected not in (None, found):
            raise UserError(f"{name} has {found:,} rows; the counts.json beside it says {expected:,}.")


def digest(name: str) -> int:
    """CRC-32 of a file's bytes, of a TFDS data set's description (its version in it), of a hub data set's name.

    The last does not change with the data: prepare the data set, to be sure.
    """
    if name.startswith(TFDS):
        return zlib.crc32(str(_builder(name)[0].info).encode())
    if name.startswith(HUB):
        return zlib.crc32(name.encode())
    if epath.Path(name).is_dir():  # a BEIR folder
        return zlib.crc32(" ".join(str(tables.digest(f"{name}/{file}")) for file in BEIR).encode())
    return tables.digest(name)


@functools.cache
def _builder(name: str):
    """(TFDS's builder, split) of "tfds:name/config:split"; a folder that TFDS wrote goes for a name."""
    import tensorflow_datasets as tfds  # a second to import, and few runs need it

    which, _, split = name.removeprefix(TFDS).rpartition(":")
    if not which:
        raise UserError(f"{name} needs a split, as in {name}:train.")
    try:
        builder = tfds.builder_from_directory(which) if pathlib.Path(which).is_dir() else tfds.builder(which)
    except Exception as error:  # TFDS raises its own kinds, and some of protobuf's and of the network's
        raise UserError(f"{name} cannot be opened by TFDS: {first_line(error)}") from error
    if split not in builder.info.splits:
        raise UserError(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits) or 'none: prepare it by TFDS first'}."
        )
    return builder, split


def _tfds(name: str) -> Iterator[tuple[str, dict | BadRow]]:
    builder, split = _builder(name)
    try:
        source = builder.as_data_source(split)
    except (NotImplementedError, ValueError) as error:  # TFDS's words for a format it reads only from front to back
        raise UserError(f"{name} has no random access ({error}); prepare it with file_format=array_record.") from error
    for i in range(len(source)):
        try:
            yield f"{name}, row {i + 1}", {key: _plain(value) for key, value in source[i].items()}
        except UnicodeDecodeError:
            yield f"{name}, row {i + 1}", BadRow(f"{name}, row {i + 1} is not UTF-8.", reason="not UTF-8")


def _plain(value):
    """A value as TFDS gives it, bytes for text and arrays for lists, as JSON would have it."""
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _hub(name: str) -> Iterator[tuple[str, dict | BadRow]]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f'{name} needs the package datasets: pip install -e ".[hub]"')
    import datasets

    which, _, split = name.removeprefix(HUB).rpartition(":")
    if not which:
        raise UserError(f"{name} needs a split, as in {name}:train.")
    which, _, config = which.partition("@")
    try:
        stream = datasets.load_dataset(which, config or None, split=split, streaming=True)
        for i, row in enumerate(stream):
            yield f"{name}, row {i + 1}", dict(row)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be read from the hub: {first_line(error)}") from error


def _expected(name: str) -> int | None:
    """How many rows a counts.json beside a file (Nomic's public data has one) says it has; None if none says."""
    path = epath.Path(name)
    counts = path.parent / "counts.json"
    if not counts.is_file():
        return None
    try:
        said = stored.read_json(counts)
        said = said["count_per_file"] if "count_per_file" in said else said
        return next((int(count) for file, count in said.items() if file.rpartition("/")[2] == path.name), None)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{counts} is not {{file: rows}}: {error}.") from error

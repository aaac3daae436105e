"""Files to rows: JSONL, CSV and TSV (also gzipped) and Parquet; each row a dict, with the place that an error names."""

import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator

from moe_embed.config import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: str) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz. UserError if it cannot be read."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path} does not exist, or is no file.")
    try:
        data = pathlib.Path(path).read_bytes()
        return gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_lines(path: str) -> Iterator[bytes]:
    """A file's lines as they are asked for, unpacked where its name ends in .gz. UserError if it cannot be read."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path} does not exist, or is no file.")
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def kind(path: str) -> str:
    """The suffix by which a file is read, one of SUFFIXES. UserError for any other."""
    suffix = pathlib.PurePath(path.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of rows we read; its name ends in {', '.join(SUFFIXES)}, or in those and .gz."
        )
    return suffix


def rows(path: str, data: bytes) -> Iterator[tuple[str, dict]]:
    """("file:line", row) of each row in order; `data` is read_bytes(path). UserError names file, line and fault."""
    suffix = kind(path)
    if suffix == ".jsonl":
        yield from json_rows(path, io.BytesIO(data))
    elif suffix == ".parquet":
        yield from _parquet_rows(path, data)
    else:
        csv.field_size_limit(2**31 - 1)
        text = io.StringIO(decode(path, data), newline="")
        reader = csv.DictReader(text, strict=True, delimiter="," if suffix == ".csv" else "\t")
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num} is not {suffix[1:].upper()}: {error}.") from error


def _parquet_rows(path: str, data: bytes) -> Iterator[tuple[str, dict]]:
    import pyarrow  # half a second to import, and few files need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}.") from error


def json_rows(path, lines: Iterable[bytes], *, every_line: bool = False) -> Iterator[tuple[str, dict]]:
    """(file:line, value) of each line as it comes; blank ones are passed over, unless a line's place matters (`every_line`).

    Blank lines at the end have no place. UserError names file, line and fault.
    """
    blank = None
    for number, data in enumerate(lines, start=1):
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number} is not UTF-8; convert the file.") from error
        if not line.strip():
            blank = blank or number
            continue
        if blank and every_line:
            raise UserError(f"{path}:{blank} is not JSON (it is blank); each line is one object.")
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON ({error}); each line is one object.") from error
        yield f"{path}:{number}", value


def is_text(value) -> bool:
    """Whether a value is a string with something in it that UTF-8 can say (JSON can hold half a surrogate pair)."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def decode(path, data: bytes) -> str:
    """UTF-8, with or without a byte-order mark; UserError names the line that is none."""
    try:
        return data.decode("utf-8-sig")  # a spreadsheet's byte-order mark is not part of the first column's name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8; convert the file.") from error

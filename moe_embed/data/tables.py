"""Files to rows: JSONL, CSV and TSV (also .gz, .zst), Parquet and Arrow; each row a dict, with the place that an error names.

Rows come one by one, whatever the file's size. Paths may be an object store's (gs://, s3://), through etils.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from etils import epath

from moe_embed.config import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
CHUNK = 2**20  # bytes
LONGEST = 2**26  # bytes of a line: more is no row of texts, and would be held in memory
LONGEST_CSV = LONGEST // 8  # characters of a row: the csv module holds one at four bytes each, and twice while it grows
LARGEST = 2**28  # bytes of a file that is read at once, a task's judgements: some ten million of them
SURROGATE = re.compile("[\ud800-\udfff]")
# Blanks, controls and what is drawn without width (joiners, direction marks, byte-order marks): alone they are no text.
NOTHING = re.compile("[\\s\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]*")


class BadRow(UserError):
    """A row that cannot be used: its sentence, and in a word or two the `reason` by which such rows are counted.

    With `more` it is not a row alone: others are lost with it, nobody knows how many, and no share of bad rows allows that.
    """

    def __init__(self, sentence: str, *, reason: str, more: bool = False):
        super().__init__(sentence)
        self.reason, self.more = reason, more

    def __reduce__(self):  # one of prepare's processes tells another
        return functools.partial(BadRow, reason=self.reason, more=self.more), self.args


def is_text(value) -> bool:
    """Whether a value is a string with something to see in it that UTF-8 can say (JSON can hold half a surrogate pair)."""
    return isinstance(value, str) and not NOTHING.fullmatch(value) and not SURROGATE.search(value)


def kind(path: str) -> str:
    """The suffix by which a file is read, one of SUFFIXES. UserError for any other."""
    plain = next((path.removesuffix(suffix) for suffix in PACKED if path.endswith(suffix)), path)
    suffix = epath.Path(plain).suffix
    if suffix not in SUFFIXES or (plain != path and suffix in (".parquet", ".arrow")):
        raise UserError(
            f"{path} is no file of rows we read; its name ends in {', '.join(SUFFIXES)}; the first three also in those and "
            f"{' or '.join(PACKED)}."
        )
    return suffix


def rows(path: str) -> Iterator[tuple[str, dict | BadRow]]:
    """("file:line", row) of each row in order, a BadRow in the place of one that cannot be read.

    What breaks a file off (a gzip cut short) is its last row, a BadRow with `more`. UserError if the file cannot be opened.
    """
    suffix = kind(path)
    read = (
        {".jsonl": _jsonl, ".parquet": _parquet, ".arrow": _arrow}[suffix] if suffix not in (".csv", ".tsv") else _csv
    )
    with open_binary(path, unpack=suffix in (".jsonl", ".csv", ".tsv")) as stream:
        place = path
        try:
            for place, row in read(path, stream):
                yield place, row
        except (OSError, EOFError, zlib.error) as error:
            sentence = f"{path} cannot be read on after {place}: {error}."
            yield place, BadRow(sentence, reason="file cut off or damaged", more=True)


@contextlib.contextmanager
def open_binary(path: str, *, unpack: bool = True) -> Iterator[BinaryIO]:
    """A file's bytes as a stream, unpacked where its name ends in one of PACKED. UserError if it cannot be opened."""
    file = epath.Path(path)
    try:
        if not file.is_file():
            raise UserError(f"{path} does not exist, or is no file.")
        stream = file.open("rb")
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    with stream:
        if unpack and path.endswith(".gz"):
            yield gzip.GzipFile(fileobj=stream)
        elif unpack and path.endswith(".zst"):
            import pyarrow  # half a second to import, and few files need it

            yield io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd"))
        else:
            yield stream


def digest(path: str) -> int:
    """CRC-32 of a file's bytes as they are once unpacked. UserError if it cannot be read."""
    crc = 0
    with open_binary(path) as stream:
        try:
            while chunk := stream.read(CHUNK):
                crc = zlib.crc32(chunk, crc)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
    return crc


def read_bytes(path: str) -> bytes:
    """A file's bytes, unpacked. UserError if it cannot be read, or if they are LARGEST or more."""
    with open_binary(str(path)) as stream:
        try:
            data = stream.read(LARGEST)
            if len(data) == LARGEST:
                raise UserError(f"{path} holds {LARGEST} bytes or more; that is too large to be read at once.")
            return data
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def lines(path: str, stream: BinaryIO) -> Iterator[bytes]:
    """A stream's lines as they are asked for. BadRow, a UserError, at one of LONGEST bytes, of which no more is read."""
    for line in _lines(path, stream):
        if isinstance(line, BadRow):
            raise line
        yield line


def _lines(path: str, stream: BinaryIO) -> Iterator[bytes | BadRow]:
    """The lines, and a BadRow in the place of one of LONGEST bytes; the rest of that is read when the next one is asked for."""
    for number in itertools.count(1):
        parts = _parts(stream.readline, LONGEST, b"\n")
        if sum(map(len, parts)) == LONGEST:
            ended = parts[-1].endswith(b"\n")
            parts.clear()  # a traceback would hold them as long as somebody holds the fault
            yield BadRow(f"{path}:{number} is longer than {LONGEST} bytes; it is no row.", reason="line too long")
            while not ended:
                part = stream.readline(CHUNK)
                ended = not part or part.endswith(b"\n")
            continue
        if not parts[0]:
            return
        yield parts[0] if len(parts) == 1 else b"".join(parts)


def _parts(readline, most: int, end):
    """A line in parts of a CHUNK, at most `most` of it: what is too long is never put together."""
    parts, left = [], most
    while left:
        asked = min(CHUNK, left)
        parts.append(readline(asked))
        left -= len(parts[-1])
        if len(parts[-1]) < asked or parts[-1].endswith(end):
            break
    return parts


def read_lines(path: str) -> Iterator[bytes]:
    """A file's lines as they are asked for, unpacked. UserError if it cannot be read."""
    with open_binary(path) as stream:
        try:
            yield from lines(path, stream)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def json_rows(path, lines: Iterable[bytes], *, every_line: bool = False) -> Iterator[tuple[str, dict]]:
    """(file:line, value) of each line as it comes; blank ones are passed over, unless a line's place matters (`every_line`).

    Blank lines at the end have no place. UserError names file, line and fault.
    """
    blank = None
    for number, data in enumerate(lines, start=1):
        place, data = f"{path}:{number}", data.removeprefix(codecs.BOM_UTF8) if number == 1 else data
        if not data.strip():
            blank = blank or number
            continue
        if blank and every_line:
            raise UserError(f"{path}:{blank} is not JSON (it is blank); each line is one object.")
        row = _parsed(place, data)
        if isinstance(row, BadRow):
            raise row
        yield place, row


def decode(path, data: bytes) -> str:
    """UTF-8, with or without a byte-order mark; UserError names the line that is none."""
    try:
        return data.decode("utf-8-sig")  # a spreadsheet's byte-order mark is not part of the first column's name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}") from error


def _jsonl(path: str, stream: BinaryIO) -> Iterator[tuple[str, dict | BadRow]]:
    for number, line in enumerate(_lines(path, stream), start=1):
        place = f"{path}:{number}"
        if isinstance(line, BadRow):
            yield place, line
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield place, _parsed(place, line)


def _parsed(place: str, line: bytes) -> dict | BadRow:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return _not_utf8(place)
    except (ValueError, RecursionError) as error:
        return BadRow(f"{place} is not JSON ({error}); each line is one object.", reason="not JSON")


def _not_utf8(place: str) -> BadRow:
    return BadRow(f"{place} is not UTF-8; convert the file.", reason="not UTF-8")


def _csv(path: str, stream: BinaryIO) -> Iterator[tuple[str, dict | BadRow]]:
    csv.field_size_limit(LONGEST_CSV)
    # a byte that is no UTF-8 becomes half a surrogate pair: its row is bad, not the file
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    taken = (
        0  # characters of the row that is being read: a quotation mark that is never closed makes all that follows one
    )

    def some_lines() -> Iterator[str]:
        nonlocal taken
        while (parts := _parts(text.readline, LONGEST_CSV - taken, ("\n", "\r")))[0]:
            taken += sum(map(len, parts))
            if taken == LONGEST_CSV:
                raise BadRow(
                    f"{path} has a row of more than {LONGEST_CSV} characters behind line {reader.line_num}; a quotation mark "
                    "that is not closed makes one row of all that follows.",
                    reason="row too long",
                    more=True,
                )
            yield "".join(parts)

    reader = csv.DictReader(some_lines(), strict=True, delimiter="\t" if kind(path) == ".tsv" else ",")
    first = 1  # line of the row that is being read
    try:
        while True:
            try:
                taken = 0
                if reader.fieldnames:  # the first time this reads the header
                    first = reader.reader.line_num + 1
                    _check_header(path, reader.fieldnames)
                taken = 0
                row = next(reader)
            except StopIteration:
                return
            except BadRow as fault:
                yield f"{path}:{reader.line_num}", fault
                return
            except csv.Error as error:
                last = reader.reader.line_num
                place, said = f"{path}:{last}", f"{kind(path)[1:].upper()}: {error}"
                if (
                    several := last > first
                ):  # a quotation mark that is not closed has taken rows in, or the rest of the file
                    said += f"; one row from line {first} on, whose quotation mark may not be closed"
                yield place, BadRow(f"{place} is not {said}.", reason="not CSV", more=several)
                continue
            place = f"{path}:{reader.line_num}"
            if None in row:
                sentence = f"{place} has more values than the header has names: {row[None][0]!r:.60} has none; quote texts with a comma."
                row = BadRow(sentence, reason="too many values")
            elif any(isinstance(value, str) and re.search("[\udc80-\udcff]", value) for value in row.values()):
                row = _not_utf8(place)
            yield place, row
    finally:
        text.detach()  # the stream is its opener's to close


def _check_header(path: str, names: Sequence[str]) -> None:
    """A BadRow, with all that follows, for a header that says why nothing of the file would be right."""
    if names[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise BadRow(f"{path} is UTF-16; save it as UTF-8.", reason="not UTF-8", more=True)
    if len(names) == 1 and (sign := next((sign for sign in ";\t|" if sign in names[0]), "")):
        sentence = f"{path} has one column, {names[0]!r:.60}: its values seem to be separated by {sign!r}; write it with commas"
        raise BadRow(f"{sentence}, or with tabs as .tsv.", reason="not CSV", more=True)


def _parquet(path: str, stream: BinaryIO) -> Iterator[tuple[str, dict | BadRow]]:
    import pyarrow.parquet

    yield from _columns(path, "Parquet", lambda: pyarrow.parquet.ParquetFile(stream).iter_batches())


def _arrow(path: str, stream: BinaryIO) -> Iterator[tuple[str, dict | BadRow]]:
    import pyarrow

    def batches():
        if stream.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(stream)
            return (file.get_batch(i) for i in range(file.num_record_batches))
        stream.seek(0)
        return iter(pyarrow.ipc.open_stream(stream))

    yield from _columns(path, "Arrow", batches)


def _columns(path: str, name: str, batches) -> Iterator[tuple[str, dict | BadRow]]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            batch.validate(full=True)  # Arrow believes a file's offsets: a flipped bit would end the process
            for row in _as_python(batch):
                number += 1
                place = f"{path}, row {number}"
                if isinstance(row, dict):
                    yield place, row
                else:
                    yield place, BadRow(f"{place} cannot be read: {row}.", reason="value beyond Python's")
    except pyarrow.ArrowException as error:
        place = f"{path}, row {number + 1}"
        yield place, BadRow(f"{path} cannot be read as {name}: {error}.", reason="file cut off or damaged", more=True)


def _as_python(batch) -> Iterator[dict | Exception]:
    """The rows of a batch, or of one the reason that it is none. A date or time beyond Python's stands as the file's number."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass  # of one value of one row: the others are good
    for i in range(batch.num_rows):
        try:
            row = {name: _value(column[i]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        except (ValueError, OverflowError) as error:
            row = error
        yield row


def _value(scalar):
    import pyarrow

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if pyarrow.types.is_temporal(scalar.type):
            return scalar.value
        raise

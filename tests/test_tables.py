"""The same rows from every kind of file, and faults with their place."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from moe_embed.config import UserError
from moe_embed.data import pairs as pairs_lib
from moe_embed.data import sources, tables

ROWS = [{"query": "was, ist", "document": 'ein "Haus"'}, {"query": "表\tを", "document": "zwei\nZeilen"}]


def write(path, rows=ROWS) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter={".csv": ",", ".tsv": "\t"}[path.suffix])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def read(path: str) -> list:
    return list(tables.rows(path))


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_kind_gives_the_same_rows(suffix, tmp_path):
    path = write(tmp_path / f"p{suffix}")
    assert [row for _, row in read(path)] == ROWS
    assert [(pair.query, pair.document) for pair in sources.read_source(path).pairs] == [
        tuple(row.values()) for row in ROWS
    ]
    assert [row.pairs[0].query for row in pairs_lib.read_rows(path)] == [row["query"] for row in ROWS]
    if suffix not in (".parquet", ".arrow"):
        with open(path, "rb") as plain:
            data = plain.read()
        with gzip.open(path + ".gz", "wb") as packed, pyarrow.CompressedOutputStream(path + ".zst", "zstd") as smaller:
            packed.write(data)
            smaller.write(data)
        assert [row for _, row in read(path + ".gz")] == [row for _, row in read(path + ".zst")] == ROWS


def test_a_place_is_named(tmp_path):
    bad = [*ROWS, {"query": "x", "document": ""}]
    for suffix, place in ((".jsonl", ":3"), (".csv", ":5"), (".tsv", ":5"), (".parquet", ", row 3")):
        path = write(tmp_path / f"p{suffix}", bad)
        with pytest.raises(UserError, match=f"{place} has 'document': ''"):
            sources.read_source(path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"a", "no file of rows we read; its name ends in .jsonl, .csv, .tsv, .parquet, .arrow"),
        ("p.parquet", b"PAR1 no PAR1", "cannot be read as Parquet"),
        ("p.tsv", b'query\tdocument\n"a\tb', "p.tsv:2 is not TSV"),
        ("p.csv", b"query,document\n\xff,b\n", "p.csv:2 is not UTF-8"),
        ("p.csv", b"", "holds no pairs"),
        ("p.jsonl", b"{", "p.jsonl:1 is not JSON"),
        ("p.jsonl.gz", b"{", "p.jsonl.gz cannot be read"),
    ],
)
def test_faults(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        sources.read_source(str(tmp_path / name))


def test_sentence_transformers_columns(tmp_path):
    rows = [
        {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"},
        {"anchor": "e", "positive": "f", "negative_1": "g", "negative_2": None},
    ]
    found = sources.read_source(write(tmp_path / "p.parquet", rows)).pairs
    assert [(p.query, p.document, p.negatives) for p in found] == [("a", "b", ("c", "d")), ("e", "f", ("g",))]
    both = [{"query": "q", "document": "d", "anchor": "a", "positive": "b"}]  # our names come first
    assert sources.read_source(write(tmp_path / "q.jsonl", both)).pairs[0].query == "q"
    with pytest.raises(UserError, match="no column 'query'"):
        sources.read_source(write(tmp_path / "r.jsonl", [{"anchor": "a", "negative": "b"}]))


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}\n{"a"'
    (tmp_path / "p.jsonl").write_bytes(data)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))  # as `cat` puts them
    for name in ("p.jsonl", "p.jsonl.gz"):
        path = str(tmp_path / name)
        assert list(tables.read_lines(path)) == data.splitlines(keepends=True)
        found = tables.json_rows(path, tables.read_lines(path))
        assert [next(found), next(found)] == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]  # before the fault
        with pytest.raises(UserError, match=f"{name}:4 is not JSON"):
            next(found)
    packed = (tmp_path / "p.jsonl.gz").read_bytes()
    (tmp_path / "p.jsonl.gz").write_bytes(packed[:-4])
    with pytest.raises(UserError, match=r"p\.jsonl\.gz cannot be read"):
        list(tables.read_lines(str(tmp_path / "p.jsonl.gz")))
    with pytest.raises(UserError, match="does not exist"):
        next(tables.read_lines(str(tmp_path / "none.jsonl")))


def test_blank_lines_where_a_place_matters():
    rows = lambda data: [row for _, row in tables.json_rows("p", data.splitlines(keepends=True), every_line=True)]  # noqa: E731
    assert rows(b"1\n2\n\n \n") == [1, 2]
    assert rows(b"\n") == []
    for data, line in ((b"\n1\n", 1), (b"1\n\n\n2\n", 2)):
        with pytest.raises(UserError, match=rf"p:{line} is not JSON \(it is blank\)"):
            rows(data)
    with pytest.raises(UserError, match="p:2 is not UTF-8"):
        rows(b"1\n\xff\n")


def test_dates_in_other_columns(tmp_path):
    """Some are beyond Python's: pandas writes nanoseconds. The row is read all the same, and so are the others of its batch."""
    for kind, value, said in (
        ("us", 0, "1970-01-01 00:00:00"),
        ("ns", 1, 1),
        ("s", 2**40, 1000 * 2**40),
    ):  # kept in milliseconds
        when = pyarrow.array([value if i in (3, 7) else None for i in range(10)], pyarrow.timestamp(kind))
        table = pyarrow.table({"query": [f"q{i}" for i in range(10)], "document": ["d"] * 10, "when": when})
        path = str(tmp_path / f"{kind}.parquet")
        pyarrow.parquet.write_table(table, path, version="2.6", coerce_timestamps=None)
        assert [place for place, _ in tables.rows(path)] == [f"{path}, row {i + 1}" for i in range(10)]
        rows = list(pairs_lib.read_rows(path))
        assert [row.columns["query"] for row in rows] == [f"q{i}" for i in range(10)]
        assert {i: json.loads(row.line)["when"] for i, row in enumerate(rows) if "when" in row.line} == {
            3: said,
            7: said,
        }


def test_a_value_that_is_none_of_pythons_is_one_bad_row(tmp_path):
    """Inside of a list it cannot stand for itself. None of the others is lost, and none counted for another."""
    when = pyarrow.array([[2**40] if i in (3, 7) else [i] for i in range(10)], pyarrow.list_(pyarrow.timestamp("s")))
    table = pyarrow.table({"query": [f"q{i}" for i in range(10)], "document": ["d"] * 10, "when": when})
    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(table, path)
    found = list(tables.rows(path))
    assert [place for place, _ in found] == [f"{path}, row {i + 1}" for i in range(10)]
    assert [i for i, (_, row) in enumerate(found) if isinstance(row, tables.BadRow)] == [3, 7]
    assert [row["query"] for _, row in found if isinstance(row, dict)] == [
        f"q{i}" for i in range(10) if i not in (3, 7)
    ]
    source = sources.read_source(path, max_bad_fraction=0.3)
    assert len(source) == 8
    assert "2 of 10 rows were left out (value beyond Python's: 2)" in source.left_out
    with pytest.raises(UserError, match=r"p\.parquet, row 4 cannot be read: "):
        sources.read_source(path)


def test_what_takes_other_rows_with_it_is_raised_whatever_the_fraction(tmp_path, monkeypatch):
    """A quotation mark that is not closed takes in rows up to the next one, or all; damage inside of Parquet the rest."""
    good = "".join(f"q{i},d{i}\n" for i in range(20))
    for rest, said in (
        ('q,"d\n' + good, r"22 is not CSV: unexpected end of data; one row from line 2 on"),
        ('q,"d\n' + good + 'q,"d"e"\n' + good, r"23 is not CSV: .*; one row from line 2 on, whose quotation mark"),
    ):
        (tmp_path / "p.csv").write_text("query,document\n" + rest)
        with pytest.raises(UserError, match=said):
            sources.read_source(str(tmp_path / "p.csv"), max_bad_fraction=0.9)
    (tmp_path / "p.csv").write_text("query,document\n" + good + '"q"x,d\n' + good)  # one line alone is one row
    assert len(sources.read_source(str(tmp_path / "p.csv"), max_bad_fraction=0.1)) == 40
    monkeypatch.setattr(tables, "LONGEST_CSV", 60)
    (tmp_path / "p.csv").write_text("query,document\n" + good + 'q,"' + good)
    with pytest.raises(UserError, match="a row of more than 60 characters behind line 21"):
        sources.read_source(str(tmp_path / "p.csv"), max_bad_fraction=0.9)
    table = pyarrow.table({"query": ["a"] * 300_000, "document": [f"{i * 7919}" for i in range(300_000)]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", row_group_size=100_000, use_dictionary=False)
    data = bytearray((tmp_path / "p.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    (tmp_path / "p.parquet").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        sources.read_source(str(tmp_path / "p.parquet"), max_bad_fraction=0.9)


def test_a_line_that_is_too_long_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST", 64)
    monkeypatch.setattr(tables, "CHUNK", 16)
    good = [json.dumps({"query": f"q{i}", "document": "d"}) + "\n" for i in range(9)]
    exactly = "x" * 63 + "\n"
    (tmp_path / "p.jsonl").write_text(
        "".join([*good[:3], "x" * 1_000 + "\n", *good[3:6], exactly, *good[6:], "x" * 99])
    )
    found = list(tables.rows(str(tmp_path / "p.jsonl")))
    assert [row["query"] for _, row in found if isinstance(row, dict)] == [f"q{i}" for i in range(9)]
    assert [place.rpartition(":")[2] for place, row in found if isinstance(row, tables.BadRow)] == ["4", "8", "12"]
    source = sources.read_source(str(tmp_path / "p.jsonl"), max_bad_fraction=0.3)
    assert len(source) == 9
    assert "3 of 12 rows were left out (line too long: 3)" in source.left_out


def test_values_without_a_column_are_no_row(tmp_path):
    (tmp_path / "p.csv").write_text("query,document\nwhat is it,a thing, that does\nwhat,that\n")
    with pytest.raises(
        UserError, match=r"p\.csv:2 has more values than the header has names: ' that does' has none; quote"
    ):
        sources.read_source(str(tmp_path / "p.csv"))
    source = sources.read_source(str(tmp_path / "p.csv"), max_bad_fraction=0.5)
    assert [pair.document for pair in source.pairs] == ["that"]
    assert "too many values: 1" in source.left_out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"query;document\nwhat, is it;that\n", "one column, 'query;document': its values seem to be separated by ';'"),
        ("query,document\na,b\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_a_header_that_says_why_nothing_would_be_right(data, said, tmp_path):
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(UserError, match=said):
        sources.read_source(str(tmp_path / "p.csv"), max_bad_fraction=0.9)

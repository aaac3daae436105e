"""Files that somebody broke: whatever was done to them, a sentence or good pairs and a count of the rest, never a traceback.

50 files of each kind in a run of the tests, 500 with `-m slow`.
"""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from moe_embed.config import UserError
from moe_embed.data import sources, tables
from moe_embed.data.tally import Tally

ROWS = [
    {
        "query": f"what is {i}?",
        "document": f'über "{i}", and\nmore 表',
        "negatives": [f"not {i}"],
        "lang": "de",
        "id": str(i),
    }
    for i in range(30)
]
HOSTILE = (
    b"\xff\xfe", b"\0", b"\n", b'"', b",", b"{", b"]", b"null", b"NaN", b"1e999", b'"\\ud800"', b"\xed\xa0\x80", b"\r", b"</s>",
    b"\xe2\x80\x8b", b"[" * 300, b" " * 5000, b"a" * 100_000, b'{"query": [1], "document": {}}\n', b"true\n", b"\xef\xbb\xbf",
)  # fmt: skip


def pristine(suffix: str, path) -> bytes:
    if suffix.startswith(".jsonl"):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    elif suffix == ".csv":
        quoted = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
        data = (
            "query,document,lang\n" + "".join(f"{quoted(r['query'])},{quoted(r['document'])},de\n" for r in ROWS)
        ).encode()
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path.read_bytes()
    else:
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
        return path.read_bytes()
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    return pyarrow.compress(data, "zstd", asbytes=True) if suffix.endswith(".zst") else data


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, len(data) + 1))
        kind = int(rng.integers(0, 5))
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + HOSTILE[int(rng.integers(len(HOSTILE)))] + data[place:]
        elif kind == 2 and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]
        elif kind == 3:
            data = data[:place] + data[place + int(rng.integers(1, 200)) :]
        else:
            data = data + data[place:]
    return data


def check(suffix: str, tmp_path, *, count: int) -> dict[str, int]:
    whole, outcomes = pristine(suffix, tmp_path / f"whole{suffix}"), {"read": 0, "refused": 0}
    for seed in range(count):
        path = tmp_path / f"f{suffix}"
        path.write_bytes(broken(whole, np.random.default_rng((seed, len(suffix)))))
        try:
            source, said = sources.read_source(str(path), max_bad_fraction=0.9), ""
        except UserError as error:
            source, said = None, str(error)
        outcomes["read" if source else "refused"] += 1
        if source is None:
            assert str(path) in said
            continue
        assert all(tables.is_text(pair.query) and tables.is_text(pair.document) for pair in source.pairs)
        assert all(tables.is_text(text) for pair in source.pairs for text in pair.negatives)
        tally = Tally(str(path), max_bad_fraction=0.9)
        rows = list(tables.rows(str(path)))
        list(tally.good_of(iter(rows), lambda row, place: sources.pairs_lib.of_row(row, place, query="query", document="document")))  # fmt: skip
        assert tally.good + tally.bad.total() == len(rows)  # every row is in one of the counts
        assert bool(source.left_out) == bool(tally.bad)
        source.pairs[0].query.encode()
    return outcomes


KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet", ".arrow")


@pytest.mark.parametrize("suffix", KINDS)
def test_a_broken_file_is_a_sentence_or_a_count(suffix, tmp_path):
    outcomes = check(suffix, tmp_path, count=50)
    assert outcomes["refused"] > 0, outcomes
    assert outcomes["read"] > 0 or suffix == ".jsonl.gz", outcomes  # so small a gzip is one block: all of it is lost


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_five_hundred_broken_files(suffix, tmp_path):
    check(suffix, tmp_path, count=500)

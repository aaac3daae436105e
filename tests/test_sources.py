"""Files to texts, strictly: what is good is read as it stands, a bad row is named by file and line."""

import gzip
import io
import json
import zlib

import pytest

from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data.sources import Pair

GOOD = [{"query": "wie?", "document": "so.", "lang": "de"}]
GOOD += [{"query": "q\u2028r", "document": "d", "negatives": ["n", "m"]}]
PAIRS = [Pair("wie?", "so.", lang="de"), Pair("q\u2028r", "d", ("n", "m"))]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def fault(path: str, **columns) -> str:
    with pytest.raises(UserError) as caught:
        sources.read_source(path, **columns)
    (sentence,) = caught.value.args
    assert path in sentence
    return sentence


def test_jsonl_gzip_and_blank_lines(tmp_path):
    data = lines(GOOD)
    plain = sources.read_source(write(tmp_path / "a.jsonl", data))
    packed = sources.read_source(write(tmp_path / "a.jsonl.gz", gzip.compress(data)))
    loose = sources.read_source(write(tmp_path / "b.jsonl", b"\n" + data.replace(b"\n", b"\r\n\n") + b"  \n"))
    assert plain.pairs == packed.pairs == loose.pairs == PAIRS
    assert plain.digest == packed.digest == zlib.crc32(data) != loose.digest
    assert plain.path == str(tmp_path / "a.jsonl")
    other = sources.read_source(write(tmp_path / "a.jsonl", lines(GOOD[::-1])))
    assert other.pairs != plain.pairs
    assert other.digest != plain.digest


def test_csv(tmp_path):
    text = 'query,document,lang\n"wie, bitte?","so\nund so",de\nq,d,\n'
    expected = [Pair("wie, bitte?", "so\nund so", lang="de"), Pair("q", "d")]
    assert sources.read_source(write(tmp_path / "a.csv", text.encode())).pairs == expected
    assert sources.read_source(write(tmp_path / "a.csv.gz", gzip.compress(text.encode()))).pairs == expected


def test_a_long_document_is_read_from_csv_as_from_jsonl(tmp_path):
    long = "d " * 100_000
    read = sources.read_source
    assert read(write(tmp_path / "a.csv", f"query,document\nq,{long}\n".encode())).pairs == [Pair("q", long)]
    assert read(write(tmp_path / "a.jsonl", lines([{"query": "q", "document": long}]))).pairs == [Pair("q", long)]


def test_columns_by_other_names(tmp_path):
    path = write(tmp_path / "a.csv", b"heading,body,query\nh,b,x\n")
    assert sources.read_source(path, query="heading", document="body").pairs == [Pair("h", "b")]
    assert "has no column 'document'; it has 'heading', 'body', 'query'" in fault(path)


BAD_ROWS = {
    "not JSON": (b'{"query": "a", \n', "is not JSON"),
    "not UTF-8": (b'{"query": "\xff", "document": "d"}\n', "is not UTF-8"),
    "no object": (b"[1]\n", "is not an object"),
    "a text": (b'"query document"\n', "is not an object"),
    "missing column": (b'{"query": "a"}\n', "has no column 'document'; it has 'query'"),
    "empty text": (b'{"query": "", "document": "d"}\n', "'query'"),
    "whitespace": (b'{"query": "a", "document": " \\n\\u3000"}\n', "'document'"),
    "null": (b'{"query": null, "document": "d"}\n', "'query'"),
    "NaN": (b'{"query": "a", "document": NaN}\n', "'document'"),
    "number": (b'{"query": 3, "document": "d"}\n', "'query'"),
    "list": (b'{"query": ["a"], "document": "d"}\n', "'query'"),
    "half a character": (b'{"query": "a \\ud800", "document": "d"}\n', "'query'"),
    "negatives text": (b'{"query": "a", "document": "d", "negatives": "n"}\n', "negatives"),
    "negatives empty": (b'{"query": "a", "document": "d", "negatives": ["n", " "]}\n', "negatives"),
    "negatives number": (b'{"query": "a", "document": "d", "negatives": [1]}\n', "negatives"),
    "huge number": (b'{"query": "a", "document": "d", "id": ' + b"1" * 5000 + b"}\n", ""),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, kind):
    row, what = BAD_ROWS[kind]
    path = write(tmp_path / "a.jsonl", lines(GOOD) + b"\n" + row + lines(GOOD))
    sentence = fault(path)
    assert f"{path}:4 " in sentence
    assert what in sentence


@pytest.mark.parametrize(
    ("text", "line"), [("q,d\nq2\n", 3), ("q,d\n,d\n", 3), ('"q\nr",d\nq, \n', 4)], ids=["short", "empty", "blank"]
)
def test_a_bad_csv_row_is_named(tmp_path, text, line):
    path = write(tmp_path / "a.csv", b"query,document\n" + text.encode())
    assert f"{path}:{line} " in fault(path)


def test_whole_files_that_cannot_be_read(tmp_path):
    packed = gzip.compress(lines(GOOD) * 50)
    assert "cannot be read" in fault(write(tmp_path / "cut.jsonl.gz", packed[: len(packed) // 2]))
    assert "cannot be read" in fault(write(tmp_path / "no.jsonl.gz", lines(GOOD)))
    assert "cannot be read" in fault(write(tmp_path / "flip.jsonl.gz", packed[:-8] + b"\0" + packed[-7:]))
    assert "does not exist" in fault(str(tmp_path / "none.jsonl"))
    assert "is no file" in fault(str(tmp_path))
    assert "ends in .jsonl, .jsonl.gz or .csv" in fault(write(tmp_path / "a.txt", lines(GOOD)))
    for name, data in (("e.jsonl", b""), ("b.jsonl", b"\n \n"), ("e.csv", b""), ("h.csv", b"query,document\n")):
        assert "holds no pairs" in fault(write(tmp_path / name, data))


CORPUS = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"}]
CORPUS += [{"_id": "d3", "title": "", "text": "3"}]
QUERIES = [{"_id": "q1", "text": "eins?"}, {"_id": "q2", "text": "zwei?"}, {"_id": "q3", "text": "nobody judges this"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t2\nq1\td3\t0\n"


def beir(folder, *, corpus=CORPUS, queries=QUERIES, qrels=QRELS) -> str:
    write(folder / "corpus.jsonl", corpus if isinstance(corpus, bytes) else lines(corpus))
    write(folder / "queries.jsonl", queries if isinstance(queries, bytes) else lines(queries))
    write(folder / "qrels" / "test.tsv", qrels if isinstance(qrels, bytes) else qrels.encode())
    return str(folder)


def test_a_beir_folder(tmp_path):
    task = sources.read_task(beir(tmp_path / "some-task"))
    assert task.name == "some-task"
    assert list(task.corpus.items()) == [("d1", "T one"), ("d2", "two"), ("d3", "3")]
    assert task.queries == {"q1": "eins?", "q2": "zwei?"}  # not the one without a judgement
    assert list(task.queries) == list(task.relevance)
    assert task.relevance == {"q1": {"d1": 2, "d3": 0}, "q2": {"d2": 1}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"corpus": lines(CORPUS) + b"x\n"}, "corpus.jsonl:4 is not JSON"),
        ({"corpus": [{"_id": 1, "text": "a"}]}, 'corpus.jsonl:1 needs the strings "_id" and "text"'),
        ({"corpus": [*CORPUS, CORPUS[0]]}, "corpus.jsonl:4"),
        ({"queries": [{"_id": "q1"}]}, 'queries.jsonl:1 needs the strings "_id" and "text"'),
        ({"queries": [*QUERIES, {"_id": "q2", "text": "again"}]}, "queries.jsonl:4"),
        ({"queries": b'{"_id": "q1", "text": "\xff"}\n'}, "queries.jsonl:1 is not UTF-8"),
        ({"qrels": QRELS + "q1\td2\n"}, "test.tsv:5 is not"),
        ({"qrels": QRELS + "q1\td2\tgood\n"}, "test.tsv:5 is not"),
        ({"qrels": QRELS + "q1\td2\t--1\n"}, "test.tsv:5 is not"),
        ({"qrels": QRELS + "q1\td9\t1\n"}, "test.tsv:5 names q1 and d9"),
        ({"qrels": QRELS + "q9\td1\t1\n"}, "test.tsv:5 names q9 and d1"),
        ({"qrels": QRELS.encode() + b"q1\td\xff\t1\n"}, "test.tsv:5 is not UTF-8"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "judges no query"),
        ({"qrels": "q2\td2\t1\nq1\td1\t1\n"}, "test.tsv:1"),  # no header: the first judgement must not vanish
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_faulty_beir_folder(tmp_path, changes, named):
    with pytest.raises(UserError) as caught:
        sources.read_task(beir(tmp_path / "t", **changes))
    assert named in str(caught.value)


def test_a_missing_part_and_a_missing_split(tmp_path):
    folder = beir(tmp_path / "t")
    with pytest.raises(UserError, match=r"split 'dev': .*dev\.tsv does not exist"):
        sources.read_task(folder, split="dev")
    (tmp_path / "t" / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl does not exist"):
        sources.read_task(folder)


def test_a_title_of_null_is_no_title(tmp_path):
    path = write(tmp_path / "corpus.jsonl", lines([{"_id": "d1", "title": None, "text": "one"}]))
    assert sources.read_corpus(path) == {"d1": "one"}


def test_read_texts(tmp_path):
    data = lines([{"text": "eins"}, {"text": "二", "id": 3}])
    assert sources.read_texts(write(tmp_path / "t.jsonl", data)) == ["eins", "二"]
    assert sources.read_texts("standard input", stream=io.BytesIO(data)) == ["eins", "二"]
    for bad in (b'{"txt": "x"}', b'{"text": " "}', b'{"text": 3}', b'["x"]'):
        with pytest.raises(UserError, match="standard input:3 has no text"):
            sources.read_texts("standard input", stream=io.BytesIO(data + bad))


def test_empty_documents_are_judged_but_not_in_the_corpus(tmp_path):
    """BEIR has a few: they cannot be found, and a judgement may name them."""
    folder = beir(tmp_path, corpus=[*CORPUS, {"_id": "d4", "text": " "}])
    assert "d4" not in sources.read_task(str(folder)).corpus
    assert "d4" not in sources.read_corpus(f"{folder}/corpus.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"_id": "d1", "text": ""}\n')
    with pytest.raises(UserError, match="holds no documents"):
        sources.read_corpus(tmp_path / "empty.jsonl")


def test_a_blank_line_among_texts_is_named_because_row_i_is_line_i(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n\n')
    with pytest.raises(UserError, match=r"t\.jsonl:2 is not JSON"):
        sources.read_texts(str(path))
    path.write_text('{"text": "a"}\n{"text": "b"}\n\n')
    assert sources.read_texts(str(path)) == ["a", "b"]

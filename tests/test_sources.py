"""Files to texts, strictly: what is good is read as it stands, a bad row is named by file and line."""

import gzip
import io
import json
import pickle
import re
import zlib

import numpy as np
import pytest

from moe_embed import prepare
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data.pairs import Pair

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
    "id list": (b'{"query": "a", "document": "d", "id": ["7"]}\n', "'id'"),
    "lang boolean": (b'{"query": "a", "document": "d", "lang": true}\n', "'lang'"),
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
    assert "ends in .jsonl, .csv, .tsv, .parquet, .arrow; the first three also in those and .gz or .zst" in fault(
        write(tmp_path / "a.txt", lines(GOOD))
    )
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
    assert list(sources.read_texts(write(tmp_path / "t.jsonl", data))) == ["eins", "二"]
    assert list(sources.read_texts("standard input", stream=io.BytesIO(data))) == ["eins", "二"]
    for bad in (b'{"txt": "x"}', b'{"text": " "}', b'{"text": 3}', b'["x"]'):
        with pytest.raises(UserError, match="standard input:3 has no text"):
            list(sources.read_texts("standard input", stream=io.BytesIO(data + bad)))


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
        list(sources.read_texts(str(path)))
    path.write_text('{"text": "a"}\n{"text": "b"}\n\n')
    assert list(sources.read_texts(str(path))) == ["a", "b"]


@pytest.mark.parametrize("reader", [sources.read_sources, sources.read_text_sources])
def test_of_a_beir_folder_it_is_said_what_makes_it_pairs(tmp_path, reader):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "a document"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    with pytest.raises(UserError, match="is no prepared data set"):  # nor can prepare make one: nothing to train on
        reader(str(folder))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    with pytest.raises(UserError, match="is a BEIR folder; run prepare on it first") as fault:
        reader(str(folder))
    (command,) = re.findall(r"python -m moe_embed\.prepare (.*) --output=DIR", str(fault.value))
    prepare.main([command, f"--output={tmp_path}/out", "--processes=1"])
    assert len(reader(f"{tmp_path}/out")) == 1


def read(path, *rows, **columns) -> list[Pair]:
    return sources.read_source(write(path, lines(rows)), **columns).pairs


def test_a_list_of_documents_is_as_many_pairs(tmp_path):
    row = {"query": "q", "documents": ["d", "e"], "negatives": ["n"], "scores": [3, 2, 1.5], "id": "i", "lang": "de"}
    one, other, last = read(tmp_path / "a.jsonl", row, {"query": "r", "document": "f"})
    assert one == Pair("q", "d", ("n",), "de", "i", (3.0, 1.5))
    assert other == Pair("q", "e", ("n",), "de", "i", (2.0, 1.5))
    assert last == Pair("r", "f")
    both = row | {"document": "own"}  # the column that is asked for comes first
    assert [pair.document for pair in read(tmp_path / "a.jsonl", {**both, "scores": [3, 1]})] == ["own"]
    named = {"question": "q", "passage": "p"}
    assert read(tmp_path / "a.jsonl", named, query="question", document="passage") == [Pair("q", "p")]


def test_an_id_may_be_a_whole_number(tmp_path):
    rows = [{"query": "q", "document": "d", "id": 7}, {"query": "q", "document": "d", "id": None}]
    assert [pair.id for pair in read(tmp_path / "a.jsonl", *rows)] == ["7", ""]


BGE = {"query": "q", "pos": ["d", "e"], "neg": ["n", "m"], "pos_scores": [9, 8], "neg_scores": [2, 1]}


def test_rows_in_bges_columns(tmp_path):
    plain = {name: BGE[name] for name in ("query", "pos", "neg")}
    without = [Pair("q", "d", ("n", "m")), Pair("q", "e", ("n", "m"))]
    scored = [Pair("q", "d", ("n", "m"), scores=(9, 2, 1)), Pair("q", "e", ("n", "m"), scores=(8, 2, 1))]
    assert read(tmp_path / "a.jsonl", plain, BGE) == [*without, *scored]
    assert read(tmp_path / "a.jsonl", plain | {"pos_scores": None, "neg_scores": None}) == without
    assert read(tmp_path / "a.jsonl", {"query": "q", "pos": ["d"]}) == [Pair("q", "d")]
    only = {"query": "q", "pos": ["d"], "pos_scores": [9], "neg_scores": None}
    assert read(tmp_path / "a.jsonl", only) == [Pair("q", "d", scores=(9,))]
    assert scored[0] != scored[1]


HUGE = 10**400  # a number in JSON, not in a float
BAD_LISTS = {
    "documents a text": ({"query": "q", "documents": "d"}, "'documents'"),
    "no documents": ({"query": "q", "documents": []}, "'documents'"),
    "an empty document": ({"query": "q", "documents": ["d", " "]}, "'documents'"),
    "a number": ({"query": "q", "pos": ["d", 1]}, "'pos'"),
    "pos a text": ({"query": "q", "pos": "d"}, "'pos'"),
    "no query": ({"pos": ["d"]}, "has no column 'query'"),
    "neg a text": ({"query": "q", "pos": ["d"], "neg": "n"}, "neg that are not a list"),
    "too few scores": (BGE | {"neg_scores": [2]}, "scores"),
    "scores the other way round": (BGE | {"pos": ["d"], "pos_scores": [9, 8], "neg_scores": [2]}, "scores"),
    "no scores of negatives": (BGE | {"neg_scores": None}, "scores"),
    "pos_scores a number": (BGE | {"pos_scores": 5}, "scores"),
    "neg_scores a number": (BGE | {"neg_scores": 5}, "scores"),
    "scores a number": ({"query": "q", "document": "d", "scores": 1}, "for each of its 1 documents"),
    "one score too many": ({"query": "q", "document": "d", "scores": [1, 2]}, "then for each of its 0 negatives"),
    "a score too few": ({"query": "q", "document": "d", "negatives": ["n"], "scores": [1]}, "of its 1 negatives"),
    "a score of text": ({"query": "q", "document": "d", "scores": ["1"]}, "scores ['1']"),
    "a score of NaN": ({"query": "q", "document": "d", "scores": [float("nan")]}, "scores [nan]"),
    "an infinite score": ({"query": "q", "document": "d", "scores": [float("inf")]}, "scores [inf]"),
    "a huge score": ({"query": "q", "document": "d", "scores": [HUGE]}, "scores"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_bad_list_or_score_is_named(tmp_path, kind):
    row, what = BAD_LISTS[kind]
    path = write(tmp_path / "a.jsonl", lines([*GOOD, row]))
    sentence = fault(path)
    assert f"{path}:3 " in sentence
    assert what in sentence


def test_a_text_source_reads_text_or_else_the_documents(tmp_path):
    rows = [
        {"text": "eins", "lang": "de"},
        {"query": "q", "document": "zwei"},
        {"text": "t", "document": "d", "lang": 3},
    ]
    data = lines(rows)
    found = sources.read_text_source(write(tmp_path / "a.jsonl.gz", gzip.compress(data)))
    assert (found.texts, found.langs) == (["eins", "zwei", "t"], ["de", "", "3"])
    assert (len(found), found.digest) == (3, zlib.crc32(data))
    assert found.path == str(tmp_path / "a.jsonl.gz")
    assert sources.read_text_source(write(tmp_path / "a.csv", b"text,lang\n a b,ja\n")).texts == [" a b"]
    passages = write(tmp_path / "p.jsonl", lines([{"passage": "p"}]))
    assert sources.read_text_source(passages, column="passage").texts == ["p"]


@pytest.mark.parametrize(
    "row", [{"passage": "p"}, {"text": " "}, {"text": None, "document": "d"}, {"text": 3}, ["text"], "text"]
)
def test_a_row_without_a_text_is_named(tmp_path, row):
    path = write(tmp_path / "a.jsonl", lines([{"text": "good"}, row]))
    with pytest.raises(UserError) as caught:
        sources.read_text_source(path)
    assert caught.value.args == (f"{path}:2 has no text in a column 'text' or 'document'.",)


def test_a_text_source_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl holds no texts"):
        sources.read_text_source(write(tmp_path / "a.jsonl", b"\n"))
    with pytest.raises(UserError, match="does not exist"):
        sources.read_text_source(str(tmp_path / "none.jsonl"))


def teacher(tmp_path, *, query=None, document=None) -> str:
    """A file of two rows and three pairs, and its vectors by "big"; an array, or bytes to stand in its place."""
    path = write(
        tmp_path / "a.jsonl", lines([{"query": "q", "documents": ["d", "e"]}, {"query": "r", "document": "f"}])
    )
    for side, what in (("query", query), ("document", document)):
        if isinstance(what, bytes):
            write(tmp_path / f"a.jsonl.big.{side}.npy", what)
        elif what is not None:
            np.save(tmp_path / f"a.jsonl.big.{side}.npy", what)
    return path


def test_a_teachers_vectors_are_read_beside_the_file(tmp_path):
    query_ND, document_ND = np.arange(12.0, dtype=np.float16).reshape(3, 4), np.ones((3, 4), np.float32)
    path = teacher(tmp_path, query=query_ND, document=document_ND)
    found = sources.read_source(path, teacher="big")
    assert set(found.teacher) == {"query", "document"}
    np.testing.assert_array_equal(found.teacher["query"], query_ND)
    np.testing.assert_array_equal(found.teacher["document"], document_ND)
    assert isinstance(found.teacher["query"], np.memmap)  # not in memory
    assert len(found.pairs) == len(found.teacher["query"])  # a row for each pair, not for each line
    assert sources.read_source(path).teacher == {}
    with pytest.raises(UserError, match=r"a\.jsonl\.other\.query\.npy cannot be read"):
        sources.read_source(path, teacher="other")


GOOD_VECTORS = np.ones((3, 4), np.float32)
BAD_VECTORS = {
    "a row for each line": (GOOD_VECTORS[:2], r"it must be floats, \[3 pairs, dim\]"),
    "a row too many": (np.ones((4, 4), np.float32), r"float32 \[4, 4\]; it must be floats, \[3 pairs, dim\]"),
    "integers": (np.ones((3, 4), np.int64), r"int64 \[3, 4\]"),
    "one dim": (np.ones(3, np.float32), r"float32 \[3\]"),
    "no array": (b"vectors", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "objects": (np.array([{}, {}, {}]), "cannot be read"),
}


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("kind", BAD_VECTORS)
def test_vectors_that_do_not_fit_are_refused(tmp_path, kind, side):
    what, said = BAD_VECTORS[kind]
    path = teacher(tmp_path, **({"query": GOOD_VECTORS, "document": GOOD_VECTORS} | {side: what}))
    with pytest.raises(UserError, match=said) as caught:
        sources.read_source(path, teacher="big")
    assert f"{path}.big.{side}.npy" in str(caught.value)


def test_vectors_of_two_dims_are_refused(tmp_path):
    path = teacher(tmp_path, query=GOOD_VECTORS, document=GOOD_VECTORS[:, :3])
    with pytest.raises(UserError, match=r"document\.npy"):
        sources.read_source(path, teacher="big")


def test_vectors_cut_short_and_an_archive_are_refused(tmp_path):
    whole = io.BytesIO()
    np.save(whole, GOOD_VECTORS)
    archive = io.BytesIO()
    np.savez(archive, GOOD_VECTORS)
    for data in (whole.getvalue()[:-4], archive.getvalue()):
        path = teacher(tmp_path, query=data, document=GOOD_VECTORS)
        with pytest.raises(UserError, match=r"query\.npy"):
            sources.read_source(path, teacher="big")


def test_a_teachers_vectors_go_to_another_process_by_name(tmp_path):
    x_ND = np.arange(6, dtype=np.float32).reshape(3, 2)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"query": "q{i}", "document": "d"}}\n' for i in range(3)))
    for side in sources.SIDES:
        np.save(tmp_path / f"p.jsonl.t.{side}.npy", np.repeat(x_ND, 4096, 1))
    source = sources.read_source(str(tmp_path / "p.jsonl"), teacher="t")
    sent = pickle.dumps(source)
    assert len(sent) < 2_000
    again = pickle.loads(sent)
    np.testing.assert_array_equal(again.teacher["query"], source.teacher["query"])
    assert again.pairs == source.pairs


def test_a_folder_of_tasks_is_no_task_and_says_which_it_holds():
    with pytest.raises(
        UserError, match=r"is not a BEIR folder .* There are some in it: libreoffice-help-de, libreoffice-help-en"
    ):
        sources.read_task("moe_embed/sample/tasks")

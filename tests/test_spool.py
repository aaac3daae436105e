"""The passes of prepare, one by one: what is in a spool, and that what is done is not done again."""

import json

import numpy as np
import pytest

from moe_embed import prepare
from moe_embed.config import UserError
from moe_embed.data import inputs, prepared, spool
from moe_embed.data.hygiene import Rules
from moe_embed.data.pairs import Pair
from moe_embed.data.spool import Settings

TOKENIZER = str(prepare.SAMPLE_TOKENIZER)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(i: int, lang: str = "de") -> dict:
    return {"query": f"q{i}", "document": f"a longer document {i}", "lang": lang}


def fill(tmp_path, rows, name="a", **settings) -> dict:
    path = write(tmp_path / f"{name}.jsonl", rows)
    spool.fill(path, tmp_path / name, Settings(tokenizer=TOKENIZER, **settings))
    return spool.report_of(tmp_path / name)


def test_a_spool_holds_the_pairs_in_order_with_their_facts(tmp_path):
    report = fill(tmp_path, [row(0), row(1, "en"), row(2)])
    facts = np.fromfile(tmp_path / "a" / "facts", spool.FACTS)
    data = (tmp_path / "a" / "records").read_bytes()
    ends = np.cumsum(facts["bytes"])
    pairs = [prepared.from_bytes(data[end - size : end]) for end, size in zip(ends, facts["bytes"], strict=True)]
    assert [pair.query for pair in pairs] == ["q0", "q1", "q2"]
    assert [report["langs"][code] for code in facts["lang"]] == ["de", "en", "de"]
    assert (report["rows"], report["pairs"]) == (3, 3)
    tokenizer = spool._tokenizer(TOKENIZER)
    ids, _ = tokenizer.encode([pair.document for pair in pairs], max_length=100)
    assert facts["document"].tolist() == [len(i) for i in ids] != facts["query"].tolist()


def test_what_is_left_out_is_counted(tmp_path):
    rows = [row(0), {"query": "x"}, row(1, "fr"), row(2)]
    report = fill(tmp_path, rows, max_bad_fraction=0.5, rules=Rules(languages=("de",)))
    assert (report["bad"], report["dropped"]) == ({"column missing": 1}, {"other language": 1})
    assert "a.jsonl:2 has no column" in report["examples"][0]
    with pytest.raises(UserError, match=r"a.jsonl:2"):
        fill(tmp_path, rows, name="a", max_bad_fraction=0.0) if (tmp_path / "a" / "report.json").unlink() is None else 0


def test_a_language_for_rows_without_one_and_several_documents(tmp_path):
    rows = [{"query": "q", "documents": ["d", "e"]}, row(1)]
    report = fill(tmp_path, rows, lang="ja")
    assert report["langs"] == ["ja", "de"]
    assert (report["rows"], report["pairs"]) == (2, 3)


def test_a_done_spool_is_not_read_again_and_a_begun_one_is(tmp_path):
    fill(tmp_path, [row(0), row(1)])
    before = (tmp_path / "a" / "records").read_bytes()
    fill(tmp_path, [row(5)])  # report.json is there
    assert (tmp_path / "a" / "records").read_bytes() == before
    (tmp_path / "a" / "report.json").unlink()
    fill(tmp_path, [row(5)])
    assert (tmp_path / "a" / "records").read_bytes() != before


def test_layout_shards_and_copies(tmp_path):
    fill(tmp_path, [row(i, ("de", "en")[i % 2]) for i in range(5)])
    fill(tmp_path, [row(4), row(9, "ja")], name="b")  # row 4 was in a
    folders = [tmp_path / "a", tmp_path / "b"]
    kept = spool.without_copies(folders)
    assert [keep.tolist() for keep in kept] == [[True] * 5, [False, True]]
    layout = spool.lay_out(["a", "b"], folders, kept)
    assert [(source, rows.tolist()) for source, rows in layout.pieces] == [(0, [0, 2, 4]), (0, [1, 3]), (1, [1])]
    assert [source["languages"] for source in layout.sources] == [[["de", 3], ["en", 2]], [["ja", 1]]]
    assert (layout.total, layout.copies) == (6, [0, 1])
    shards = [
        spool.write_shard(tmp_path, tmp_path, spool.pieces_of(layout, number, 4), number, 4) for number in range(4)
    ]
    assert [shard["records"] for shard in shards] == [1, 2, 1, 2]
    records = prepared.Shards(tmp_path, shards).read(np.arange(6))
    assert [prepared.from_bytes(record).query for record in records] == ["q0", "q2", "q4", "q1", "q3", "q9"]
    again = spool.write_shard(tmp_path, tmp_path, [], 0, 4)
    assert again == shards[0]
    with pytest.raises(UserError, match="a: all of its pairs are copies"):
        spool.lay_out(["a", "b"], folders, [np.zeros(5, bool), kept[1]])


def test_a_work_folder_without_places_of_records_is_read_again(tmp_path):
    """As an earlier version left it, and as a kill leaves it while that is read again."""
    fill(tmp_path, [row(i) for i in range(9)])
    folder, rows = tmp_path / "a", np.array([7, 0, 3])
    wanted = [prepared.to_bytes(Pair(f"q{i}", f"a longer document {i}", lang="de")) for i in rows]
    assert list(spool._records(folder, rows)) == wanted
    assert list(spool._records(folder, rows[::-1])) != wanted
    (folder / "starts").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "_lengths", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path, [row(i) for i in range(9)])
    fill(tmp_path, [row(i) for i in range(9)])
    assert list(spool._records(folder, rows)) == wanted


def interrupted(*_):
    """A kill, in the place of some work."""
    raise KeyboardInterrupt


def test_a_beir_folder_gives_its_relevant_pairs(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"doc {i}"} for i in range(3)])
    write(folder / "queries.jsonl", [{"_id": "q1", "text": "one"}])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\nq1\td1\t0\nq1\td2\t2\n")
    spool.fill(str(folder), tmp_path / "s", Settings(tokenizer=TOKENIZER, lang="en"))
    facts = np.fromfile(tmp_path / "s" / "facts", spool.FACTS)
    data = (tmp_path / "s" / "records").read_bytes()
    first = prepared.from_bytes(data[: facts["bytes"][0]])
    assert len(facts) == 2
    assert (first.query, first.document, first.id, first.lang) == ("one", "doc 0", "q1", "en")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert spool.identity(str(folder)) == {"name": str(folder), "bytes": size, "digest": inputs.digest(str(folder))}


def test_a_judged_document_without_a_text_is_counted(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": "d0", "text": "doc"}, {"_id": "d1", "text": " "}])
    write(folder / "queries.jsonl", [{"_id": "q1", "text": "one"}])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\nq1\td1\t1\n")
    with pytest.raises(UserError, match="the document 'd1' that answers 'q1' has no text"):
        spool.fill(str(folder), tmp_path / "s", Settings(tokenizer=TOKENIZER))
    spool.fill(str(folder), tmp_path / "t", Settings(tokenizer=TOKENIZER, max_bad_fraction=0.5))
    report = spool.report_of(tmp_path / "t")
    assert (report["rows"], report["pairs"], report["bad"]) == (2, 1, {"empty text": 1})


def test_a_chunk_ends_at_so_many_characters(monkeypatch):
    monkeypatch.setattr(spool, "CHARACTERS", 10)
    pairs = [Pair("q" * 4, "d", ("n",) * 2) for _ in range(5)]
    assert [len(chunk) for chunk in spool._chunks(iter(pairs))] == [2, 2, 1]


def test_benchmarks_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match="not a BEIR folder"):
        spool.check(Settings(tokenizer=TOKENIZER, benchmarks=(str(tmp_path),)))

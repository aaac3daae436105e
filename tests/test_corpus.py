"""A corpus that stays on disk says what the one in memory says: ids, order, texts, and the same faults."""

import json
import pathlib

import pytest

import moe_embed
from moe_embed.config import UserError
from moe_embed.data import corpus, sources

TASKS = pathlib.Path(moe_embed.__file__).parent / "sample" / "tasks"
ROWS = [
    {"_id": "d1", "title": "T", "text": "one"},
    {"_id": "d2", "text": " "},
    {"_id": "表" * 30, "text": "三"},
    {"_id": "", "title": None, "text": "four"},
]


def write(folder: pathlib.Path, rows=ROWS) -> pathlib.Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("held", [1, 2, 3, 100])
def test_on_disk_and_in_memory_are_the_same(tmp_path, monkeypatch, held):
    monkeypatch.setattr(corpus, "IDS", held)
    judged = ["d2", "d1", "elsewhere"]
    memory, known = corpus.read(write(tmp_path), judged=judged)
    disk, also_known = corpus.read(write(tmp_path), judged=judged, on_disk=True)
    assert list(memory.items()) == [("d1", "T one"), ("表" * 30, "三"), ("", "four")]
    assert list(zip(disk, disk.values(), strict=True)) == list(memory.items())
    assert (len(disk), list(disk.ids)) == (3, list(memory))
    assert known == also_known == {"d1", "d2"}
    assert all(type(name) is str for name in (*disk, disk.ids[1]))
    assert disk.digest == corpus.survey(memory.values())[1]
    other, _ = corpus.read(write(tmp_path, [ROWS[0], *ROWS[2:], {"_id": "d9", "text": "five"}]), on_disk=True)
    assert disk.digest != other.digest
    assert disk != other


def test_only_the_texts_and_their_order_are_in_the_digest():
    assert corpus.survey(["ab", "c"]) == corpus.survey(iter(["ab", "c"]))
    assert corpus.survey(["ab", "c"])[0] == 2
    found = {corpus.survey(texts)[1] for texts in (["ab", "c"], ["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], [])}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"_id": "d1", "text": "x"}, r"corpus\.jsonl:5 has the _id 'd1' a second time"),
        ({"_id": "d2", "text": "x"}, r"corpus\.jsonl:5 has the _id 'd2' a second time"),  # the first one is empty
        ({"_id": "d1", "text": ""}, r"corpus\.jsonl:5 has the _id 'd1' a second time"),
        ({"_id": 1, "text": "x"}, r'corpus\.jsonl:5 needs the strings "_id" and "text"'),
        ({"_id": "\ud800", "text": "x"}, r"corpus\.jsonl:5 has the _id '\\ud800', which UTF-8 cannot say"),
    ],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_faults_are_named_either_way(tmp_path, row, words, on_disk):
    with pytest.raises(UserError, match=words):
        corpus.read(write(tmp_path, [*ROWS, row]), on_disk=on_disk)


def test_an_empty_corpus(tmp_path):
    disk, known = corpus.read(write(tmp_path, []), judged=["d1"], on_disk=True)
    assert (list(disk), list(disk.values()), known) == ([], [], set())


def test_a_task_of_which_the_texts_stay_on_disk():
    folder = str(TASKS / "xling-libreoffice-help-de-en")
    memory, disk = sources.read_task(folder), sources.read_task(folder, on_disk=True)
    assert isinstance(disk.corpus, corpus.Corpus)
    assert list(zip(disk.corpus, disk.corpus.values(), strict=True)) == list(memory.corpus.items())
    assert (disk.name, disk.queries, disk.relevance) == (memory.name, memory.queries, memory.relevance)
    assert not any(isinstance(part, dict) and memory.corpus.items() <= part.items() for part in vars(disk).values())


def test_a_judgement_of_a_document_that_is_not_there(tmp_path):
    write(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (tmp_path / "qrels").mkdir()
    for document, fine in (("d1", True), ("d2", True), ("d3", False)):
        (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{document}\t1\n")
        if fine:
            assert sources.read_task(str(tmp_path), on_disk=True).relevance == {"q": {document: 1}}
        else:
            with pytest.raises(UserError, match=r"test\.tsv:2 names q and d3"):
                sources.read_task(str(tmp_path), on_disk=True)

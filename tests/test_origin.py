"""task.json: what a plain folder has without it, what it adds, and how it may be wrong."""

import json

import pytest

from moe_embed.config import UserError
from moe_embed.data import origin, sources
from moe_embed.data.origin import Origin


def test_a_plain_folder_is_its_name_and_a_group_has_parts(tmp_path):
    for name in ("scifact", "miracl/de", "cqadupstack/gis"):
        (tmp_path / name).mkdir(parents=True)
    assert origin.of_folder(tmp_path / "scifact") == Origin("scifact")
    assert origin.of_folder(tmp_path / "miracl" / "de") == Origin("miracl", "de")
    assert origin.of_folder(tmp_path / "cqadupstack" / "gis").name == "cqadupstack/gis"
    assert origin.of_folder(tmp_path / "scifact").name == "scifact"


def test_what_is_written_is_read(tmp_path):
    given = Origin("MIRACLRetrieval", "de", "dev", ("deu-Latn",), "9c09", "2.26.24", True)
    origin.write(tmp_path, given)
    assert origin.of_folder(tmp_path) == given != Origin("MIRACLRetrieval", "de")
    assert given.name == "MIRACLRetrieval/de"


def test_some_of_it_is_enough_and_the_task_has_it(tmp_path):
    folder = tmp_path / "arguana"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (folder / "task.json").write_text('{"ignore_identical_ids": true, "split": "dev"}')
    task = sources.read_task(str(folder))
    assert task.origin == Origin("arguana", split="dev", ignore_identical_ids=True)
    assert (task.name, sources.read_task(str(folder), split="dev")) == ("arguana", task)
    with pytest.raises(UserError, match="'test'"):
        sources.read_task(str(folder), split="test")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"tusk": "a"}', "tusk.*it may hold task, subset"),
        ('{"split": 3}', "has split: 3"),
        ('{"languages": [3]}', r"has languages: \(3,\)"),
        ('{"languages": 3}', "cannot be read"),
        ('{"ignore_identical_ids": "no"}', "has ignore_identical_ids: 'no'"),
        ('{"task": null}', "has task: None"),
    ],
)
def test_a_wrong_one_is_named(tmp_path, text, words):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(UserError, match=words):
        origin.of_folder(tmp_path)
    (tmp_path / "task.json").write_text(json.dumps({"mteb_version": None}))
    assert origin.of_folder(tmp_path).mteb_version is None

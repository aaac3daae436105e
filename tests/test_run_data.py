"""What a run opens: names that stand for several sources, their weights, and what is left out."""

import dataclasses
import json
import re

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import held_out, prepare, run_data
from moe_embed.config import UserError
from tests import tiny


@pytest.fixture
def config():
    return config_lib.load("configs/demo.py:tiny", ["--config.data.batch_size=8", "--config.run.steps=40"])


def write(path, count: int, lang: str = "de") -> str:
    path.write_text("".join(json.dumps({"query": f"{path.stem} {i}", "document": f"d {path.stem} {i}", "lang": lang}) + "\n" for i in range(count)))  # fmt: skip
    return str(path)


def open_(config, num_shards=1, **data):
    return run_data.open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, **{"dev": (), "weights": ()} | data)), num_shards=num_shards)[1]  # fmt: skip


def test_a_prepared_folder_a_pattern_and_the_files_give_the_same_pairs(tmp_path, config):
    for name, count in (("a", 40), ("b", 24)):
        write(tmp_path / f"{name}.jsonl", count)
    prepare.main([f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--processes=1"])
    files = open_(config, sources=(f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"))
    pattern = open_(config, sources=(f"{tmp_path}/*.jsonl",))
    folder = open_(config, sources=(f"{tmp_path}/out",))
    for other in (pattern, folder):
        for step in (0, 7, 39):
            expected, found = files.batch_at(step).arrays, other.batch_at(step).arrays
            assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert files.fingerprint == pattern.fingerprint != folder.fingerprint
    turned = open_(config, sources=(f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"))
    assert not np.array_equal(turned.batch_at(0).arrays["tokens_MBL"], files.batch_at(0).arrays["tokens_MBL"])


def test_a_names_weight_is_shared_by_what_it_stands_for(tmp_path, config):
    for name, count in (("a1", 60), ("a2", 20), ("b", 40)):
        write(tmp_path / f"{name}.jsonl", count)
    made = open_(config, sources=(f"{tmp_path}/a*.jsonl", f"{tmp_path}/b.jsonl"), weights=(0.8, 0.2))
    np.testing.assert_allclose(made.c.weights, (0.6, 0.2, 0.2))
    drawn = [made.batch_at(step).source.rsplit("/", 1)[-1] for step in range(40)]
    assert {name: drawn.count(name) for name in set(drawn)} == {"a1.jsonl": 24, "a2.jsonl": 8, "b.jsonl": 8}


def test_bad_rows_are_said(tmp_path, config, capsys):
    path = write(tmp_path / "a.jsonl", 99)
    with open(path, "a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"a.jsonl:100"):
        open_(config, sources=(path,))
    open_(config, sources=(path,), max_bad_fraction=0.01)
    assert "1 of 100 rows were left out (column missing: 1)" in capsys.readouterr().out


def test_every_fault_at_once(tmp_path, config):
    with pytest.raises(UserError) as caught:
        open_(config, sources=(f"{tmp_path}/x.jsonl", f"{tmp_path}/*.csv"), tokenizer="nowhere")
    assert len(caught.value.args) == 3


def test_dev_tasks_of_one_name_are_refused_with_the_other_faults(tmp_path, config):
    """Their figures go by it."""
    for name in ("de/faq", "en/faq", "en/news"):
        (tmp_path / name / "qrels").mkdir(parents=True)
        (tmp_path / name / "corpus.jsonl").write_text('{"_id": "d", "text": "a"}\n')
        (tmp_path / name / "queries.jsonl").write_text('{"_id": "q", "text": "b"}\n')
        (tmp_path / name / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    de, en, news, none = (f"{tmp_path}/{name}" for name in ("de/faq", "en/faq", "en/news", "none"))
    same = "config.data.dev has more than one task named faq; results go by a folder's name."
    for dev, tokenizer, said in (
        ((de, en), "nowhere", [re.compile("nowhere"), re.compile(same)]),
        ((de, none, en, none), config.data.tokenizer, [re.compile("none"), re.compile("none"), re.compile(same)]),
    ):
        with pytest.raises(UserError) as caught:
            open_(config, sources=(write(tmp_path / "a.jsonl", 99),), dev=dev, tokenizer=tokenizer)
        assert len(caught.value.args) == len(said), caught.value.args
        assert all(pattern.search(sentence) for pattern, sentence in zip(said, caught.value.args, strict=True))
    data = dataclasses.replace(config.data, sources=(write(tmp_path / "a.jsonl", 99),), dev=(de, news))
    files = run_data.read_files(dataclasses.replace(config, data=data), with_tokenizer=False)
    assert [task.name for task in files.tasks] == ["faq", "news"]


def test_a_file_that_is_named_twice_is_refused(tmp_path, config):
    path = write(tmp_path / "a.jsonl", 9)
    with pytest.raises(UserError, match=r"a\.jsonl stands twice in config.data.sources"):
        open_(config, sources=(path, f"{tmp_path}/*.jsonl"))


def test_too_much_to_hold_out(tmp_path, config, monkeypatch):
    monkeypatch.setattr(held_out, "MOST_PAIRS", 10)
    with pytest.raises(UserError, match="reads all pairs into memory, and there are 99"):
        open_(config, sources=(write(tmp_path / "a.jsonl", 99),), held_out=0.1)


def test_what_prepare_said_of_the_data_stays_with_the_run(tmp_path, config):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", 3)
        prepare.main([f"--input={tmp_path}/{name}.jsonl", f"--output={tmp_path}/{name}", "--processes=1"])
    data = dataclasses.replace(config.data, sources=(f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/a.jsonl"))
    run_data.keep_cards(dataclasses.replace(config, data=data), tmp_path)
    text = (tmp_path / run_data.CARD).read_text()
    assert "| a.jsonl | 3 | 3 |" in text
    assert "| b.jsonl | 3 | 3 |" in text


def test_what_was_cut_is_said():
    c = tiny.config(data={"batch_size": 8, "document_length": 16})
    rows = [
        {"queries": 8, "cut_queries": 0, "documents": documents, "cut_documents": cut}
        for documents, cut in ((24, 5), (16, 5))
    ]
    said = "cut         25% of the documents were longer than 16 tokens: the rest of them was not read"
    assert run_data.what_was_cut(rows, c) == said
    assert run_data.what_was_cut([*rows, {"loss": 1.0}], c) == said
    assert run_data.what_was_cut([rows[0] | {"documents": 60}], c) != said
    assert run_data.what_was_cut([{"loss": 1.0}], c) == run_data.what_was_cut([], c) == ""
    # a row of a version that did not count what was encoded says no share
    assert run_data.what_was_cut([{"cut_queries": 0, "cut_documents": 8}], c) == ""


@pytest.mark.parametrize(("long", "share"), [(4, "100%"), (1, "25%"), (0, "")])
def test_hard_negatives_are_among_the_documents_that_can_be_cut(tmp_path, config, long, share):
    texts = ["page " * 99 if i < long else "short" for i in range(4)]
    rows = [{"query": f"q{i}", "document": f"{i} {texts[0]}", "negatives": [f"{i} {n} {texts[n]}" for n in (1, 2, 3)]} for i in range(40)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = open_(config, sources=(f"{tmp_path}/a.jsonl",), num_negatives=3, document_length=32)
    said = run_data.what_was_cut([made.batch_at(step).counts for step in range(4)], config)
    assert said.startswith(f"cut         {share} of the documents were longer") if share else not said

"""What an output says of itself: the model, the texts, and what is not one."""

import dataclasses
import json
import types

import pytest

from moe_embed import results
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.data.origin import Origin
from moe_embed.data.sources import Task

TASK = Task("t", {"a": "first", "b": "second"}, {"q": "which"}, {"q": {"a": 1}})
FIGURES = {"ndcg@10": 0.5, "recall@10": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {"a": "first", "b": "third"}},
        {"corpus": {"a": "first", "c": "second"}},
        {"corpus": {"b": "second", "a": "first"}},
        {"queries": {"q": "why"}},
        {"queries": {"p": "which"}},
        {"relevance": {"q": {"b": 1}}},
        {"relevance": {"q": {"a": 2}}},
        {"origin": Origin(ignore_identical_ids=True)},
    ],
)
def test_a_digest_is_of_documents_queries_and_judgements(change):
    found = results.of_task(TASK)
    assert (
        found == results.of_task(dataclasses.replace(TASK)) == found | {"documents": 2, "queries": 1, "judgements": 1}
    )
    assert results.of_task(dataclasses.replace(TASK, **change))["digest"] != found["digest"]


def test_it_is_the_same_for_texts_on_disk(tmp_path):
    (tmp_path / "qrels").mkdir()
    rows = [{"_id": "a", "text": "first"}, {"_id": "empty", "text": " "}, {"_id": "b", "text": "second"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "which"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    one, other = (results.of_task(sources.read_task(str(tmp_path), on_disk=on_disk)) for on_disk in (False, True))
    assert one == other == results.of_task(TASK)


def test_a_model_says_what_it_began_with(tmp_path, monkeypatch):
    model = types.SimpleNamespace(origin="w (step 3)", digest="ab")
    assert results.of_model(model, name=str(tmp_path))["began_with"] is None  # a Hugging Face folder says nothing of it
    (tmp_path / results.DESCRIPTION).write_text("{}")
    for init_from, made_by in (("base", None), (None, "upcycle --model=base"), (None, None)):
        of_run = types.SimpleNamespace(init_from=init_from, made_by=made_by)
        monkeypatch.setattr(results, "read_description", lambda root, of_run=of_run: of_run)
        found = results.of_model(model, name=str(tmp_path))
        assert found == {
            "name": str(tmp_path),
            "loaded": "w (step 3)",
            "began_with": init_from or made_by,
            "digest": "ab",
        }


def written(path, value) -> str:
    path.write_text(json.dumps(value))
    return path


def test_facts_are_read_back_and_said(tmp_path):
    model = {"name": "w", "loaded": "w (step 3)", "began_with": "base", "digest": "0123456789abcdef"}
    one = results.with_facts({"t": FIGURES}, [TASK], model=model, version="9")
    assert one["t"] == FIGURES | {"model": model, "task": results.of_task(TASK)} | {
        key: one["t"][key] for key in ("date", "versions")
    }
    assert one["t"]["versions"]["moe_embed"] == "9"
    both = {"moe_embed": one, "bm25": results.with_facts({"t": FIGURES}, [TASK], model={"name": "bm25"}, version="9")}
    for value in (one, both):
        read = results.read(written(tmp_path / "r.json", value), "--show")
        assert read["moe_embed"] == one
        assert results.says(read) == f"w (step 3), from base, parameters 0123456789ab, {one['t']['date'][:10]}"
    mixed = one | {"u": one["t"] | {"model": {"name": "other"}, "date": "2026-01-02T03"}}
    assert results.says({"moe_embed": mixed}).endswith("; other, 2026-01-02")
    assert results.says({"moe_embed": {"t": FIGURES}}) == "a model that is not named (an older output)"


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"t": 1},
        {"t": {"ndcg": 1}},
        {"t": FIGURES | {"model": "w"}},
        {"a": {"t": FIGURES | {"task": [1]}}},
        {"t": FIGURES | {"interval": 3}},
        {"t": FIGURES | {"queries": [1, 2]}},
        {"t": {"ndcg@10": 0.5}},
        {"t": FIGURES | {"ndcg@10": "high"}},
        {"t": FIGURES | {"interval": [0.1]}},
        {"t": FIGURES | {"dims": {"half": FIGURES}}},
        {"t": FIGURES | {"dims": {"-8": FIGURES}}},
        {"t": FIGURES | {"dims": {"8": {}}}},
        {"t": FIGURES | {"dims": [8]}},
        {"t": FIGURES | {"precisions": {"int8": 0.5}}},
        {"t": FIGURES | {"precisions": {"int8": {"ndcg@10": "high"}}}},
    ],
)
def test_what_is_no_output_is_said(value, tmp_path):
    path = written(tmp_path / "r.json", value)
    with pytest.raises(UserError, match=r"--show=.*r\.json is no output of evaluate"):
        results.read(path, "--show")
    with pytest.raises(UserError, match=r"--output=.*r\.json exists and is no output of evaluate"):
        results.check_output(path, "--output")


def test_an_earlier_output_is_replaced_and_said_and_nothing_is_nothing(tmp_path):
    assert results.check_output(tmp_path / "r.json", "--output") == ""
    (tmp_path / "r.json").touch()
    assert results.check_output(tmp_path / "r.json", "--output") == ""
    said = results.check_output(written(tmp_path / "r.json", {"t": FIGURES}), "--output")
    assert said.endswith(
        "r.json holds an evaluation of a model that is not named (an older output); it will be replaced."
    )


def test_an_output_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--compare=.*none\.json does not exist"):
        results.read(tmp_path / "none.json", "--compare")

"""mteb's TaskResult layout: by hand, and loaded by mteb's own class."""

import dataclasses
import json

import pytest

from moe_embed import mteb_results
from moe_embed.config import UserError
from moe_embed.data.origin import Origin
from moe_embed.data.sources import Task


def some_tasks() -> list[Task]:
    origins = [
        Origin("MIRACLRetrieval", "de", "dev", ("deu-Latn",), "9c09", "2.26.24"),
        Origin("MIRACLRetrieval", "yo", "dev", ("yor-Latn",), "9c09", "2.26.24"),
        Origin("scifact"),
    ]
    return [Task(origin.name, {"d": "x"}, {"q": "x"}, {"q": {"d": 1}}, origin) for origin in origins]


def some_figures(tasks) -> dict:
    return {
        task.name: {"ndcg@10": 0.1 * i, "recall@10": 0.2 * i, "mrr@10": 0.3 * i, "seconds": float(i), "queries": {}}
        for i, task in enumerate(tasks, start=1)
    }


def test_a_file_a_task_with_its_parts(tmp_path):
    tasks = some_tasks()
    paths = mteb_results.write(tmp_path / "new", tasks, some_figures(tasks), digest="0a1b")
    assert [path.name for path in paths] == ["MIRACLRetrieval.json", "scifact.json"]
    miracl, scifact = (json.loads(path.read_text()) for path in paths)
    assert [part["hf_subset"] for part in miracl["scores"]["dev"]] == ["de", "yo"]
    assert miracl["scores"]["dev"][1] == {
        "hf_subset": "yo",
        "languages": ["yor-Latn"],
        "main_score": 0.2,
        "ndcg_at_10": 0.2,
        "recall_at_10": 0.4,
        "mrr_at_10": 0.6,
        "mteb_version": "2.26.24",
        "model": "0a1b",
    }
    assert (miracl["evaluation_time"], miracl["dataset_revision"]) == (3.0, "9c09")
    assert (scifact["mteb_version"], scifact["dataset_revision"]) == (None, "unknown")


def test_a_later_call_adds_its_parts_to_a_tasks_file(tmp_path):
    tasks = some_tasks()
    figures = some_figures(tasks)
    mteb_results.write(tmp_path / "together", tasks, figures, digest="0a1b")
    for task in tasks:
        mteb_results.check(tmp_path / "apart", [task], digest="0a1b")
        mteb_results.write(tmp_path / "apart", [task], figures, digest="0a1b")
    for name in ("MIRACLRetrieval.json", "scifact.json"):
        assert json.loads((tmp_path / "apart" / name).read_text()) == json.loads(
            (tmp_path / "together" / name).read_text()
        )
    figures[tasks[1].name] |= {"ndcg@10": 0.9}
    mteb_results.write(tmp_path / "apart", tasks[1:2], figures, digest="0a1b")
    again = json.loads((tmp_path / "apart" / "MIRACLRetrieval.json").read_text())
    assert [(part["hf_subset"], part["main_score"]) for part in again["scores"]["dev"]] == [("de", 0.1), ("yo", 0.9)]
    test = dataclasses.replace(tasks[0], origin=dataclasses.replace(tasks[0].origin, split="test"))
    mteb_results.write(tmp_path / "apart", [test], figures, digest="0a1b")
    again = json.loads((tmp_path / "apart" / "MIRACLRetrieval.json").read_text())
    assert {split: len(parts) for split, parts in again["scores"].items()} == {"test": 1, "dev": 2}


def test_other_data_and_damaged_files_are_refused_before_the_work(tmp_path):
    (task, *_) = tasks = some_tasks()
    mteb_results.write(tmp_path, tasks, some_figures(tasks), digest="0a1b")
    other = dataclasses.replace(task, origin=dataclasses.replace(task.origin, revision="beef"))
    with pytest.raises(
        UserError, match=r"MIRACLRetrieval\.json is of revision '9c09' of the data, and these are of 'beef'"
    ):
        mteb_results.check(tmp_path, [other], digest="0a1b")
    with pytest.raises(
        UserError, match=r"MIRACLRetrieval\.json has figures of another model \(0a1b; this one is beef\)"
    ):
        mteb_results.check(tmp_path, [task], digest="beef")
    for damaged in ("{", "[1]", '{"dataset_revision": "9c09", "scores": {}}'):
        (tmp_path / "MIRACLRetrieval.json").write_text(damaged)
        with pytest.raises(UserError, match="is no TaskResult of mteb"):
            mteb_results.check(tmp_path, [task], digest="0a1b")


@pytest.mark.parametrize("name", ["acme/Docs", "../../x", "", "a\0b"])
def test_a_tasks_name_that_names_no_file_is_refused_before_the_work(tmp_path, name):
    (task, *_) = some_tasks()
    wrong = dataclasses.replace(task, origin=dataclasses.replace(task.origin, task=name))
    with pytest.raises(UserError, match="cannot name a file of --mteb_results"):
        mteb_results.check(tmp_path / "deep" / "results", [task, wrong], digest="0a1b")
    assert not list(tmp_path.iterdir())
    mteb_results.check(tmp_path, [task], digest="0a1b")


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # other people's software
def test_mteb_loads_them(tmp_path):
    from mteb.results import TaskResult

    tasks = some_tasks()
    for path in mteb_results.write(tmp_path, tasks, some_figures(tasks), digest="0a1b"):
        for historic in (True, False):
            result = TaskResult.from_disk(path, load_historic_data=historic)
            assert result.task_name == path.stem
        assert result.eval_splits == [json.loads(path.read_text())["scores"].popitem()[0]]
    miracl = TaskResult.from_disk(tmp_path / "MIRACLRetrieval.json")
    assert miracl.main_score == pytest.approx(0.15)
    assert miracl.get_score(languages=["yor"]) == pytest.approx(0.2)
    assert sorted(miracl.hf_subsets) == ["de", "yo"]
    broken = json.loads((tmp_path / "MIRACLRetrieval.json").read_text())
    del broken["scores"]["dev"][0]["main_score"]
    (tmp_path / "MIRACLRetrieval.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="main_score"):
        TaskResult.from_disk(tmp_path / "MIRACLRetrieval.json")

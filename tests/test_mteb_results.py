"""mteb's TaskResult layout: by hand, and loaded by mteb's own class."""

import json

import pytest

from moe_embed import mteb_results
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
    paths = mteb_results.write(tmp_path / "new", tasks, some_figures(tasks))
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
    }
    assert (miracl["evaluation_time"], miracl["dataset_revision"]) == (3.0, "9c09")
    assert (scifact["mteb_version"], scifact["dataset_revision"]) == (None, "unknown")


@pytest.mark.mteb
@pytest.mark.filterwarnings("default")  # other people's software
def test_mteb_loads_them(tmp_path):
    from mteb.results import TaskResult

    tasks = some_tasks()
    for path in mteb_results.write(tmp_path, tasks, some_figures(tasks)):
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

"""The section on retrieval: figures by step, dimension, precision and task."""

import json

import pytest

from moe_embed import report_sections, retrieval_section
from moe_embed.config import UserError
from tests import written_runs
from tests.test_charts import attributes
from tests.test_page import read_link


@pytest.fixture
def runs(tmp_path):
    for seed, name in enumerate("ab"):
        written_runs.write(tmp_path / name, seed=seed)
    return report_sections.read_runs([tmp_path / "a", tmp_path / "b"])


def read(tmp_path, **options):
    written_runs.evaluation(tmp_path / "r.json", **options)
    return json.loads((tmp_path / "r.json").read_text())


def links(made):
    return [read_link(a["href"]) for a in attributes(made, "a")]


def test_dev_figures_of_two_runs(runs):
    (table,) = links(retrieval_section.quality(runs, []))
    assert table[0] == ["step", "a: mean", "a: a", "a: b", "b: mean", "b: a", "b: b"]
    assert table[2][:3] == ["10", "0.1", "0.111111"]
    assert "give evaluate's output" in retrieval_section.quality(runs, []).replace("&#x27;", "'")


def test_sizes_are_means_over_tasks(runs, tmp_path):
    result = read(tmp_path)
    (table,) = links(retrieval_section.by_size(runs[:1], [result]))
    assert table == [["numbers of a vector", "a: float32", "a: int8", "a: binary"],
                     ["4", "0.3", "", ""], ["8", "0.4", "", ""], ["16", "0.375", "0.49", "0.35"]]  # fmt: skip
    result["a"]["dims"]["8"]["ndcg@10"] += 0.1
    assert links(retrieval_section.by_size(runs[:1], [result]))[0][2] == ["8", "0.45", "", ""]


def test_only_the_sizes_of_all_tasks_are_drawn(runs, tmp_path):
    result = read(tmp_path)
    del result["xling-b & c"]["dims"]["4"], result["xling-b & c"]["precisions"]
    (table,) = links(retrieval_section.by_size(runs[:1], [result]))
    assert table == [["numbers of a vector", "a: float32"], ["8", "0.4"], ["16", "0.375"]]
    del result["xling-b & c"]["dims"]
    made = retrieval_section.quality(runs[:1], [result])
    assert "a was evaluated with no --dims or --precisions that all its tasks have." in made
    assert "nDCG@10 by dimension" not in made


def test_tasks_of_two_runs(runs, tmp_path):
    (table,) = links(retrieval_section.by_task(runs, [read(tmp_path), read(tmp_path)]))
    assert table[0][:3] == ["", "a", "b"]
    assert table[2][:3] == ["xling-b & c", "0.25", "0.25"]


def test_what_does_not_go_together(runs, tmp_path):
    one, two = read(tmp_path), read(tmp_path)
    del two["a"]
    with pytest.raises(UserError, match="a is a task of only one of a and b"):
        retrieval_section.quality(runs, [one, two])
    for of_task in one.values():
        of_task["dims"]["32"] = of_task["dims"]["8"]
    with pytest.raises(UserError, match="vectors of 32 numbers, its model 16: it is another model's"):
        retrieval_section.quality(runs[:1], [one])


def test_what_is_not_there_is_said(tmp_path):
    written_runs.write(tmp_path / "m", objective="mlm", steps=3)
    (run,) = report_sections.read_runs([tmp_path / "m"])
    made = retrieval_section.quality([run], [read(tmp_path, dims=False)])
    assert "m has no evaluations: a masked-language-model run searches for nothing." in made
    assert "m was evaluated without --dims and --precisions." in made
    assert [table[0][1] for table in links(made)] == ["m"]  # the bars of the tasks alone

"""The section on retrieval: figures by step, dimension, precision and task."""

import html
import json
import re

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


def text(made):
    return html.unescape(re.sub("<[^>]+>", "", made))


HELD_OUT = {"before": {"q": 0.5, "r": 0.25}, "after": {"q": 1.0, "r": 0.5}, "steps": 45, "verdict": "it is better."}
SAID = "Held-out pairs: nDCG@10 37.5 before training, 75.0 after 45 steps; it is better."


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (HELD_OUT, SAID),
        (HELD_OUT | {"after": {"x": 1.0}, "verdict": "no verdict: the data has changed."}, "Held-out pairs: no verdict: the data has changed."),
        ({"before": {"q": 0.5}}, ""),
        ({}, "held_out.json does not say"),
        ({"before": {"q": 0.5}, "after": {"q": 1.0}}, "held_out.json does not say"),
        (HELD_OUT | {"after": {"q": "high"}}, "held_out.json does not say"),
        (HELD_OUT | {"after": {"q": float("nan")}}, "held_out.json does not say"),
        (HELD_OUT | {"before": {}}, "held_out.json does not say"),
        (HELD_OUT | {"before": [1.0]}, "held_out.json does not say"),
        ([], "held_out.json does not say"),
        (None, "held_out.json does not say"),
    ],
)  # fmt: skip
def test_what_held_out_pairs_say(runs, held_out, said):
    path = runs[0].workdir / "held_out.json"
    assert retrieval_section.held_out_says(runs[0]) == ""
    path.write_text(json.dumps(held_out) if held_out is not None else '{"before": {"q": 0')
    found = retrieval_section.held_out_says(runs[0])
    assert said in found if said else found == ""
    assert found in text(retrieval_section.quality(runs[:1], []))
    if said:
        assert f"a: {found}" in text(retrieval_section.quality(runs, []))


def test_a_run_that_was_not_evaluated_beside_one_that_was(runs, tmp_path):
    made = retrieval_section.quality(runs, [None, read(tmp_path)])
    assert "test tasks of a: give" in text(made)
    bars = made[made.index('aria-label="nDCG@10 by task"') :]
    assert "--c1" in bars  # b's colour everywhere
    assert "--c0" not in bars


def test_found_outputs_of_different_tasks_are_a_sentence(runs, tmp_path):
    one, two = read(tmp_path), read(tmp_path)
    del two["a"]
    made = text(retrieval_section.quality(runs, [one, two], found=True))
    assert "No test tasks are drawn. --evaluation: a is a task of only one of a and b" in made


def test_the_page_says_what_was_evaluated(runs, tmp_path):
    result = read(tmp_path)
    for of_task in result.values():
        of_task |= {"model": {"loaded": "runs/a (step 600)", "digest": "5f0c" * 8}, "date": "2026-11-24T03:10:00"}
    made = text(retrieval_section.quality(runs[:1], [result]))
    assert "Test tasks of a: measured with runs/a (step 600), parameters 5f0c5f0c5f0c, 2026-11-24." in made


def test_dev_figures_of_two_runs(runs):
    (table,) = links(retrieval_section.quality(runs, []))
    assert table[0] == ["step", "a: mean", "a: a", "a: b", "b: mean", "b: a", "b: b"]
    assert table[2][:3] == ["10", "0.1", "0.111111"]
    made = retrieval_section.quality(runs, []).replace("&#x27;", "'")
    assert "test tasks: give evaluate's output" in made
    assert "or put it into the workdir as evaluation.json" in made


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
    assert "a was evaluated with no --dims or --precisions that all its tasks have." in text(made)
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
    assert "m was evaluated without --dims and --precisions." in text(made)
    assert [table[0][1] for table in links(made)] == ["m"]  # the bars of the tasks alone

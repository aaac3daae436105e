"""What a run wrote down, as sections: goodput and marks by hand, and sentences where there is nothing to draw."""

import json
import pathlib
import re

import numpy as np
import pytest

from moe_embed import charts, report_sections
from moe_embed.config import UserError
from tests import written_runs
from tests.test_charts import attributes
from tests.test_page import read_link


def run_of(tmp_path, **options):
    written_runs.write(tmp_path / "run", **options)
    (run,) = report_sections.read_runs([tmp_path / "run"])
    return run


def test_goodput_by_hand(tmp_path):
    run = run_of(tmp_path)
    assert report_sections.goodput(run) == ([20, 40], [0.5, 0.5])  # half a second a step, one step a second
    run.events.insert(1, {"step": 20, "event": "save", "time": 1010.0})  # of an earlier try: the later one counts
    assert report_sections.goodput(run)[1] == [0.5, 0.5]
    run.events.append({"step": 50, "event": "save", "time": 1250.0})  # it lay still
    assert report_sections.goodput(run) == ([20, 40, 50], [0.5, 0.5, 0.1])
    run.events.clear()
    assert report_sections.goodput(run) == ([], [])
    assert "has no goodput over steps" in report_sections.training([run])


def test_marks_by_hand(tmp_path):
    marks = report_sections.marks_of(run_of(tmp_path))
    assert marks == {"save": [20, 40], "resume": [20], "skipped": [7], "evaluation": [0, 10, 20, 30, 40, 50]}


def test_loads_by_hand():
    rows = [
        {"step": s, **{f"router_load/{r}/{e}": 10.0 * r + e + s for r in (0, 1) for e in (0, 1, 2)}} for s in (0, 100)
    ]
    load_TRE = report_sections.loads(rows)
    np.testing.assert_array_equal(load_TRE[0], [[0, 1, 2], [10, 11, 12]])
    np.testing.assert_array_equal(load_TRE[1] - load_TRE[0], np.full((2, 3), 100))
    assert report_sections.loads([{"step": 0}]).size == report_sections.loads([]).size == 0


def test_experts_over_time_are_the_mean_of_each_stretch(tmp_path):
    run = run_of(tmp_path)
    section = report_sections.routers([run])
    maps = [a["href"] for a in attributes(section, "a")][2:]
    assert len(maps) == 2
    head, *experts = read_link(maps[0])
    assert (head[1], len(head), len(experts)) == ("0", 50, 4)  # 49 steps: the skipped one is left out
    assert sum(float(row[1]) for row in experts) == pytest.approx(4, rel=1e-4)
    assert float(experts[2][1]) == pytest.approx(run.rows[0]["router_load/0/2"], rel=1e-4)
    run.rows[0]["router_load/0/2"] += 1
    assert report_sections.routers([run]) != section


@pytest.mark.parametrize(
    ("steps", "labels"),
    [(1, ["0", "1"]), (45, ["0", "10", "20", "30", "40", "45"]), (50, ["0", "10", "20", "30", "40", "50"])],
)
def test_experts_over_time_have_round_steps_and_the_curves_marks(tmp_path, steps, labels):
    run = run_of(tmp_path, steps=steps)
    made = [figure for figure in report_sections.routers([run]).split("<figure") if "mixture layer 1" in figure]
    assert re.findall(r'text-anchor="middle">([^<]+)</text>', made[0]) == labels
    assert [charts.SHAPES[name] in made[0] for name in ("save", "resume", "skipped")] == [
        steps > 20,
        steps > 20,
        steps > 7,
    ]


def test_a_share_of_zero_has_the_scale_of_a_share(tmp_path):
    (dead,) = [f for f in report_sections.routers([run_of(tmp_path)]).split("<figure") if "dead experts" in f]
    assert re.findall(r'text-anchor="end">([^<]+)</text>', dead)[:-1] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_large_runs_stay_small(tmp_path):
    run = run_of(tmp_path)
    run.rows[:] = [{**run.rows[8], "step": i, "loss": float(np.sin(i)), **{f"router_load/{r}/{e}": 1 + np.sin(i + r + e) for r in range(6) for e in range(32)}} for i in range(5_000)]  # fmt: skip
    made = report_sections.training([run]) + report_sections.routers([run])
    assert len(made) < 1_000_000
    assert "nan" not in made.lower().replace("nance", "")


def test_what_is_not_there_is_said(tmp_path):
    run = run_of(tmp_path, experts=0, objective="mlm")
    assert "run is dense: it has no experts." in report_sections.routers([run])
    assert "run writes no accuracy." in report_sections.training([run])
    run.rows.clear()
    assert "run has no metrics yet." in report_sections.training([run])
    assert "run" in report_sections.glance([run])
    assert "No plan" in report_sections.memory(None)


def test_the_plans_bars(tmp_path):
    written_runs.plan(tmp_path / "plan.json")
    made = report_sections.memory(report_sections.read_plan(tmp_path / "plan.json"))
    (link,) = [a["href"] for a in attributes(made, "a")]
    assert read_link(link)[1:] == [["parameters", "2e+09"], ["activations", "6e+09"], ["limit", "1.6e+10"]]
    (tmp_path / "other.json").write_text(json.dumps({"hbm": {}}))
    with pytest.raises(UserError, match="is no output of plan"):
        report_sections.read_plan(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"is no output of plan.*nested too deep"):
        report_sections.read_plan(tmp_path / "other.json")


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is no workdir: it has no workdir\.json"):
        report_sections.read_runs([tmp_path])


@pytest.mark.parametrize(
    ("file", "row", "sentence"),
    [
        ("metrics", {"step": 12}, r"metrics\.jsonl: the row of step 12 has no loss; mend or remove the file"),
        ("metrics", {"step": 3, "loss": "high"}, r"the row of step 3 has 'high' as its loss"),
        ("metrics", {"step": 3, "loss": 1.0, "tokens_per_second": None}, r"has None as its tokens_per_second"),
        ("evaluations", {"step": 5, "ndcg/a": 0.1}, r"evaluations\.jsonl: the row of step 5 has no ndcg"),
        ("events", {"step": 5, "time": 1.0}, r"events\.jsonl: the row of step 5 has no event"),
        ("events", {"step": 5, "event": "save"}, r"has no time"),
        ("events", {"step": 5, "event": 7, "time": 1.0}, r"has 7 as its event"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, file, row, sentence):
    (tmp_path / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=sentence):
        report_sections.read_rows(tmp_path, file)


def test_a_row_that_lacks_an_expert_is_named(tmp_path):
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0, "router_load/0/0": 1.0, "router_load/0/1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="the row of step 0 has no router_load/0/0"):
        report_sections.read_rows(tmp_path, "metrics")


def test_a_run_by_a_dot_has_its_folders_name(tmp_path, monkeypatch):
    written_runs.write(tmp_path / "mine", steps=2)
    monkeypatch.chdir(tmp_path / "mine")
    (run,) = report_sections.read_runs([pathlib.Path()])
    assert run.name == "mine"


def test_runs_of_one_name_go_by_their_paths(tmp_path):
    for name in ("a/x", "b/x"):
        written_runs.write(tmp_path / name, steps=3)
    runs = report_sections.read_runs([tmp_path / "a/x", tmp_path / "b/x"])
    assert [run.name for run in runs] == [str(tmp_path / "a/x"), str(tmp_path / "b/x")]

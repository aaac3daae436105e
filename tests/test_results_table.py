"""The table by hand; two outputs compared query by query; the parts of a task as one."""

import json
import pathlib

import numpy as np
import pytest

from moe_embed import evaluate, results_table, retrieval, significance
from moe_embed.config import UserError

TASKS = pathlib.Path(evaluate.__file__).parent / "sample" / "tasks"


def figures(ndcg: float, recall: float) -> dict:
    return {"ndcg@10": ndcg, "recall@10": recall, "mrr@10": 0.0}


def test_the_table_by_hand():
    names = {"libreoffice-help-de": 0.5, "xling-libreoffice-help-de-en": 0.25, "xling-libreoffice-help-ja-en": 1.0}
    systems = {"moe_embed": 1.0, "bm25": 0.5}
    results = {s: {name: figures(x * scale, x) for name, x in names.items()} for s, scale in systems.items()}
    for name in names:
        results["moe_embed"][name]["dims"] = {"64": figures(names[name] / 5, 0.0)}
    lines = results_table.table(results).splitlines()
    assert max(map(len, lines)) <= 100
    cells = {line.split()[0] if "mean" not in line else " ".join(line.split()[:2]): line.split() for line in lines}
    assert lines[0].split() == ["moe_embed", "bm25"]
    assert lines[1].split() == ["task", *["nDCG@10", "recall@10"] * 2]
    assert cells["xling-libreoffice-help-de-en"][1:] == ["25.0", "25.0", "12.5", "25.0"]
    assert cells["mean monolingual"][2:] == ["50.0", "50.0", "25.0", "50.0"]
    assert cells["mean cross-lingual"][2:] == ["62.5", "62.5", "31.2", "62.5"]
    assert cells["64"] == ["64", "11.7"]


def test_the_table_has_each_tasks_interval_where_it_fits():
    sure = lambda low, high: figures(0.5, 0.25) | {"interval": [low, high]}  # noqa: E731
    results = {"moe_embed": {"a": sure(0.45, 0.556), "xling-b": sure(0.0, 1.0)}, "bm25": dict.fromkeys(("a", "xling-b"), sure(0.1, 0.9))}  # fmt: skip
    lines = results_table.table(results).splitlines()
    assert lines[1].split() == ["task", *["nDCG@10", "95", "%", "interval", "recall@10"] * 2]
    assert lines[2].split() == ["a", "50.0", "45.0", "to", "55.6", "25.0", "50.0", "10.0", "to", "90.0", "25.0"]
    assert lines[3].split()[2:5] == ["0.0", "to", "100.0"]
    assert lines[5].split() == [
        "mean",
        "monolingual",
        "50.0",
        "25.0",
        "50.0",
        "25.0",
    ]  # a figure of a task, not of a mean
    assert len({len(line) for line in lines[:4]}) == 1
    long = {system: {"x" * 60 if name == "a" else name: of for name, of in tasks.items()} for system, tasks in results.items()}  # fmt: skip
    lines = results_table.table(long).splitlines()
    assert lines[1].split() == ["task", "nDCG@10", "95", "%", "interval", "recall@10", "nDCG@10", "recall@10"]
    del results["moe_embed"]["a"]["interval"]  # of an older output
    assert "to" not in results_table.table({"moe_embed": results["moe_embed"]}).split()


def test_the_table_of_all_shipped_tasks_fits():
    names = [folder.name for folder in TASKS.iterdir() if folder.is_dir()]
    assert len(names) > 5
    full = figures(1.0, 1.0) | {"interval": [1.0, 1.0]}
    text = results_table.table({system: dict.fromkeys(names, full) for system in ("moe_embed", "bm25")})
    assert text.count("95 % interval") == 2
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"\n{name} " in text for name in names)


def compare(tmp_path, first: dict, second: dict, capsys) -> str:
    for name, tasks in (("r.json", first), ("base.json", second)):
        written = {
            t: {"ndcg@10": float(np.mean(list(q.values()))), "recall@10": 0.0, "queries": q} for t, q in tasks.items()
        }
        (tmp_path / name).write_text(json.dumps(written))
    evaluate.main([f"--compare={tmp_path / 'r.json'},{tmp_path / 'base.json'}"])
    return capsys.readouterr().out


def test_two_outputs_are_compared_query_by_query(tmp_path, capsys):
    rng = np.random.default_rng(0)
    base = {t: {str(i): x for i, x in enumerate(rng.random(100))} for t in ("a", "b")}
    higher = {t: {q: x + 0.03 + rng.normal(0, 0.05) for q, x in of.items()} for t, of in base.items()}
    better, worse = compare(tmp_path, higher, base, capsys), compare(tmp_path, base, higher, capsys)
    assert "is better than" in better
    assert "is worse than" in worse
    assert "p = 0.0001, 200 queries" in better
    gain = 100 * np.mean([np.mean(list(of.values())) for of in higher.values()]) - 100 * np.mean(
        [np.mean(list(of.values())) for of in base.values()]
    )
    assert f"by {gain:.1f} points of nDCG@10" in better
    noise = {t: {q: x + rng.normal(0, 0.05) for q, x in of.items()} for t, of in base.items()}
    assert "no difference is shown" in compare(tmp_path, noise, base, capsys)
    # the same means, but of other queries: pairing is what makes three points visible
    shuffled = {t: dict(zip(of, rng.permutation(list(of.values())), strict=True)) for t, of in higher.items()}
    assert "no difference is shown" in compare(tmp_path, shuffled, base, capsys)


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    one, other = {"a": {"1": 0.5, "2": 0.6}}, {"b": {"1": 0.5, "2": 0.6}}
    with pytest.raises(UserError, match="no task in common"):
        compare(tmp_path, one, other, capsys)
    with pytest.raises(UserError, match="other queries for a"):
        compare(tmp_path, one, {"a": {"1": 0.5}}, capsys)
    with pytest.raises(UserError, match="two outputs"):
        evaluate.main(["--compare=r.json"])
    (tmp_path / "old.json").write_text(json.dumps({"a": {"ndcg@10": 0.5, "recall@10": 0.5}}))
    with pytest.raises(UserError, match="no figures of single queries"):
        evaluate.main([f"--compare={tmp_path / 'old.json'},{tmp_path / 'old.json'}"])


def test_what_a_system_lacks_is_a_dash():
    whole = {"a": figures(0.5, 0.5), "b": figures(0.25, 0.75)}
    for key, some in (("dims", {"64": figures(0.1, 0.1)}), ("precisions", {"int8": figures(0.2, 0.2)})):
        whole["a"] = whole["a"] | {key: some}
    text = results_table.table({"moe_embed": whole, "bm25": {"a": figures(0.1, 0.2)}})
    cells = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert cells["a"] == ["50.0", "50.0", "10.0", "20.0"]
    assert cells["b"] == ["25.0", "75.0", "-", "-"]
    assert cells["mean monolingual"] == ["37.5", "62.5", "-", "-"]  # a mean of a alone would be another mean
    assert "shorter" not in text  # only one task has them
    assert "smaller" not in text


def test_smaller_vectors_have_the_same_mean_as_whole_ones():
    names, ndcg = ("cqadupstack/android", "cqadupstack/english", "scifact"), (0.1, 0.3, 0.8)
    own = {name: figures(x, 0.0) | {"dims": {"64": figures(x, 0.0)}} for name, x in zip(names, ndcg, strict=True)}
    lines = results_table.table({"moe_embed": own}).splitlines()
    assert lines[-1].split() == ["64", "50.0"]  # not 40.0


def test_the_parts_of_a_task_count_once_in_a_comparison(tmp_path, capsys):
    """One model wins in eleven forums of one task, the other in two tasks of three: the second is better."""
    rng = np.random.default_rng(0)
    forums = [f"cqadupstack/{i}" for i in range(11)]
    base = {name: {str(i): x for i, x in enumerate(rng.uniform(0.3, 0.6, 50))} for name in [*forums, "nq", "quora"]}
    moved = lambda name: 0.1 if name in forums else -0.1  # noqa: E731
    noisy = {name: {q: x + moved(name) + rng.normal(0, 0.02) for q, x in of.items()} for name, of in base.items()}
    text = compare(tmp_path, noisy, base, capsys)
    assert "is worse than" in text
    tasks = list(base)
    differences = [np.array([noisy[task][q] - base[task][q] for q in base[task]]) for task in tasks]
    wholes = [np.mean([d.mean() for d in differences[:11]]), differences[11].mean(), differences[12].mean()]
    (mean,) = [line for line in text.splitlines() if line.startswith("mean")]
    assert float(mean.split()[3]) == pytest.approx(100 * np.mean(wholes), abs=0.051)
    low, high = 100 * np.array(significance.interval(differences, weights=retrieval.shares(tasks)))
    assert mean.split()[4:] == [f"{low:+.1f}", "to", f"{high:+.1f}"]
    assert "is better than" in significance.verdict(differences, names=("r", "base"))  # each forum as a task: the other


def test_miracl_has_both_of_its_means():
    values = {
        f"miracl/{lang}": figures(ndcg, 0.0) for lang, ndcg in (("ar", 0.6), ("sw", 0.4), ("de", 0.2), ("yo", 0.0))
    }
    text = results_table.table({"moe_embed": values})
    cells = {line[:20].strip(): line[20:].split()[0] for line in text.splitlines() if line[20:].split()}
    assert (cells["mean of miracl"], cells["without de and yo"]) == ("30.0", "50.0")
    assert "without" not in results_table.table({"moe_embed": dict(list(values.items())[:2])})
    named = {name.replace("miracl", "MIRACLRetrieval"): value for name, value in values.items()}
    (line,) = [
        line for line in results_table.table({"moe_embed": named}).splitlines() if line.startswith("without de and yo")
    ]
    assert line.split()[4] == "50.0"


def test_no_label_moves_its_row():
    of = figures(0.5, 0.5)
    lines = results_table.table({"moe_embed": {"MIRACLRetrieval/ar": of, "a": of}}).splitlines()
    assert any(line.startswith("mean of MIRACLRetrieval  ") for line in lines)
    rows = [line for line in lines if line.endswith("50.0")]
    assert len({len(line) for line in rows}) == 1 < len(rows)

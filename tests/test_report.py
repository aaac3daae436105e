"""A run at a glance: sparklines and the picture of the experts, by hand and for a real tiny model."""

import json
import math
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import report, sharding
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model
from moe_embed.model import encoder as encoder_lib
from moe_embed.report_sections import Run
from tests import written_runs
from tests.test_page import Read, read_link

SAMPLE = pathlib.Path(report.__file__).parent / "sample"


def test_sparkline_by_hand():
    assert report.sparkline(np.arange(8.0)) == "▁▂▃▄▅▆▇█"
    assert report.sparkline(np.arange(8.0)[::-1]) == "█▇▆▅▄▃▂▁"
    assert report.sparkline(np.array([3.0, 3.0])) == "▁▁"
    assert report.sparkline(np.array([5.0])) == "▁"
    halves = report.sparkline(np.repeat([0.0, 1.0], 300))
    assert halves == "▁" * 30 + "█" * 30
    assert len(report.sparkline(np.arange(61.0))) == report.WIDTH == 60


def run_of(workdir: pathlib.Path, *, rows=(), evaluations=()) -> Run:
    return Run(workdir.name, workdir, 0, None, list(rows), list(evaluations), [])


def test_training(tmp_path):
    assert report.training(run_of(tmp_path)) == f"{tmp_path} has no metrics yet."
    rows = [{"step": i, "loss": 4.0 - i, "accuracy": i / 4, "tokens_per_second": 1000.0} for i in range(4)]
    lines = report.training(run_of(tmp_path, rows=rows)).splitlines()
    assert lines[0] == "4 steps"
    assert [line.split()[0] for line in lines[1:]] == ["loss", "accuracy", "tokens_per_second"]
    assert lines[1].endswith("█▅▃▁ 4.000 -> 1.000")
    evaluations = [{"step": 2, "ndcg": 0.25}, {"step": 4, "ndcg": 0.5}]
    said = report.training(run_of(tmp_path, rows=rows, evaluations=evaluations))
    assert said.splitlines()[4].endswith("▁█ 0.250 -> 0.500")
    rows = [{"step": i, "loss": math.nan} for i in range(3)]
    assert report.training(run_of(tmp_path, rows=rows)) == "3 steps, and none of them finite."


def test_experts_by_hand():
    chosen = {"de": np.array([[3.0, 1.0]]), "ja": np.array([[2.0, 6.0]])}  # shares 3/4, 1/4 and 1/4, 3/4
    model = types.SimpleNamespace(
        prompt=lambda name: None, encode_with_sums=lambda texts, task: (None, chosen[texts[0]])
    )
    lines = report.experts(model, {"de": ["de"], "ja": ["ja"]}).splitlines()
    assert lines[1].startswith("mixture layer 1:")
    assert "normalised mutual information 0.19" in lines[1]  # 3/4 log2(3/2) + 1/4 log2(1/2) = 0.189, over one bit
    assert lines[2].split() == ["de", "ja", "mean", "of", "languages"]
    assert lines[3].split() == ["e0", "▓", "50.0%"]  # log2(3/2) = 0.58; log2(1/2) = -1 stays blank
    assert lines[4].split() == ["e1", "▓", "50.0%"]
    assert lines[3].index("▓") < lines[4].index("▓")
    chosen["ja"] = chosen["de"]
    assert "information 0.00" in report.experts(model, {"de": ["de"], "ja": ["ja"]})


def test_experts_of_a_tiny_model():
    tokenizer, moe = tokenizer_lib.read(SAMPLE / "tokenizer.model"), config_lib.Moe(num_experts=4, top_k=2)
    encoder = config_lib.Encoder(vocab_size=16_064, num_layers=4, dim=8, num_heads=2, ffn_dim=16, max_seq_length=32)
    shapes = jax.eval_shape(lambda: encoder_lib.init(encoder, moe, key=jax.random.key(0)))  # slow to compile
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    model = Model(encoder, moe, params, tokenizer, {"document": "search_document: "}, mesh, "a test")
    texts = {"de": ["Seitenränder ändern", "Tabelle einfügen"], "ja": ["表を挿入する", "余白"], "ru": ["поля страницы"]}
    picture = report.experts(model, texts)
    lines = picture.splitlines()
    assert [line[:15] for line in lines if "mixture" in line] == ["mixture layer 1", "mixture layer 2"]
    assert max(map(len, lines)) <= 100
    shares = [float(line.split()[-1].rstrip("%")) for line in lines if line.startswith("  e")]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(200, abs=0.5)
    other = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
    assert report.experts(Model(encoder, moe, other, tokenizer, model.prompts, mesh, "a test"), texts) != picture


def test_a_folder_that_is_no_workdir(tmp_path):
    with pytest.raises(UserError, match=r"is no workdir: it has no workdir\.json"):
        report.main([f"--workdir={tmp_path}"])


def test_several_runs_become_a_table_by_group(tmp_path):
    dev = lambda ndcg: [{"step": 0, "ndcg": 0.1}, {"step": 9, "ndcg": ndcg}]  # noqa: E731
    figures = {"a-seed0": dev(0.5), "a-seed1": dev(0.52), "b-seed0": dev(0.4), "c": [], "a-seed2": []}
    runs = [run_of(tmp_path / name, evaluations=of_run) for name, of_run in figures.items()]
    lines = report.comparison(runs[:3]).splitlines()
    assert lines[1].split() == ["a", "51.0", "1.41", "50.0,", "52.0"]
    assert lines[2].split() == ["b", "40.0", "-", "40.0"]
    lines = report.comparison(runs).splitlines()
    assert lines[1].split() == ["a", "51.0", "1.41", "50.0,", "52.0,", "-"]
    assert lines[3].split() == ["c", "-", "-", "-"]  # without dev figures


def test_runs_of_two_folders_are_no_seeds_of_each_other(tmp_path, monkeypatch):
    dev = [{"step": 0, "ndcg": 0.5}]
    monkeypatch.chdir(tmp_path)
    names = ("runs/x/demo-seed0", "runs/x/demo-seed1", "runs/y/demo-seed0")
    lines = report.comparison([run_of(pathlib.Path(name), evaluations=dev) for name in names]).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["runs/x/demo", "runs/y/demo"]
    assert lines[1].split()[-2:] == ["50.0,", "50.0"]


def test_a_run_before_its_first_checkpoint_is_drawn_and_what_is_missing_said(tmp_path, capsys):
    written_runs.write(tmp_path / "run", steps=3)
    report.main([f"--workdir={tmp_path / 'run'}"])
    assert "mixture layer 1: expert x language" in capsys.readouterr().out
    (tmp_path / "run/one.jsonl").unlink()
    report.main([f"--workdir={tmp_path / 'run'}"])
    assert "The data of run cannot be read" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run/checkpoints")
    report.main([f"--workdir={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    assert said.startswith("3 steps\nloss ")
    assert "The model of run cannot be opened" in said


SECTIONS = ("glance", "training", "routers", "maps", "vectors", "quality", "translations", "memory")


def page_of(tmp_path, runs, *more):
    """The page of two written runs, one with experts and one without, and its parser."""
    for seed, (name, experts) in enumerate(runs.items()):
        written_runs.write(tmp_path / name, seed=seed, experts=experts)
    report.main(
        [f"--workdir={','.join(str(tmp_path / name) for name in runs)}", f"--output={tmp_path / 'r.html'}", *more]
    )
    text = (tmp_path / "r.html").read_text("utf-8")
    return text, Read(text)


def check(text: str, read: Read) -> None:
    """Nothing from elsewhere, and no number that is none."""
    assert "http" not in text
    assert not [
        a for _, a, _ in read.elements if "src" in a or ("href" in a and not a["href"].startswith(("#", "data:")))
    ]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", text)
    for tag, attributes, _ in read.elements:
        if tag in ("path", "polyline", "rect", "circle", "line", "text", "svg"):
            assert not re.search(
                r"nan|inf", " ".join(v for k, v in attributes.items() if k not in ("class", "aria-label"))
            ), attributes
        if "download" in attributes:
            table = read_link(attributes["href"])
            assert len(table) > 1
            assert all(np.isfinite(float(x)) for row in table[1:] for x in row[1:] if x)


def test_the_page_has_every_section_drawn(tmp_path, capsys):
    written_runs.evaluation(tmp_path / "r.json")
    written_runs.plan(tmp_path / "plan.json")
    files = [f"--evaluation={tmp_path / 'r.json'},{tmp_path / 'r.json'}", f"--plan={tmp_path / 'plan.json'}"]
    text, read = page_of(tmp_path, {"one": 4, "two & <b>": 4}, *files)
    check(text, read)
    assert re.match(r"wrote .*r\.html, 0\.\d\d MB", capsys.readouterr().out)
    drawn = {name: sum(tag == "svg" and inside == [name] for tag, _, inside in read.elements) for name in SECTIONS}
    assert drawn == {
        "glance": 0,
        "training": 6,
        "routers": 6,
        "maps": 8,
        "vectors": 2,
        "quality": 3,
        "translations": 2,
        "memory": 1,
    }
    assert "missing" not in [attributes["class"] for _, attributes, _ in read.elements if "class" in attributes]
    assert "two & <b>" in read.text["glance"]


def test_the_page_says_what_is_not_there(tmp_path):
    text, read = page_of(tmp_path, {"plain": 0})
    check(text, read)
    drawn = {name: sum(tag == "svg" and inside == [name] for tag, _, inside in read.elements) for name in SECTIONS}
    assert drawn == {
        "glance": 0,
        "training": 6,
        "routers": 0,
        "maps": 0,
        "vectors": 2,
        "quality": 1,
        "translations": 1,
        "memory": 0,
    }
    said = {
        inside[0]
        for _, attributes, inside in read.elements
        if "class" in attributes and attributes["class"] == "missing"
    }
    assert said == {"routers", "maps", "quality", "memory"}
    written_runs.plan(tmp_path / "plain/plan.json")
    report.main([f"--workdir={tmp_path / 'plain'}", f"--output={tmp_path / 'r.html'}"])
    assert "fits: 7.5 of 14.9 GiB" in (tmp_path / "r.html").read_text("utf-8")


def test_an_evaluation_in_the_workdir_is_found(tmp_path):
    written_runs.write(tmp_path / "one", steps=3)
    flags = [f"--workdir={tmp_path / 'one'}", f"--output={tmp_path / 'r.html'}"]
    report.main(flags)
    assert "nDCG@10 by task" not in (tmp_path / "r.html").read_text("utf-8")
    written_runs.evaluation(tmp_path / "one/evaluation.json")
    report.main(flags)
    assert "nDCG@10 by task" in (tmp_path / "r.html").read_text("utf-8")
    written_runs.evaluation(tmp_path / "other.json", dims=False)
    report.main([*flags, f"--evaluation={tmp_path / 'other.json'}"])
    assert "nDCG@10 by dimension" not in (tmp_path / "r.html").read_text("utf-8")  # the named one wins


def test_the_terminal_says_what_held_out_pairs_say(tmp_path, capsys):
    written_runs.write(tmp_path / "one", steps=3)
    found = {"before": {"q": 0.5}, "after": {"q": 0.75}, "steps": 3, "verdict": "it is better."}
    (tmp_path / "one/held_out.json").write_text(json.dumps(found))
    report.main([f"--workdir={tmp_path / 'one'}"])
    said = "Held-out pairs: nDCG@10 50.0 before training, 75.0 after 3 steps; it is better."
    assert said in capsys.readouterr().out.splitlines()
    written_runs.write(tmp_path / "two", steps=3)
    report.main([f"--workdir={tmp_path / 'one'},{tmp_path / 'two'}"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"one: {said}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workdir="], r"--workdir= names no run"),
        (["--workdir=,"], r"--workdir=, names no run"),
        (["--workdir=", "--output=r.html"], r"--workdir= names no run"),
        (["--evaluation=r.json"], r"drawn in the page: name it with --output"),
        (["--output=gone/r.html"], r"--output=gone/r\.html cannot be written"),
        (["--output=r.html", "--evaluation=a,b"], r"names 2 files and --workdir 1 runs; give one a run"),
        (["--output=r.html", "--evaluation=a"], r"--evaluation=a does not exist"),
        (["--output=r.html", "--plan=a"], r"a is no output of plan"),
    ],
)
def test_bad_flags_are_a_sentence(tmp_path, monkeypatch, flags, sentence):
    written_runs.write(tmp_path / "run", steps=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        report.main(["--workdir=run", *flags])
    assert not (tmp_path / "r.html").exists()

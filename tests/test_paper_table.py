"""The table by hand, published rows with their sources, and the script that fills it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import moe_embed
from moe_embed import paper_table
from moe_embed.config import UserError

ROOT = pathlib.Path(moe_embed.__file__).parent.parent
MIRACL = ["ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "yo", "zh"]


def figures(names, value=0.5) -> dict:
    return {name: {"ndcg@10": value} for name in names}


def fill(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


def test_ours_stand_above_the_published_by_hand(tmp_path):
    beir = figures([f"set{i}" for i in range(14)], 0.4) | figures([f"forums/{i}" for i in range(12)], 0.7)
    miracl = figures([f"M/{lang}" for lang in MIRACL], 0.6) | figures(["M/de", "M/yo"], 0.15)
    eng = {"benchmark": "MTEB(eng, v2)", "mean": 0.7, "mean_of_types": 0.65, "types": {"Retrieval": 0.5, "STS": 0.8}}
    folder = fill(tmp_path / "mine", beir=beir, miracl=miracl, mteb=eng)
    row = paper_table.ours(folder)
    assert row.figures == {
        "beir": pytest.approx(42.0), "miracl16": pytest.approx(60.0), "miracl18": pytest.approx(55.0),
        "eng": pytest.approx(70.0), "eng_types": pytest.approx(65.0), "eng_retrieval": pytest.approx(50.0),
    }  # fmt: skip
    lines = paper_table.table([row]).splitlines()
    assert lines[1].split() == ["mine", "42.00", "60.00", "55.00", "70.00", "65.00", "50.00"]
    assert lines[0].rstrip().endswith("its retrieval")
    nomic = next(line for line in lines if line.startswith("Nomic"))
    assert nomic.split()[-6:] == ["52.86", "65.80", "-", "-", "-", "-"]
    assert max(map(len, lines)) <= 120


def test_each_published_row_is_marked_and_has_a_source():
    lines = paper_table.table([]).splitlines()
    assert len(paper_table.PUBLISHED) == 4
    for number, row in enumerate(paper_table.PUBLISHED, start=1):
        assert row.figures.keys() <= paper_table.COLUMNS.keys()
        assert any(line.startswith(f"{row.name}, published [{number}]") for line in lines)
        assert f"[{number}] {row.source}" in lines
        assert "model card" in row.source
        assert "arXiv" in row.source


def test_part_of_a_benchmark_is_no_figure_of_it(tmp_path):
    for name, found, words in (
        ("beir", figures(["a", "b"]), "beir.json has 2 of BEIR's 15 sets"),
        (
            "beir",
            figures([f"set{i}" for i in range(14)] + ["CQADupstack/android"]),
            "beir.json has 15 of the 26 tasks that BEIR's 15 sets are",
        ),
        ("miracl", figures(["M/de"]), "miracl.json has 1 of MIRACL's 18 languages"),
        ("mteb", {"nothing": 1}, "mteb.json has no 'mean'"),
        (
            "mteb",
            {"benchmark": "X", "mean": 1, "mean_of_types": 1, "types": {"STS": 1}},
            "mteb.json is no output .*'Retrieval'",
        ),
        (
            "mteb",
            {"benchmark": "NanoBEIR", "mean": 1, "mean_of_types": 1, "types": {"Retrieval": 1}},
            "mteb.json is of NanoBEIR",
        ),
        (
            "mteb",
            {"benchmark": "X", "mean": "a", "mean_of_types": 1, "types": {"Retrieval": 1}},
            "mteb.json is no output",
        ),
        ("tasks", {"a": {"recall": 1}}, "tasks.json has no 'ndcg@10'"),
        ("tasks", [1], "cannot be read"),
        ("tasks", {}, "has no 'ndcg@10'"),
    ):
        folder = fill(tmp_path / f"{name}-{len(words)}", **{name: found})
        with pytest.raises(UserError, match=words):
            paper_table.ours(folder)
    with pytest.raises(UserError, match=r"has no figures: none of beir\.json"):
        paper_table.main([f"--ours={fill(tmp_path / 'empty')}"])


def script(*arguments, tmp_path, **environ) -> subprocess.CompletedProcess:
    environment = (
        os.environ | {"TABLE_PYTHON": sys.executable, "RUN": str(tmp_path / "out"), "PYTHONPATH": "."} | environ
    )
    command = ["bash", "launch/paper_table.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_dry_run_prints_each_command_and_does_nothing(tmp_path):
    for name in ("one", "other one"):
        (tmp_path / name).mkdir()
    done = script("--dry-run", tmp_path / "one", tmp_path / "other one", tmp_path=tmp_path, TABLE_PYTHON="python")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    assert lines[0] == (
        f"+ python -m moe_embed.evaluate --task=mteb:BEIR --model={tmp_path}/one --output={tmp_path}/out/one/beir.json"
    )
    assert "--task=mteb:MIRACLRetrieval" in lines[1]
    assert r"mteb_benchmark --benchmark=MTEB\(eng\,\ v2\)" in lines[2]
    assert r"other\ one" in lines[3]
    assert lines[6].startswith("+ python -m moe_embed.paper_table --ours=")
    assert not (tmp_path / "out").exists()
    beir = fill(tmp_path / "out").joinpath("one", "beir.json")
    beir.parent.mkdir()
    beir.write_text("{}")
    assert script("--dry-run", tmp_path / "one", tmp_path=tmp_path).stdout.startswith(f"{beir} is up to date.")
    (tmp_path / "one" / "newer").write_text("")
    os.utime(tmp_path / "one" / "newer", (2**31, 2**31))
    assert script("--dry-run", tmp_path / "one", tmp_path=tmp_path).stdout.startswith("+ ")


def test_what_the_script_refuses(tmp_path):
    (tmp_path / "a" / "m").mkdir(parents=True)
    (tmp_path / "b" / "m").mkdir(parents=True)
    for arguments, words in (
        ([], "bash launch/paper_table.sh runs/mine"),
        (["--what", tmp_path], "bash launch/paper_table.sh runs/mine"),
        ([tmp_path / "none"], "is no folder"),
        ([tmp_path / "a" / "m", tmp_path / "b" / "m"], "two models are named m"),
    ):
        done = script("--dry-run", *arguments, tmp_path=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr


def test_two_local_folders_end_to_end(tmp_path):
    """A stand-in for a trained model: what is tested is the way from the folders to the table."""
    import jax
    import numpy as np

    from moe_embed import config as config_lib
    from moe_embed.data import tokenizer as tokenizer_lib
    from moe_embed.load import Model, save
    from moe_embed.model import encoder

    c = config_lib.load("configs/demo.py:tiny")
    params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
    save(
        Model(c.encoder, c.moe, params, tokenizer_lib.read(c.data.tokenizer), {}, None, "test"),
        tmp_path / "mine",
        made_by="a test",
    )
    names = ("first", "second")
    for name in names:
        (tmp_path / name / "qrels").mkdir(parents=True)
        rows = [json.dumps({"_id": f"d{i}", "text": f"{name} {'page ' * i}"}) for i in range(30)]
        (tmp_path / name / "corpus.jsonl").write_text("\n".join(rows) + "\n")
        (tmp_path / name / "queries.jsonl").write_text('{"_id": "q", "text": "page page"}\n')
        (tmp_path / name / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td2\t1\nq\td3\t1\n")
    done = script(f"--tasks={','.join(str(tmp_path / name) for name in names)}", tmp_path / "mine", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "these_tasks" / "mine" / "tasks.json").read_text())
    assert list(found) == list(names)
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("mine ")]
    assert row.split()[-1] == f"{100 * np.mean([found[name]['ndcg@10'] for name in names]):.2f}"
    assert "these tasks" in done.stdout

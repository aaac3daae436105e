"""The verb: lines in, rows out, and a search that finds what it should."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import embed, train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "w"
    train.train(
        config_lib.load("configs/demo.py:tiny", ["--config.run.steps=1", "--config.data.batch_size=8"]), workdir=path
    )
    return path


def test_row_i_is_line_i(workdir, tmp_path, capsys):
    texts = ["eins", "二", "три"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    embed.main(
        [
            f"--model={workdir}",
            f"--input={tmp_path / 't.jsonl'}",
            f"--output={tmp_path / 'e.npy'}",
            "--task=query",
            "--dim=8",
        ]
    )
    vectors = np.load(tmp_path / "e.npy")
    assert vectors.shape == (3, 8)
    np.testing.assert_allclose(vectors[2], embed.load(workdir).encode(["три"], "query", 8)[0], atol=1e-6)
    assert "3 vectors of 8 numbers" in capsys.readouterr().out


def test_search_finds_the_same_text(workdir, capsys):
    model = embed.load(workdir, mesh=embed.load(workdir).mesh)
    model = dataclasses.replace(model, prompts={})
    embed.search(model, ["rows and columns", "the weather", "表を挿入"], ["表を挿入"], top_k=1)
    assert "1.000 表を挿入" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "--output"), (("--output=e.npy",), "--input"), (("--search=none.jsonl",), "none.jsonl does not exist")],
)
def test_faults_exit_2(arguments, words, tmp_path):
    done = subprocess.run([sys.executable, "-m", "moe_embed.embed", f"--model={tmp_path}", *arguments],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr

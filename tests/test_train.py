"""The loop: a run in two halves equals a run in one, bit for bit; the workdir describes itself; faults are sentences."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_embed import checkpoint, metrics, program, sharding, train
from moe_embed import config as config_lib
from moe_embed.load import load

TINY = ("--config=configs/demo.py:tiny", "--config.mesh.data=1")


@pytest.fixture(scope="module")
def config():
    c = config_lib.load("configs/demo.py:tiny", ["--config.run.save_every=4", "--config.run.steps=8"])
    return dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=16))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    train.train(config, workdir=workdir)
    return workdir


def digest(workdir, step):
    manifest = json.loads((workdir / "checkpoints" / str(step) / checkpoint.MANIFEST).read_text())
    return manifest["facts"]


def test_the_workdir_describes_itself(whole, config):
    rows = metrics.read(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert {"accuracy", "tokens_per_second", "router_load/0/7", "useful"} <= set(rows[0])
    assert sum(rows[3][f"router_load/0/{e}"] for e in range(8)) == pytest.approx(8, rel=1e-5)
    assert checkpoint.steps(whole / "checkpoints") == [4, 8]
    description = json.loads((whole / "workdir.json").read_text())
    assert config_lib.from_dict(description["config"]) == config
    assert description["prompts"]["query"] == "search_query: "
    assert set(description["versions"]) >= {"jax", "flax"}


def test_an_interrupted_run_continues_to_the_same_weights(whole, config, tmp_path, capsys):
    """Killed after step 4's checkpoint: what lies beyond it is gone, and the rerun ends bit for bit where the whole did."""
    workdir = tmp_path / "w"
    train.train(config, workdir=workdir)
    (workdir / "checkpoints" / "8" / checkpoint.MANIFEST).unlink()  # as if killed during the last save
    capsys.readouterr()
    train.train(config, workdir=workdir)
    said = capsys.readouterr().out
    assert "checkpoint 8 is passed over" in said
    assert "continuing" in said
    a, b = load(whole).params, load(workdir).params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    losses = [[row["loss"] for row in metrics.read(w / "metrics.jsonl")] for w in (whole, workdir)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


def test_a_finished_run_says_so_and_does_nothing(whole, config, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    train.train(config, workdir=whole)
    assert "is finished: step 8 of 8" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_by_field(whole, config):
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1.0))
    with pytest.raises(config_lib.UserError, match=r"optim.learning_rate=.*not 1\.0"):
        train.train(other, workdir=whole)


def test_changed_data_is_refused():
    with pytest.raises(config_lib.UserError, match="files was"):
        train.check_fingerprint({"files": [["a", 3, 1]]}, {"files": [["a", 4, 2]]}, pathlib.Path("w"))


def test_parameters_are_counted_as_a_token_meets_them(config):
    mesh = sharding.make_mesh(config_lib.Mesh(data=1), devices=jax.devices()[:1])
    total, active = train.count_parameters(program.build(config, mesh).abstract_state["params"], config)
    expert = 2 * config.encoder.dim * config.encoder.ffn_dim
    assert total - active == 6 * expert


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.optim.learning_rat=1",), "did you mean learning_rate"),
        (("--config.data.batch_size=7", "--config.mesh.data=2"), "mesh"),
        (("--config.data.sources=nothing.jsonl",), "nothing.jsonl does not exist"),
        (("--workdir=pyproject.toml",), "cannot be written"),
    ],
)
def test_faults_are_one_sentence_and_exit_2(arguments, words, tmp_path):
    command = [
        sys.executable,
        "-m",
        "moe_embed.train",
        "--config=configs/demo.py:tiny",
        f"--workdir={tmp_path / 'w'}",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "checkpoints").exists()

"""Rows go to real TensorBoard files, and to a stand-in for wandb's client; what fails there does not end a run."""

import importlib.util
import struct
import subprocess
import sys
import threading
import types

import pytest

from moe_embed import config as config_lib
from moe_embed import metrics, trackers, train
from moe_embed.config import UserError


def read_events(folder) -> list[tuple[int, str, float]]:
    """(step, name, value) of the TFRecords in a folder, and (first step, "purge", 0) where a writer began again."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                found.append((event.step, "purge", 0.0))
    return found


def train_tiny(workdir, *overrides: str) -> None:
    overrides = ("run.log_to=tensorboard", "data.batch_size=8", "data.rows=24", *overrides)
    train.train(config_lib.load("configs/demo.py:tiny", [f"--config.{o}" for o in overrides]), workdir=workdir)


def test_a_run_and_its_continuation_are_in_tensorboard(tmp_path):
    train_tiny(tmp_path / "w", "run.steps=2", "optim.schedule=constant")
    train_tiny(tmp_path / "w", "run.steps=3", "optim.schedule=constant")
    found = read_events(tmp_path / "w" / "tensorboard")
    losses = [(step, value) for step, name, value in found if name == "loss"]
    rows = metrics.read(tmp_path / "w" / "metrics.jsonl")
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert {name for _, name, _ in found} == {*rows[0], "purge"} - {"step"}
    assert [step for step, name, _ in found if name == "purge"] == [2]


class Run:
    def __init__(self):
        self.rows, self.metrics, self.ended = [], [], None

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if row["step"] == 3:
            raise ConnectionError("reset by peer\nand more")
        self.rows.append(row)

    def finish(self, *, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """As much of wandb's client as is used; the real one (0.31.0, offline) was run by hand on 2026-11-24."""
    runs = []

    def init(**given):
        runs.append((given, Run()))
        return runs[-1][1]

    module = types.ModuleType("wandb")
    module.init, module.Settings, module.runs = init, dict, runs
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_continued_run_is_the_same_run_at_wandb(wandb, tmp_path):
    for first in (0, 2, 0):
        with trackers.opened(["wandb"], tmp_path, config={"run": {"steps": 4}}, first_step=first) as log:
            log(first, {"loss": 1.0})
    ids = [given["id"] for given, _ in wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    given, run = wandb.runs[1]
    assert (given["name"], given["config"], given["resume"]) == (tmp_path.name, {"run": {"steps": 4}}, "allow")
    assert (run.rows, run.metrics, run.ended) == ([{"step": 2, "loss": 1.0}], [("*", "step")], 0)


def test_a_tracker_that_fails_is_left_behind(wandb, tmp_path):
    said = []
    with trackers.opened(["wandb", "tensorboard"], tmp_path, config={}, first_step=0, say=said.append) as log:
        for step in range(2, 5):
            log(step, {"loss": 1.0})
    assert said == ["warning: wandb takes no more rows (ConnectionError: reset by peer); training goes on without it."]
    assert [row["step"] for row in wandb.runs[0][1].rows] == [2]
    assert [step for step, _, _ in read_events(tmp_path / "tensorboard")] == [2, 3, 4]


def test_a_run_that_fails_is_said_to_have_failed(wandb, tmp_path):
    with pytest.raises(UserError), trackers.opened(["wandb"], tmp_path, config={}, first_step=0):
        raise UserError("a fault")
    assert wandb.runs[0][1].ended == 1


def test_one_that_cannot_take_leave_ends_nothing(wandb, tmp_path, monkeypatch):
    def finish(self, **_):
        raise TimeoutError("no answer")

    monkeypatch.setattr(Run, "finish", finish)
    said = []
    with trackers.opened(["wandb"], tmp_path, config={}, first_step=0, say=said.append):
        pass
    assert said == ["warning: wandb did not take leave (TimeoutError: no answer)."]


def test_one_that_never_answers_is_not_waited_for(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda self, **_: threading.Event().wait())
    monkeypatch.setattr(trackers, "LEAVE", 0.1)
    said = []
    with trackers.opened(["wandb"], tmp_path, config={}, first_step=0, say=said.append):
        pass
    assert said == ["warning: wandb did not take leave (no answer in 0 s)."]


FULL = """
import pathlib, resource, sys
from moe_embed import trackers
with trackers.opened(["tensorboard"], pathlib.Path(sys.argv[1]), config={}, first_step=0) as log:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for step in range(200):
        log(step, {"loss": 1.0, "accuracy": 0.5})
print("the end")
"""


def test_on_a_full_disk_training_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    first, *rest = done.stdout.splitlines()
    assert first.startswith("warning: tensorboard takes no more rows (OSError: [Errno 27] File too large")
    assert rest[-1] == "the end"
    assert len(rest) <= 2  # and that it did not take leave


def test_what_cannot_begin_is_a_sentence(wandb, tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login()\nmore")

    wandb.init = init
    with (
        pytest.raises(UserError, match=r"log_to=wandb cannot begin: RuntimeError: api_key not configured .*login\(\)$"),
        trackers.opened(["wandb"], tmp_path, config={}, first_step=0),
    ):
        pass
    with pytest.raises(UserError, match="log_to=mlflow is none of tensorboard, wandb"):
        trackers.check(["mlflow"], tmp_path)
    with pytest.raises(UserError, match=r"log_to=tensorboard writes files of its own, and gs://bucket/w is no folder"):
        trackers.check(["tensorboard"], "gs://bucket/w")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log_to=wandb needs wandb, which is not installed: pip .*trackers"):
        train_tiny(tmp_path / "w", "run.log_to=wandb")
    assert not (tmp_path / "w").exists()

"""What a run writes down: a row a step, kept over a resume, readable after a crash."""

import errno
import json
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import metrics
from moe_embed.config import UserError


def write(workdir, steps, *, first=0, last=10, loss=0.0):
    writer = metrics.Writer(workdir, first_step=first, last_step=last)
    for step in steps:
        writer.step(step, {"loss": loss + step, "tokens": 100.0})
    writer.__exit__()


def test_scalars_by_hand():
    load_RE = jnp.array([[0.5, 1.5, 1.0], [2.0, 0.0, 1.0]])
    row = metrics.scalars({"loss": jnp.float32(0.25), "tokens": np.int32(3), "router_load_RE": load_RE})
    assert row == {
        "loss": 0.25, "tokens": 3.0,
        "router_load/0/0": 0.5, "router_load/0/1": 1.5, "router_load/0/2": 1.0,
        "router_load/1/0": 2.0, "router_load/1/1": 0.0, "router_load/1/2": 1.0,
    }  # fmt: skip
    assert all(type(value) is float for value in row.values())
    json.dumps(row)
    assert metrics.scalars({"router_load_RE": load_RE[:, ::-1]}) != metrics.scalars({"router_load_RE": load_RE})


def test_a_row_for_every_step(tmp_path):
    write(tmp_path, range(4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(type(row["step"]) is int for row in rows)
    assert [row["loss"] for row in rows] == [0.0, 1.0, 2.0, 3.0]
    for row in rows:
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])


def test_a_row_is_on_disk_before_the_next_step(tmp_path):
    writer = metrics.Writer(tmp_path, first_step=0, last_step=5)
    writer.step(0, {"loss": 1.0, "tokens": 1.0})
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1  # and not only at the end
    writer.__exit__()


def test_a_resume_drops_the_steps_it_repeats(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, range(4, 8), first=4, loss=100.0)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["loss"] for row in rows] == [0, 1, 2, 3, 104, 105, 106, 107]
    write(tmp_path, [0], first=0)
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_a_resume_drops_the_evaluations_it_repeats(tmp_path):
    for first in (0, 4):  # stopped after step 6, continued from the checkpoint of step 4
        writer = metrics.Writer(tmp_path, first_step=first, last_step=8)
        for done in (2, 4, 6):
            if done > first:
                writer.evaluation(done, {"ndcg": 0.1 * done + first})
        writer.__exit__()
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["ndcg"] == pytest.approx(4.6)


def test_events_of_all_tries_are_kept(tmp_path):
    for first, name in ((0, "begin"), (4, "resume")):
        writer = metrics.Writer(tmp_path, first_step=first, last_step=8)
        writer.event(first, name)
        writer.event(first + 4, "save")
        writer.__exit__()
    rows = metrics.read(tmp_path / "events.jsonl")
    assert [(row["step"], row["event"]) for row in rows] == [(0, "begin"), (4, "save"), (4, "resume"), (8, "save")]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert abs(times[0] - time.time()) < 60


def test_a_last_line_cut_short_is_left_out(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for missing in range(1, len(whole.splitlines()[-1])):
        path.write_text(whole[: -1 - missing])
        assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1]
    write(tmp_path, [2], first=2)
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_an_event_cut_short_is_dropped_and_the_next_stands_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "events.jsonl"
    for cut in (
        b'{"step": 4, "ev',
        b"\0" * 9,
        b'{"step": 4, "event": "save", "time": 0.5}',
    ):  # the last lacks its end alone
        path.write_bytes(b'{"step": 0, "event": "begin", "time": 0.25}\n' + cut)
        whole = metrics.read(path)
        with metrics.Writer(tmp_path, first_step=4, last_step=8) as writer:
            writer.event(4, "resume")
        rows = metrics.read(path)
        assert rows[:-1] == whole
        assert (rows[-1]["step"], rows[-1]["event"]) == (4, "resume")
        assert len(whole) == 1 + cut.endswith(b"}")
    path.write_text("no row\n" + path.read_text())  # not at the end: not ours to drop
    with pytest.raises(UserError, match=r"events.jsonl:1 is no row with a step"):
        metrics.Writer(tmp_path, first_step=4, last_step=8)


def test_rows_wait_while_the_disk_is_full_and_no_line_is_cut(tmp_path, monkeypatch, capsys):
    plain, full = metrics.append, []

    def append(path, text):
        if full:
            with open(path, "a") as file:
                file.write("")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, text)

    monkeypatch.setattr(metrics, "append", append)
    with metrics.Writer(tmp_path, first_step=0, last_step=6) as writer:
        for step in range(6):
            full[:] = [step] if step in (2, 3, 5) else []
            writer.step(step, {"loss": float(step), "tokens": 1.0})
            assert len(metrics.read(tmp_path / "metrics.jsonl")) == (1, 2, 2, 2, 5, 5)[step]
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device)") == 2
    assert f"warning: 1 rows were never written to {tmp_path / 'metrics.jsonl'}." in out


def test_what_cannot_be_written_whole_is_not_written(tmp_path):
    """A file that may not grow further, for real: in a child, whose limit it is."""
    path = tmp_path / "rows"
    code = f"""
import pathlib, resource
from moe_embed import metrics
path = pathlib.Path({str(path)!r})
metrics.append(path, "a" * 60)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    metrics.append(path, "b" * 60)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "File too large\n"
    assert path.read_text() == "a" * 60


def test_no_file_is_no_rows(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_the_bar_shows_loss_accuracy_dev_figure_and_speed(tmp_path, capsys):
    writer = metrics.Writer(tmp_path, first_step=3, last_step=7)
    writer.step(3, {"loss": 1.25, "accuracy": 0.5, "tokens": 10.0, "unshown": 9.0})
    writer.evaluation(4, {"ndcg": 0.375, "ndcg/some-task": 0.375})
    writer.say("a sentence above the bar")
    writer.__exit__()
    out = capsys.readouterr().out
    assert "a sentence above the bar\n" in out
    assert "4/7" in out  # resumed at three, one step done
    for shown in ("loss=1.250", "acc=0.500", "dev nDCG@10=0.375", "tok/s="):
        assert shown in out
    assert "unshown" not in out
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert row == {"step": 4, "ndcg": 0.375, "ndcg/some-task": 0.375}


def test_a_writer_without_a_workdir_writes_nothing(tmp_path, monkeypatch, capsys):
    """What every process but one of several has."""
    monkeypatch.chdir(tmp_path)
    with metrics.Writer(None, first_step=0, last_step=1) as writer:
        writer.step(0, {"loss": 1.0, "tokens": 4.0})
        writer.evaluation(1, {"ndcg": 0.5})
    assert not list(tmp_path.iterdir())


def test_a_tracker_gets_rows_and_the_figures_that_a_resumed_run_begins_with(tmp_path):
    sent = []
    with metrics.Writer(tmp_path, first_step=0, last_step=2, also=lambda *it: sent.append(it)) as writer:
        writer.step(0, {"tokens": 1.0})
        writer.evaluation(1, {"ndcg": 0.5})
    assert [(step, "ndcg" in row) for step, row in sent] == [(0, False), (1, True)]
    sent.clear()
    with metrics.Writer(tmp_path, first_step=1, last_step=2, also=lambda *it: sent.append(it)):
        pass
    assert sent == [(1, {"ndcg": 0.5})]

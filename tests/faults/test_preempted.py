"""Faults 1, 2 and 8: SIGTERM saves and stops, one process or two; the same command ends where the undisturbed run did."""

import os
import signal

import pytest

from moe_embed import checkpoint, preemption, train
from moe_embed import config as config_lib
from moe_embed.data import loading
from tests.faults import runs

pytestmark = pytest.mark.faults


def test_sigterm_saves_and_the_same_command_continues(long_flags, undisturbed, tmp_path):
    workdir = tmp_path / "w"
    running = runs.start(workdir, long_flags)
    runs.wait_for_step(workdir, 7, running)
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGTERM)  # a second one damages nothing
    assert running.wait(timeout=60) == preemption.STATUS == 75
    assert "the same command continues" in runs.said(workdir)
    stopped_at = runs.newest(workdir)
    assert stopped_at == runs.rows(workdir)[-1]["step"] + 1 >= 7
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    assert runs.digest(workdir) != runs.digest(undisturbed)
    assert runs.to_the_end(workdir, long_flags) == 0
    assert f"continuing {workdir} from step {stopped_at} of 100" in runs.said(workdir)
    assert runs.digest(workdir) == runs.digest(undisturbed)
    assert runs.numbers(workdir) == runs.numbers(undisturbed)
    assert len(runs.rows(workdir)) == 100


def test_sigterm_to_one_of_two_stops_both_at_one_step(endless_flags, tmp_path):
    workdir = tmp_path / "w"
    both = runs.start_two(workdir, endless_flags)
    runs.wait_for_step(workdir, 7, *both)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in both] == [75, 75]  # without a word jax would take 100 s
    stopped_at = runs.newest(workdir)
    assert stopped_at == runs.rows(workdir)[-1]["step"] + 1 < 2000
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    both = runs.start_two(workdir, [*endless_flags, f"--config.run.steps={stopped_at + 6}"])
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert f"from step {stopped_at} of {stopped_at + 6}" in runs.said(workdir, ".p0")
    assert [row["step"] for row in runs.rows(workdir)] == list(range(stopped_at + 6))


def test_interrupted_at_five_steps_bit_for_bit(pairs, tmp_path, monkeypatch):
    """And not only at those where a checkpoint is due."""
    overrides = runs.flags(pairs, "run.steps=8", "run.save_every=4", "mesh.data=8")[1:]
    config = config_lib.load("configs/demo.py:tiny", overrides)
    assert train.train(config, workdir=tmp_path / "whole") == 0
    iterate, interrupted_at = loading.iterate, {1, 2, 4, 5, 7}

    def interrupting(batches, first, last, **options):
        for step, batch in enumerate(iterate(batches, first, last, **options), start=first):
            if step + 1 in interrupted_at:
                interrupted_at.remove(step + 1)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loading, "iterate", interrupting)
    ends = [train.train(config, workdir=tmp_path / "w") for _ in range(6)]
    assert ends == [75] * 5 + [0]
    assert runs.digest(tmp_path / "w") == runs.digest(tmp_path / "whole")
    assert runs.numbers(tmp_path / "w") == runs.numbers(tmp_path / "whole")
    assert checkpoint.steps(tmp_path / "w" / "checkpoints") == [7, 8]
    other = config_lib.load("configs/demo.py:tiny", [*overrides, "--config.run.seed=1"])
    train.train(other, workdir=tmp_path / "other")
    assert runs.digest(tmp_path / "other") != runs.digest(tmp_path / "whole")

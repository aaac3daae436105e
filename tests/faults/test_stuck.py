"""Fault 15: one of two processes is alive, and makes no step."""

import signal
import time

import pytest

from tests.faults import runs

pytestmark = pytest.mark.faults
# Process 1 falls asleep over its data, before step 6.
SLEEPS = """
import os, time
from moe_embed import train, verb
from moe_embed.data import loading
iterate = loading.iterate
def sleeping(batches, first, last, **options):
    for step, batch in enumerate(iterate(batches, first, last, **options), start=first):
        if step == 6 and os.environ["JAX_PROCESS_ID"] == "1":
            fall_asleep()
        yield batch
def fall_asleep():
    time.sleep(600)
loading.iterate = sleeping
verb.run(train.main, copies=True)
"""


def test_a_stuck_peer_ends_the_run_and_is_named(endless_flags, tmp_path):
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    workdir, limit = tmp_path / "w", 12
    flags = [*endless_flags, f"--config.run.watchdog={limit}"]
    both = runs.start_two(workdir, flags, program=(tmp_path / "sleeps.py",))
    runs.wait_for_step(workdir, 4, *both)
    start = time.monotonic()
    assert [process.wait(timeout=100) for process in both] == [76, 76]
    assert time.monotonic() - start < limit + 25
    said = runs.said(workdir, ".p0") + runs.said(workdir, ".p1")
    assert "in fall_asleep" in runs.said(workdir, ".p1")
    assert "process 1 on " in said
    assert "is behind, at step 6" in said
    assert runs.newest(workdir) == 5
    both = runs.start_two(workdir, [*flags, "--config.run.steps=8"])  # awake
    assert [process.wait(timeout=240) for process in both] == [0, 0]


def test_a_peer_that_answers_nothing_is_named(endless_flags, tmp_path):
    """Stopped, as a machine that has frozen: not even its threads run."""
    workdir = tmp_path / "w"
    both = runs.start_two(workdir, [*endless_flags, "--config.run.watchdog=12"])
    runs.wait_for_step(workdir, 7, *both)
    both[1].send_signal(signal.SIGSTOP)
    try:
        assert both[0].wait(timeout=60) == 76
    finally:
        both[1].kill()
        both[1].wait()
    assert "process 1 on " in runs.said(workdir, ".p0")
    assert "was last heard of" in runs.said(workdir, ".p0")

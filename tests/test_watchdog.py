"""Beats that stay away end a process, with its stacks; who is behind, by hand. Two real processes: tests/faults/test_stuck.py."""

import signal
import subprocess
import sys
import time

import pytest

from moe_embed import cluster, watchdog


def row(process, done, *, silent=1.0):
    return {"process": process, "host": f"h{process}", "done": done, "since": 40.0, "silent": silent}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "this process is the only one; where it stands is above."),
        ([row(0, 7), row(1, 6)], "process 1 on h1 is behind, at step 6 for 40 s"),
        ([row(0, 7), row(1, 7)], "all 2 processes are at step 7; where each stands is in its own stderr."),
        ([row(0, 7, silent=50.0), row(1, 7)], "process 0 on h0 was last heard of 50 s ago, at step 7"),
    ],
)
def test_who_is_behind(rows, said):
    assert watchdog.behind(rows, silent_after=12.0) == said


STUCK = """
import sys, time
from moe_embed import watchdog
watchdog.COMPILING = 0.0
def wait_for_ever():
    time.sleep(60)
with watchdog.Watchdog(float(sys.argv[1])) as watching:
    for done in range(5):
        watching.beat(done)
        time.sleep(0.3)
    if sys.argv[2] == "stuck":
        wait_for_ever()
print("the end")
"""


def run(*arguments):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return done, time.monotonic() - start


def test_a_process_without_a_beat_ends_with_its_stacks():
    done, seconds = run("2", "stuck")
    assert done.returncode == cluster.GONE == 76
    assert seconds < 45
    assert "in wait_for_ever" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no step for ")
    assert "after step 4: this process is the only one" in last


def test_beats_keep_it_alive_and_0_is_never():
    for arguments in (("2", "well"), ("0", "well")):
        done, _ = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


def test_what_is_told_alone_is_nothing():
    cluster.tell(3, since=1.0)
    assert cluster.told() == []


LOCKED = """
import ctypes, sys, time
from moe_embed import watchdog
watchdog.COMPILING, watchdog.LOCKED_UP, watchdog.STACKS = 0.0, 0.5, 0.5
with watchdog.Watchdog(2.0) as watching:
    watching.beat(3)
    time.sleep(0.5)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock: no thread of Python's runs
"""


def test_a_process_that_is_locked_up_ends_by_a_signal_and_so_is_run_again():
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == -signal.SIGALRM  # 142 in a shell: above 128, as launch/supervise.sh wants it
    assert "Timeout" in done.stderr
    assert 'File "<string>", line 8' in done.stderr

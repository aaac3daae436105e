"""SIGTERM is heard by a single process; that several agree on a step: tests/faults/test_preempted.py."""

import os
import signal
import subprocess
import sys
import threading

from moe_embed import preemption


def test_a_single_process_hears_it_and_a_second_changes_nothing(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with preemption.heard(0) as told_to_stop:
        assert not told_to_stop(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told_to_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told_to_stop(1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err.count("SIGTERM: saving after this step.") == 1


def test_in_a_thread_there_are_no_signals():
    heard = []

    def run():
        with preemption.heard(0) as told_to_stop:
            heard.append(told_to_stop(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [False]


def test_before_the_first_step_it_ends_at_once():
    code = """
import os, signal
from moe_embed import preemption
preemption.nothing_to_save()
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (preemption.STATUS, "")


def test_of_several_it_is_asked_from_the_first_step_of_this_call_on(monkeypatch):
    """jax agrees on the number after the largest that was asked for, 1 where none was, and answers to that number alone."""
    asked = []
    monkeypatch.setattr(preemption.cluster, "several", lambda: True)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 1
    )
    with preemption.heard(500) as told_to_stop:
        assert [told_to_stop(done) for done in (500, 501)] == [False, True]
    assert asked == [0, 1]

"""SIGTERM is heard by a single process; that several agree on a step: tests/faults/test_preempted.py."""

import os
import signal
import subprocess
import sys
import threading

from moe_embed import preemption


def test_a_single_process_hears_it_and_a_second_changes_nothing(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with preemption.heard() as told_to_stop:
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
        with preemption.heard() as told_to_stop:
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

"""Nothing waits for ever: a run without a step for config.run.watchdog seconds ends, and says where it stood and who is behind.

A peer that is alive but stuck leaves the others in a collective that never returns; jax itself would wait. Every process
tells the coordinator's store which step it has done, from a thread, so that the one that ends can name the one that is behind.
"""

import faulthandler
import os
import signal
import sys
import threading
import time

from moe_embed import cluster

COMPILING = 1800.0  # seconds more, where a step is compiled first
LAST_RESORT = 15.0  # seconds to say goodbye in: the store may be what is stuck
LOCKED_UP = 60.0  # seconds more, for a process in which not even a thread of Python's can run
STACKS = 5.0  # seconds to print them in


class Watchdog:
    """As a context: ends this process, and with it all, by exit status cluster.GONE, where beats stay away. 0 seconds: never.

    A process that is locked up, in which no thread of Python's runs, ends by SIGALRM: the launch scripts run either again.
    """

    def __init__(self, seconds: float, *, done: int = 0):
        self.seconds = seconds
        self._interval = min(max(seconds / 10, 0.2), 10.0)
        self._stopped = threading.Event()
        self.beat(done, more=COMPILING)

    def beat(self, done: int, *, more: float = 0.0) -> None:
        """`done` steps are done; the next beat comes within `seconds`, and `more`."""
        self._done, self._since = done, time.monotonic()
        self._deadline = self._since + self.seconds + more

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            for work in (self._tell, self._look):
                threading.Thread(target=work, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._unlock()

    def _tell(self) -> None:
        while not self._stopped.is_set():
            cluster.tell(self._done, since=time.monotonic() - self._since)
            self._stopped.wait(self._interval)

    def _look(self) -> None:
        while not self._stopped.wait(self._interval):
            left = self._deadline - time.monotonic()
            if left < 0:
                self._end()
            # Neither needs Python to run: all stacks, and the system's alarm, which nobody here catches (exit status 142).
            faulthandler.dump_traceback_later(left + LOCKED_UP, file=sys.__stderr__)
            signal.setitimer(signal.ITIMER_REAL, left + LOCKED_UP + STACKS)
        self._unlock()

    @staticmethod
    def _unlock() -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _end(self) -> None:
        threading.Timer(LAST_RESORT, os._exit, [cluster.GONE]).start()
        faulthandler.dump_traceback(
            all_threads=True, file=sys.__stderr__
        )  # sys.stderr may be a notebook's, and no file
        why = f"no step for {time.monotonic() - self._since:.0f} s, after step {self._done}"
        print(f"error: {why}; asking who is behind ...", file=sys.stderr, flush=True)
        why = f"{why}: {behind(cluster.told(), silent_after=3 * self._interval)}"
        print(f"error: {why}", file=sys.stderr, flush=True)
        cluster.leave(cluster.GONE, why)


def behind(rows: list[dict], *, silent_after: float) -> str:
    """Who holds the others up, of what each process told last: {"process", "host", "done", "since", "silent"} (seconds)."""
    if len(rows) < 2:
        return "this process is the only one; where it stands is above."
    silent = [row for row in rows if row["silent"] > silent_after]
    least = min(row["done"] for row in rows)
    slow = [row for row in rows if row["done"] == least]
    if silent:
        return ", ".join(
            f"{_name(row)} was last heard of {row['silent']:.0f} s ago, at step {row['done']}" for row in silent
        )
    if len(slow) < len(rows):
        return ", ".join(f"{_name(row)} is behind, at step {row['done']} for {row['since']:.0f} s" for row in slow)
    return f"all {len(rows)} processes are at step {least}; where each stands is in its own stderr."


def _name(row: dict) -> str:
    return f"process {row['process']} on {row['host']}"

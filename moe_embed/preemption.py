"""When the machine is taken away: SIGTERM, as TPU VMs, GKE and Slurm announce it, and the step at which all processes stop.

A run that hears it saves, and ends with exit status 75 (EX_TEMPFAIL of sysexits.h): the same command continues it.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from moe_embed import cluster

STATUS = 75


def nothing_to_save() -> None:
    """Until the first step a SIGTERM ends the process at once, with the same status; jax's hearing replaces this."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))


@contextlib.contextmanager
def heard(first: int) -> Iterator[Callable[[int], bool]]:
    """Gives a function of the steps done: whether to save and stop here. Asked at `first` and after every step, by all alike.

    Of several processes jax hears SIGTERM, on whichever host, and has all agree on a step that none has passed. A single
    process notes it and ends at its next step; a second SIGTERM changes nothing, and Ctrl-C is not touched.
    """
    if cluster.several():
        # Counted from this call's first step: heard before that, jax agrees on number 1, and waits to be asked for just that.
        yield lambda done: multihost_utils.reached_preemption_sync_point(done - first)
        return
    noticed = threading.Event()

    def note(*_) -> None:
        if not noticed.is_set():
            noticed.set()
            print("\nSIGTERM: saving after this step.", file=sys.stderr, flush=True)

    in_main = (
        threading.current_thread() is threading.main_thread()
    )  # elsewhere Python has no signals: a notebook's thread
    before = signal.signal(signal.SIGTERM, note) if in_main else None
    try:
        yield lambda done: noticed.is_set()
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

"""Batches made while the device works: in a thread, or in processes of their own where one core is too slow."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

from moe_embed.data.batches import Batch

AHEAD = 2  # batches that are ready before they are asked for

_batches = None  # in a worker: what it makes batches of


def iterate(batches, first_step: int, last_step: int, *, workers: int = 0) -> Iterator[Batch]:
    """The batches of steps first_step .. last_step - 1 in order, AHEAD of them made beforehand.

    One thread makes them (Batches, MlmBatches). With `workers`, that many processes read, tokenise and pack (Batches only), and
    the thread puts what they send into rows; should they be killed, it does their work. counts["waited"] is how many seconds a batch was waited for: above a few
    milliseconds loading is what limits the run.
    """

    @functools.cache  # once, whoever notices first
    def say_killed() -> None:
        print("warning: the loader's processes were killed; batches are made in the training process.", file=sys.stderr)

    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread, _processes(batches, workers) as pool:
        waiting = collections.deque()
        for step in range(first_step, last_step):
            if pool is None:
                waiting.append(thread.submit(batches.batch_at, step))
            else:
                waiting.append(thread.submit(_filled, batches, step, _submitted(pool, step), say_killed))
            if len(waiting) > AHEAD + workers:
                yield _taken(waiting.popleft())
        while waiting:
            yield _taken(waiting.popleft())


def _submitted(pool: concurrent.futures.Executor, step: int) -> concurrent.futures.Future | None:
    """A process's work on a step; None where the processes are gone: SIGTERM to the whole group, or too much memory."""
    try:
        return pool.submit(_packed, step)
    except BrokenProcessPool:
        return None


def _filled(batches, step: int, work: concurrent.futures.Future | None, say_killed: Callable[[], None]) -> Batch:
    """A batch of what a process has packed or, where it could not, of what is packed here: it is the same."""
    if work:
        try:
            return batches.filled(step, work.result())
        except BrokenProcessPool:
            pass
    say_killed()
    return batches.filled(step, batches.packed(step))


def _taken(future: concurrent.futures.Future) -> Batch:
    start = time.perf_counter()
    batch = future.result()
    return dataclasses.replace(batch, counts=batch.counts | {"waited": time.perf_counter() - start})


def _processes(batches, workers: int):
    if not workers:
        return contextlib.nullcontext()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, _keep, (batches, os.getpid()))


def end_with(parent: int) -> None:
    """In a worker: end when the process that started it is gone. One killed by -9 cannot say so, and its workers would wait."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep(batches, parent: int) -> None:
    global _batches
    _batches = batches
    end_with(parent)


def _packed(step: int):
    return _batches.packed(step)

"""Requests that come one by one, answered together: a thread takes all texts that wait as soon as it is free.

Plain Python: what is called is handed in, and knows nothing of threads. While a call runs the next one's texts gather by
themselves, the more the longer it takes; and those who just got an answer have LINGER of that time to ask again and come along.
Without it 32 clients fall into two halves that take turns.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np

LINGER = 0.03  # of the last call's seconds: what a text may wait for company
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # upper ends of the histogram of texts a call


class QueueFull(Exception):
    """More texts would wait than may."""


class Closed(Exception):
    """The batcher has ended, or did so before the texts' turn came."""


@dataclasses.dataclass
class Counts:
    """What has been done since the start. `by_size[i]` calls had at most SIZES[i] texts (the last: more than any)."""

    texts: int = 0
    tokens: int = 0
    calls: int = 0
    failed_calls: int = 0
    seconds: float = 0.0  # in calls
    by_size: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(SIZES) + 1))


@dataclasses.dataclass(eq=False)
class _Job:
    texts: Sequence[str]
    key: Hashable
    answer: concurrent.futures.Future
    num_taken: int = 0
    parts: list = dataclasses.field(default_factory=list)  # what `encode` gave for the texts taken, in their order


class Batcher:
    """Texts of many threads -> calls of `encode(texts, key)`, one at a time, each of texts of one key.

    `encode` gives (vectors, float32 [N, dim], and the tokens read of each text, int [N]). A call has at most `max_batch`
    texts. A request with more is encoded in several, and lets others go before each; so nobody waits for all of it.
    """

    def __init__(
        self, encode: Callable[[list[str], Hashable], tuple[np.ndarray, np.ndarray]], *, max_batch: int, max_queue: int
    ):
        self._encode, self._max_batch, self._max_queue = encode, max_batch, max_queue
        self._jobs: collections.deque[_Job] = collections.deque()
        self._under_way: list[_Job] = []  # of the call that runs
        self._changed = threading.Condition()
        self._closed, self._last_seconds = False, 0.0
        self.counts = Counts()
        self._thread = threading.Thread(target=self._work, name="encode")
        self._thread.start()

    def submit(self, texts: Sequence[str], *, key: Hashable) -> concurrent.futures.Future:
        """A future of `encode`'s two arrays for these texts, one or more. Cancelled, it is left out of later calls.

        Raises QueueFull, or Closed; the future has what `encode` raised, or Closed.
        """
        answer: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                raise Closed
            if self._num_waiting() + len(texts) > self._max_queue:
                raise QueueFull
            self._jobs.append(_Job(texts, key, answer))
            self._changed.notify()
        return answer

    def num_waiting(self) -> int:
        """Texts that no call has taken yet."""
        with self._changed:
            return self._num_waiting()

    def close(self) -> None:
        """Finish the call under way and end; what still waits gets Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def give_up(self) -> None:
        """End at once: whoever has no answer yet gets Closed, those of the call under way too."""
        with self._changed:
            self._closed = True
            lost = {*self._jobs, *self._under_way}
            self._changed.notify()
        for job in lost:
            _settle(job.answer, error=Closed())

    def _num_waiting(self) -> int:
        return sum(len(job.texts) - job.num_taken for job in self._jobs if not job.answer.cancelled())

    def _work(self) -> None:
        while shares := self._wait():
            texts = [text for job, start, stop in shares for text in job.texts[start:stop]]
            began = time.perf_counter()
            try:
                vector_ND, tokens_N = self._encode(texts, shares[0][0].key)
            except Exception as error:  # a thread that ended here would leave everybody waiting
                self.counts.failed_calls += 1
                with self._changed:
                    lost = {job for job, _, _ in shares}
                    self._jobs = collections.deque(job for job in self._jobs if job not in lost)
                for job in lost:
                    _settle(job.answer, error=error)
                continue
            self._last_seconds = time.perf_counter() - began
            self._count(seconds=self._last_seconds, texts=len(texts), tokens=int(tokens_N.sum()))
            at = 0
            for job, start, stop in shares:
                job.parts.append((vector_ND[at : at + stop - start], tokens_N[at : at + stop - start]))
                at += stop - start
                if stop == len(job.texts):
                    _settle(job.answer, result=tuple(np.concatenate(arrays) for arrays in zip(*job.parts, strict=True)))
        for job in self._jobs:
            _settle(job.answer, error=Closed())

    def _wait(self) -> list[tuple[_Job, int, int]]:
        """[(job, from, to)]: what the next call encodes. Empty once the batcher is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._changed.wait_for(lambda: self._closed, timeout=LINGER * self._last_seconds)
                if self._closed:
                    return []
                if shares := self._take():
                    return shares

    def _take(self) -> list[tuple[_Job, int, int]]:
        """The job that waits longest and all of its key, in order, while there is room. What is left goes to the back."""
        there = [job for job in self._jobs if not job.answer.cancelled()]
        shares, others, unfinished, room = [], [], [], self._max_batch
        for job in there:
            if job.key != there[0].key or not room:
                others.append(job)
                continue
            stop = min(job.num_taken + room, len(job.texts))
            room -= stop - job.num_taken
            shares.append((job, job.num_taken, stop))
            job.num_taken = stop
            if stop < len(job.texts):
                unfinished.append(job)
        self._jobs = collections.deque(others + unfinished)
        self._under_way = [job for job, _, _ in shares]
        return shares

    def _count(self, *, seconds: float, texts: int, tokens: int) -> None:
        counts = self.counts
        counts.calls += 1
        counts.seconds += seconds
        counts.texts += texts
        counts.tokens += tokens
        counts.by_size[bisect.bisect_left(SIZES, texts)] += 1


def _settle(answer: concurrent.futures.Future, *, result=None, error: Exception | None = None) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled: whoever asked has gone
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

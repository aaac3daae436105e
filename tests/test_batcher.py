"""Texts of many threads in few calls: whose goes with whose, in what order, and what a fault or an end leaves."""

import threading
import time

import numpy as np
import pytest

from moe_embed.batcher import Batcher, Closed, QueueFull


class Gate:
    """An `encode` that notes its calls and waits in each until it is let through. A text's vector is its number."""

    def __init__(self):
        self.calls, self.entered, self.open = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, texts, key):
        self.calls.append((list(texts), key))
        self.entered.release()
        assert self.open.acquire(timeout=20)
        if "bad" in texts:
            raise ValueError("a bad text")
        numbers = np.array([float(text) for text in texts])
        return numbers[:, None], numbers.astype(int)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def batcher(gate):
    made = Batcher(gate, max_batch=4, max_queue=12)
    yield made
    for _ in range(20):
        gate.open.release()
    made.close()


def busy(batcher, gate):
    """The future of a text that is being encoded: what is submitted now waits."""
    first = batcher.submit(["0"], key="a")
    assert gate.entered.acquire(timeout=20)
    return first


def let(gate, *, calls):
    for _ in range(calls):
        gate.open.release()


def test_what_waits_goes_together_by_key_and_everybody_gets_their_own(batcher, gate):
    first = busy(batcher, gate)
    others = [batcher.submit(texts, key=key) for texts, key in [(["1"], "a"), (["2", "3"], "b"), (["4", "5"], "a")]]
    assert batcher.num_waiting() == 5
    let(gate, calls=3)
    np.testing.assert_array_equal(first.result(20)[0], [[0]])
    for future, expected in zip(others, ([1], [2, 3], [4, 5]), strict=True):
        vectors, tokens = future.result(20)
        np.testing.assert_array_equal(vectors[:, 0], expected)
        np.testing.assert_array_equal(tokens, expected)
    assert gate.calls == [(["0"], "a"), (["1", "4", "5"], "a"), (["2", "3"], "b")]
    assert batcher.counts.by_size[:3] == [1, 1, 1]  # calls of 1, of 2, of 3 or 4 texts
    assert (batcher.counts.texts, batcher.counts.tokens, batcher.counts.calls) == (6, 15, 3)


@pytest.mark.parametrize(("linger", "together"), [(1.0, True), (0.0, False)])
def test_who_asks_again_at_once_comes_along(batcher, gate, monkeypatch, linger, together):
    monkeypatch.setattr("moe_embed.batcher.LINGER", linger)
    first, waiting = busy(batcher, gate), batcher.submit(["1"], key="a")
    time.sleep(0.5)  # the call takes as long, and may be waited for as long with LINGER 1
    let(gate, calls=3)
    first.result(20)
    again = batcher.submit(["2"], key="a")
    waiting.result(20), again.result(20)
    assert (gate.calls[1][0] == ["1", "2"]) == together


def test_a_large_request_lets_others_go_before_its_rest(batcher, gate):
    busy(batcher, gate)
    large = batcher.submit([str(i) for i in range(10)], key="a")
    small = batcher.submit(["11"], key="a")
    let(gate, calls=4)
    np.testing.assert_array_equal(large.result(20)[0][:, 0], range(10))
    np.testing.assert_array_equal(small.result(20)[0], [[11]])
    assert [texts for texts, _ in gate.calls[1:]] == [["0", "1", "2", "3"], ["11", "4", "5", "6"], ["7", "8", "9"]]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(batcher, gate):
    first = busy(batcher, gate)
    waiting = batcher.submit(["1"] * 12, key="a")
    with pytest.raises(QueueFull):
        batcher.submit(["2"], key="a")
    assert waiting.cancel()  # whoever asked has gone: its texts are no longer in the way, and are never encoded
    after = batcher.submit(["2"], key="a")
    let(gate, calls=2)
    assert first.result(20)
    np.testing.assert_array_equal(after.result(20)[0], [[2]])
    assert gate.calls == [(["0"], "a"), (["2"], "a")]


def test_a_call_that_fails_fails_its_own_and_no_other(batcher, gate):
    busy(batcher, gate)
    bad = batcher.submit(["bad", "1", "2", "3", "4"], key="a")  # its rest would be another call
    good = batcher.submit(["5"], key="a")
    let(gate, calls=3)
    with pytest.raises(ValueError, match="a bad text"):
        bad.result(20)
    np.testing.assert_array_equal(good.result(20)[0], [[5]])
    assert [texts for texts, _ in gate.calls] == [["0"], ["bad", "1", "2", "3"], ["5"]]
    assert (batcher.counts.failed_calls, batcher.counts.calls) == (1, 2)


def test_who_gives_up_waits_for_nothing(gate):
    batcher = Batcher(gate, max_batch=4, max_queue=12)
    first = busy(batcher, gate)
    waiting = batcher.submit(["1"], key="a")
    batcher.give_up()  # the call still runs
    for answer in (first, waiting):
        with pytest.raises(Closed):
            answer.result(0)
    with pytest.raises(Closed):
        batcher.submit(["2"], key="a")
    let(gate, calls=1)
    batcher.close()
    assert gate.calls == [(["0"], "a")]


def test_the_end_finishes_the_call_under_way_and_tells_those_who_wait(gate):
    batcher = Batcher(gate, max_batch=4, max_queue=12)
    first = busy(batcher, gate)
    waiting = batcher.submit(["1"], key="a")
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not batcher._closed:
        time.sleep(0.001)
    let(gate, calls=1)
    closing.join(20)
    np.testing.assert_array_equal(first.result(20)[0], [[0]])
    with pytest.raises(Closed):
        batcher.submit(["2"], key="a")
    with pytest.raises(Closed):
        waiting.result(20)
    assert gate.calls == [(["0"], "a")]

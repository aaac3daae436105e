"""Saves beside the training: what is donated afterwards is saved as it was; failures are said, tried again and bounded."""

import errno
import threading

import jax
import numpy as np
import pytest

from moe_embed import checkpoint, saving, sharding
from moe_embed import config as config_lib
from moe_embed.config import UserError
from tests.test_checkpoint import abstract, assert_same, small_state


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.Mesh(data=4, expert=2))


def saver(folder, said, *, keep=2):
    return saving.Saver(folder, facts={"seed": 0}, keep=keep, say=said.append)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_is_saved_is_the_state_as_it_was_when_donated_at_once(tmp_path, devices, monkeypatch):
    """The write is held until the step after has overwritten the donated state."""
    go, digests = threading.Event(), checkpoint.digests
    monkeypatch.setattr(checkpoint, "digests", lambda path: go.wait(60) and digests(path))
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:devices])
    state, said = small_state(10, mesh), []
    expected = jax.tree.map(np.array, state)
    with saver(tmp_path, said) as saving_it:
        saving_it.save(state)
        for _ in range(3):
            state = advance(state)
        jax.block_until_ready(state)
        assert not checkpoint.steps(tmp_path)  # it does not count yet
        go.set()
    assert said == []
    assert checkpoint.newest_verified(tmp_path, say=print, strict=True) == 10
    restored = checkpoint.restore(tmp_path, 10, abstract_state=abstract(state))
    assert_same(restored, expected)
    with pytest.raises(AssertionError):
        assert_same(restored, state)


def test_one_at_a_time_and_the_newest_are_kept(tmp_path, mesh):
    (tmp_path / "7.saving").mkdir()
    with saver(tmp_path, []) as saves:
        assert not (tmp_path / "7.saving").exists()
        for step in (1, 2, 3, 4):
            saves.save(small_state(step, mesh))
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert checkpoint.facts(tmp_path, 4) == {"seed": 0}


@pytest.fixture
def full(monkeypatch):
    """A disk that is full for the next `full.times` saves, noticed late: when the bytes are written out."""
    plain = checkpoint._write_manifest

    class Full:
        times = 0

    def write(path, manifest):
        if Full.times:
            Full.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, manifest)

    monkeypatch.setattr(checkpoint, "_write_manifest", write)
    monkeypatch.setattr(saving, "PAUSE", 0.0)
    monkeypatch.setattr(saving, "PAUSE_AT_END", 0.0)
    return Full


def test_a_failed_save_is_said_tried_again_and_leaves_what_was_there(tmp_path, mesh, full):
    said = []
    with saver(tmp_path, said, keep=1) as saves:
        saves.save_now(small_state(1, mesh))
        full.times = 1
        saves.save(small_state(2, mesh))
        saves._thread.join()
        assert said == [
            "warning: the save of step 2 failed: OSError: [Errno 28] No space left on device; training goes on, and it is "
            "tried again."
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert saves.wants_again()
        saves.save(small_state(3, mesh))
        assert not saves.wants_again()
    assert checkpoint.steps(tmp_path) == [3]
    assert len(said) == 1


def test_after_so_many_failures_the_run_ends(tmp_path, mesh, full):
    said = []
    full.times = saving.TRIES
    with saver(tmp_path, said) as saves, pytest.raises(UserError, match=r"5 saves in a row failed.*No space left"):
        saves.save_now(small_state(1, mesh))
    assert len(said) == saving.TRIES
    full.times = saving.TRIES - 1
    with saver(tmp_path, said) as saves:
        saves.save_now(small_state(1, mesh))
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_a_save_in_flight_is_finished_however_the_run_ends(tmp_path, mesh, error, monkeypatch):
    slow, digests = threading.Event(), checkpoint.digests
    monkeypatch.setattr(checkpoint, "digests", lambda path: slow.wait(0.5) or digests(path))

    def run():
        with saver(tmp_path, []) as saves:
            saves.save(small_state(1, mesh))
            assert not checkpoint.steps(tmp_path)
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert checkpoint.newest_verified(tmp_path, say=print, strict=True) == 1

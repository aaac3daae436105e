"""Faults 5, 6 and 7: checkpoints with flipped bits, cut, emptied, foreign; and states that go on on another mesh."""

import random
import shutil
import time

import jax
import numpy as np
import pytest

from moe_embed import checkpoint, program, sharding, train
from moe_embed import config as config_lib
from moe_embed.config import UserError
from tests import tiny
from tests.faults import runs

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def config(pairs):
    """A run of 8 steps over eight devices, four by data and two by expert."""
    overrides = runs.flags(pairs, "run.steps=8", "run.save_every=4", "mesh.data=4", "mesh.expert=2")[1:]
    return config_lib.load("configs/demo.py:tiny", overrides)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "w"
    assert train.train(config, workdir=workdir) == 0
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "w")


def classes(step):
    """The files of a step by what they are: data, Orbax's metadata, its index, our manifest."""
    found = {}
    for path in sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size):
        kind = "/".join(part for part in path.relative_to(step).parts[:-1]), path.suffix, len(path.name)
        found.setdefault(kind, []).append(path)
    return list(found.values())


def test_any_flipped_bit_is_noticed_and_the_step_before_is_taken(workdir):
    """Twenty seeds, other ones each time, over all kinds of files."""
    folder = workdir / "checkpoints"
    kinds = classes(folder / "8")
    assert len(kinds) > 5
    assert any(path.name == checkpoint.MANIFEST for kind in kinds for path in kind)
    start = time.time_ns()
    for seed in range(start, start + 20):
        rng, said = random.Random(seed), []
        path = rng.choice(kinds[seed % len(kinds)])
        good = path.read_bytes()
        place, bit = rng.randrange(len(good)), 1 << rng.randrange(8)
        path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
        assert checkpoint.newest_verified(folder, say=said.append) == 4, (seed, path, place, bit)
        assert said == [f"checkpoint 8 is passed over: digest mismatch in {path}."]
        with pytest.raises(UserError, match="checkpoint 8 does not verify: digest mismatch"):
            checkpoint.newest_verified(folder, say=print, strict=True)
        path.write_bytes(good)
    assert checkpoint.newest_verified(folder, say=print, strict=True) == 8


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "cut": lambda step: largest(step).write_bytes(largest(step).read_bytes()[:-1]),
    "emptied": lambda step: largest(step).write_bytes(b""),
    "missing": lambda step: largest(step).unlink(),
    "half deleted": lambda step: shutil.rmtree(step / "training"),
    "no manifest": lambda step: (step / checkpoint.MANIFEST).unlink(),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "foreign": lambda step: (shutil.rmtree(step), step.mkdir(), (step / "model.bin").write_bytes(b"abc")),
    "garbage": lambda step: (step / checkpoint.MANIFEST).write_text("{{{"),
    "a copy": lambda step: (shutil.rmtree(step), shutil.copytree(step.parent / "4", step)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_run_goes_back_or_says_why_not(kind, config, workdir, capsys, monkeypatch):
    folder = workdir / "checkpoints"
    (folder / "notastep").mkdir()
    DAMAGES[kind](folder / "8")
    with pytest.raises(UserError, match="checkpoint 8 does not verify"):
        train.train(config, workdir=workdir, strict_restore=True)
    with monkeypatch.context() as m:  # where it goes on from, not the steps: those are test_preempted's
        m.setattr(train, "compile_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config, workdir=workdir)
    said = capsys.readouterr().out
    assert "checkpoint 8 is passed over: " in said
    assert "from step 4 of 8" in said
    shutil.rmtree(folder / "4")
    if kind == "a copy":
        shutil.copytree(folder / "8", folder / "4")  # it is what it says under its own name
        shutil.rmtree(folder / "8")
        assert checkpoint.newest_verified(folder, say=print) == 4
    else:
        with pytest.raises(UserError, match="has 1 checkpoints and none verifies"):
            train.train(config, workdir=workdir)


def test_starting_over_is_said(config, workdir, capsys, monkeypatch):
    shutil.rmtree(workdir / "checkpoints")
    monkeypatch.setattr(train, "compile_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(config, workdir=workdir)
    assert f"starting over in {workdir}: it has rows up to step 7, and no checkpoint." in capsys.readouterr().out


def state_on(data, expert, folder, c):
    mesh = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert), devices=jax.devices()[: data * expert])
    prog = program.build(c, mesh)
    return prog, mesh, checkpoint.restore(folder, 1, abstract_state=prog.abstract_state)


def test_a_state_goes_on_on_any_mesh(tmp_path, eight_devices):
    """Saved on 4 x 2; on 2 x 2, 1 x 2 and 1 x 1 the same bits, and the next step's loss within 1e-5."""
    c = tiny.config(data={"batch_size": 16}, optim={"warmup_steps": 0})
    mesh = sharding.make_mesh(config_lib.Mesh(data=4, expert=2))
    prog = program.build(c, mesh)
    state, _ = prog.step(
        prog.init(tiny.params(c)), sharding.put_batch(tiny.batches(c, num_shards=8).batch_at(0).arrays, mesh=mesh)
    )
    checkpoint.save(tmp_path, state, facts={}, keep=1)
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]
    losses = []
    for data, expert in ((4, 2), (2, 2), (1, 2), (1, 1)):
        other, mesh, restored = state_on(data, expert, tmp_path, c)
        assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(restored))] == bits
        arrays = sharding.put_batch(tiny.batches(c, num_shards=data * expert).batch_at(1).arrays, mesh=mesh)
        step = tiny.compiled(other.loss_and_gradients, restored["params"], arrays)
        losses.append(float(step(restored["params"], arrays)[0][0]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert abs(losses[0] / float(prog.loss_and_gradients(tiny.params(c), arrays_of(c, prog))[0][0]) - 1) > 1e-4


def arrays_of(c, prog):
    return sharding.put_batch(tiny.batches(c, num_shards=8).batch_at(1).arrays, mesh=prog.mesh)

"""Fault 12: a number that is not finite, on one device of eight. Fault 13: a loss that jumps."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import checkpoint, health, metrics, objectives, program, run_data, sharding, train
from moe_embed import config as config_lib
from moe_embed.config import UserError
from tests import tiny

pytestmark = pytest.mark.faults


@pytest.fixture
def config():
    c = config_lib.load("configs/demo.py:tiny", ["--config.run.save_every=4", "--config.run.steps=8"])
    return dataclasses.replace(c, data=dataclasses.replace(c.data, batch_size=16))


def inject(monkeypatch, batch_at, steps, factor):
    """The loss of these steps is multiplied by `factor` on the one device that has the first document of the batch."""
    plain = objectives.contrastive
    ids = [int(batch_at(step).arrays["document_id_N"][0]) for step in steps]

    def contrastive(params, batch, *, config):
        loss, metrics = plain(params, batch, config=config)
        hit = jnp.isin(batch["document_id_N"], jnp.array(ids)).any()
        return loss * jnp.where(hit, factor, 1.0), metrics

    monkeypatch.setattr(objectives, "contrastive", contrastive)


def bytes_of(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_one_device_of_eight_and_no_parameter_moves(factor, monkeypatch, eight_devices):
    c = tiny.config()
    mesh = sharding.make_mesh(config_lib.Mesh(data=4, expert=2))
    batches = tiny.batches(c, num_shards=8)
    inject(monkeypatch, batches.batch_at, [1], factor)
    prog = program.build(c, mesh)
    put = lambda step: sharding.put_batch(batches.batch_at(step).arrays, mesh=mesh)  # noqa: E731
    state = prog.init(tiny.params(c))
    step = tiny.compiled(prog.step, state, put(0))
    state, good = step(state, put(0))
    before = bytes_of(state["params"])
    state, bad = step(state, put(1))
    assert (float(good["skipped"]), float(bad["skipped"])) == (0.0, 1.0)
    assert not np.isfinite(float(bad["gradient_norm"]))
    assert bytes_of(state["params"]) == before
    assert int(state["step"]) == 2
    moments = jax.device_get(state["optimizer"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moments))
    state, after = step(state, put(2))
    assert float(after["skipped"]) == 0.0
    assert bytes_of(state["params"]) != before
    assert np.isfinite(float(after["loss"]))


def test_skipped_steps_are_named_counted_over_restarts_and_end_the_run(config, tmp_path, monkeypatch, capsys):
    opened = run_data.open_data(config, num_shards=8)[1]
    inject(monkeypatch, opened.batch_at, [2, 3, 6], np.nan)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, max_skips=2))
    with pytest.raises(
        UserError, match=r"step 6 .*3 steps of this run were not finite, more than config.run.max_skips=2"
    ):
        train.train(config, workdir=tmp_path / "w")
    said = capsys.readouterr().out
    assert "warning: the loss of step 2" in said
    rows = metrics.read(tmp_path / "w" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 0, 0, 1]
    assert [bool(np.isfinite(row["gradient_norm"])) for row in rows] == [True, True, False, False, True, True, False]
    skipped = [json.loads(line) for line in (tmp_path / "w" / health.SKIPPED).read_text().splitlines()]
    assert [row["step"] for row in skipped] == [2, 3, 6]
    assert [row["names"] for row in skipped] == [opened.names(step) for step in (2, 3, 6)]
    # Due after a step that was skipped, the checkpoint is written after the next that was not.
    assert checkpoint.steps(tmp_path / "w" / "checkpoints") == [5]
    with pytest.raises(UserError, match="3 steps of this run"):  # the same command again: the two before it still count
        train.train(config, workdir=tmp_path / "w")
    more = dataclasses.replace(config, run=dataclasses.replace(config.run, max_skips=3))
    train.train(more, workdir=tmp_path / "w")
    assert checkpoint.steps(tmp_path / "w" / "checkpoints") == [5, 8]


def test_a_jump_is_warned_of_in_a_run(config, tmp_path, monkeypatch, capsys):
    long = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=24, save_every=24))
    inject(monkeypatch, run_data.open_data(long, num_shards=8)[1].batch_at, [22], 100.0)
    train.train(long, workdir=tmp_path / "w")
    said = capsys.readouterr().out
    assert said.count("standard deviations above") == 1
    assert "warning: the loss of step 22" in said

"""Watching a run: what the trainer does next happens in place of the pause between two looks."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moe_embed import checkpoint, watch
from moe_embed import config as config_lib
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import load, write_description
from moe_embed.model import encoder

FIGURES = {"ndcg@10": 0.5, "recall@10": 0.25, "mrr@10": 0.5, "seconds": 1.0, "tasks": {"t": {"ndcg@10": 0.5}}}


class Trainer:
    """The other process: a workdir of 6 steps, saved every 2; `then` is what it does at each pause."""

    def __init__(self, root, monkeypatch):
        c = config_lib.load("configs/demo.py:tiny")
        self.config = dataclasses.replace(c, run=dataclasses.replace(c.run, steps=6, save_every=2, keep=9))
        self.root, self.folder, self.said, self.then = root, root / "checkpoints", [], []
        self.params = jax.tree.map(np.asarray, encoder.init(c.encoder, c.moe, key=jax.random.key(0)))
        monkeypatch.setattr(watch.time, "sleep", lambda pause: self.then.pop(0)())

    def begin(self):
        self.root.mkdir()
        tokenizer = tokenizer_lib.read(self.config.data.tokenizer)
        write_description(self.root, self.config, tokenizer, prompts={})

    def save(self, step, scale=1.0):
        params = jax.tree.map(lambda x: x * scale, self.params)
        checkpoint.save(self.folder, {"step": step, "params": params}, facts={}, keep=9)

    def delete(self, step):
        shutil.rmtree(self.folder / str(step))

    def checkpoints(self, **keywords):
        return watch.checkpoints(self.root, say=self.said.append, **keywords)

    def watch(self, output, measure=lambda model: FIGURES):
        watch.watch(self.root, output, measure, tasks=["t"], say=self.said.append)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    return Trainer(tmp_path / "run", monkeypatch)


def test_each_step_is_measured_as_it_comes_and_the_last_one_ends_it(trainer):
    trainer.then = [trainer.begin, lambda: trainer.save(2), lambda: (trainer.save(4), trainer.save(6, scale=2.0))]
    found = list(trainer.checkpoints())
    assert [(step, last) for step, last, _ in found] == [(2, 6), (4, 6), (6, 6)]
    assert (trainer.then, len(trainer.said)) == ([], 1)
    assert "waiting for" in trainer.said[0]
    leaves = [jax.tree.leaves(jax.tree.map(np.asarray, model.params)) for _, _, model in found]
    assert all(map(np.array_equal, leaves[0], leaves[1]))
    assert not all(map(np.array_equal, leaves[1], leaves[2]))  # it is the step's own parameters


def test_a_half_written_checkpoint_is_left_alone(trainer):
    trainer.begin()
    trainer.save(6)
    manifest = trainer.folder / "6" / checkpoint.MANIFEST
    text = manifest.read_text()
    manifest.unlink()
    looks = []
    trainer.then = [lambda: looks.append(1), lambda: (looks.append(2), manifest.write_text(text))]
    assert [step for step, _, _ in trainer.checkpoints()] == [6]
    assert looks == [1, 2]
    assert trainer.said == ["not measured, no longer there (run.keep): step 2, 4."]


def test_a_damaged_one_is_named_once_and_measured_when_it_is_written_again(trainer):
    trainer.begin()
    trainer.save(6)
    victim = max((p for p in (trainer.folder / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    trainer.then = [lambda: None, lambda: None, lambda: (trainer.delete(6), trainer.save(6))]
    assert [step for step, _, _ in trainer.checkpoints(done={2, 4})] == [6]
    assert trainer.then == []
    (sentence,) = trainer.said
    assert "checkpoint 6 is passed over: digest mismatch" in sentence


def test_one_that_goes_while_it_is_read_is_said_and_the_rest_goes_on(trainer, monkeypatch):
    trainer.begin()
    trainer.save(2)

    def fails(root, *, step):
        if step == 2:
            trainer.delete(2)
            raise OSError("Orbax misses a file")
        return load(root, step=step)

    monkeypatch.setattr(watch, "load", fails)
    trainer.then = [lambda: trainer.save(4), lambda: (trainer.delete(4), trainer.save(6))]
    assert [step for step, _, _ in trainer.checkpoints()] == [4, 6]
    assert trainer.said == ["not measured, no longer there (run.keep): step 2."]


def test_a_fault_that_is_not_the_files_is_not_hidden(trainer, monkeypatch):
    trainer.begin()
    trainer.save(2)

    def fails(root, *, step):
        raise RuntimeError("no memory")

    monkeypatch.setattr(watch, "load", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        list(trainer.checkpoints())


def test_rows_are_appended_and_a_second_call_goes_on(trainer, tmp_path):
    output = tmp_path / "steps.jsonl"
    trainer.begin()
    trainer.save(2)

    def stop():
        raise KeyboardInterrupt

    trainer.then = [stop]
    with pytest.raises(KeyboardInterrupt):
        trainer.watch(output)
    trainer.save(4)
    trainer.save(6)
    with open(output, "a") as file:
        file.write('{"step": 4, "nd')  # killed while it wrote
    measured = []
    trainer.watch(output, lambda model: measured.append(model.origin) or FIGURES)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [origin.rpartition("(")[2] for origin in measured] == ["step 4)", "step 6)"]
    assert rows[0] == {"step": 2, "workdir": str(trainer.root)} | FIGURES
    assert trainer.said[0] == "step       2 of 6  nDCG@10  50.0  recall@10  25.0  1 s"
    assert "has 1 steps, up to 2" in trainer.said[1]
    trainer.watch(output, measured.append)
    assert len(measured) == 2


def test_a_longer_run_is_watched_for_longer(trainer):
    trainer.begin()
    trainer.save(4)
    longer = dataclasses.replace(trainer.config, run=dataclasses.replace(trainer.config.run, steps=8))

    def lengthen():
        trainer.config = longer
        write_description(trainer.root, longer, tokenizer_lib.read(longer.data.tokenizer), prompts={})

    trainer.then = [lambda: (lengthen(), trainer.save(6)), lambda: trainer.save(8)]
    assert [(step, last) for step, last, _ in trainer.checkpoints(done={2})] == [(4, 6), (6, 8), (8, 8)]


def test_what_cannot_be_watched_is_a_sentence(trainer, tmp_path):
    output = tmp_path / "steps.jsonl"
    trainer.begin()
    for row in ({"step": 2}, {"step": 2, "workdir": str(tmp_path), "tasks": {"t": {}}},
                {"step": 2, "workdir": str(trainer.root), "tasks": {"u": {}}}):  # fmt: skip
        output.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="figures of another workdir or of other tasks"):
            trainer.watch(output)
    description = json.loads((trainer.root / "workdir.json").read_text())
    shape = {name: description["config"][name] for name in ("encoder", "moe")}
    (trainer.root / "workdir.json").write_text(json.dumps({**shape, "head": False, "prompts": {}}))
    with pytest.raises(UserError, match="is a model folder, nothing trains it"):
        list(trainer.checkpoints())

"""A run's numbers: what is not finite is skipped and counted, a jump and a collapse are said once."""

import json
import math

import numpy as np
import pytest

from moe_embed import health
from moe_embed.config import UserError


def row(loss=1.0, *, skipped=0.0, dead=0.0):
    return {
        "loss": loss,
        "gradient_norm": loss,
        "skipped": skipped,
        "dead_expert_frac": dead,
        "expert_utilisation": 0.25,
    }


def look(looking, step, of):
    return looking.look(step, of, source="a.jsonl de", names=lambda step: [f"{step} käse"])


def test_a_skipped_step_is_written_with_its_pairs_and_one_too_many_ends_the_run(tmp_path):
    looking = health.Health(tmp_path, first_step=0, max_skips=2)
    nan = row(math.nan, skipped=1.0)
    assert look(looking, 0, row()) == []
    (said,) = look(looking, 1, nan)
    assert said.startswith("warning: the loss of step 1 is nan and its gradient's norm nan (a.jsonl de): skipped")
    look(looking, 4, nan)
    again = health.Health(tmp_path, first_step=3, max_skips=2)  # resumed from before the second
    assert again.num_skipped == 1
    look(again, 4, nan)
    with pytest.raises(UserError, match=r"loss of step 5 is nan.*3 steps .*max_skips=2"):
        look(again, 5, nan)
    rows = [json.loads(line) for line in (tmp_path / health.SKIPPED).read_text().splitlines()]
    assert [(r["step"], r["names"], r["source"]) for r in rows] == [(s, [f"{s} käse"], "a.jsonl de") for s in (1, 4, 5)]


def test_without_a_workdir_it_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looking = health.Health(None, first_step=0, max_skips=0)
    with pytest.raises(UserError):
        look(looking, 0, row(math.inf, skipped=1.0))
    assert not list(tmp_path.iterdir())


def test_a_jump_of_the_loss_is_said_once():
    looking = health.Health(None, first_step=0, max_skips=0)
    rng = np.random.default_rng(0)
    noise = rng.normal(2.0, 0.1, 3000)
    assert [s for step, loss in enumerate(noise) for s in look(looking, step, row(loss))] == []
    said = [s for step in range(3000, 3010) for s in look(looking, step, row(20.0))]
    assert len(said) == 1
    assert said[0].startswith("warning: the loss of step 3000 is 20, ")
    assert "above the 2" in said[0]


def test_a_falling_loss_and_the_first_steps_are_no_jump():
    looking = health.Health(None, first_step=0, max_skips=0)
    losses = [50.0, 1.0, 40.0, *np.linspace(9, 1, 200)]
    assert [s for step, loss in enumerate(losses) for s in look(looking, step, row(float(loss)))] == []


def test_a_collapsed_router_is_said_when_it_lasts():
    looking = health.Health(None, first_step=0, max_skips=0)
    dead = [0.75] * 19 + [0.0] + [0.75] * 40
    said = [(step, s) for step, d in enumerate(dead) for s in look(looking, step, row(dead=d))]
    assert [step for step, _ in said] == [39]
    assert "the router has collapsed: for 20 steps 75%" in said[0][1]
    dense = {"loss": 1.0, "gradient_norm": 1.0, "skipped": 0.0}
    assert look(looking, 99, dense) == []


def test_the_router_by_hand():
    even, two = np.ones((2, 8)), np.ones((2, 8))
    two[1] = [4, 4, 0, 0, 0, 0, 0, 0]
    assert health.of_router(even) == {"dead_expert_frac": 0.0, "expert_utilisation": pytest.approx(1.0)}
    assert health.of_router(two) == {"dead_expert_frac": 0.75, "expert_utilisation": pytest.approx(0.25)}


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    looking = health.Health(tmp_path, first_step=0, max_skips=2)
    monkeypatch.setattr(health.metrics, "append", full)
    (said,) = look(looking, 1, row(math.nan, skipped=1.0))
    assert said.endswith("skipped.jsonl cannot be written (No space left on device): it has no line of this step.")
    assert looking.num_skipped == 1

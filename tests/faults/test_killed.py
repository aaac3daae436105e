"""Faults 3 and 14: kill -9, of a single process in the midst of its saves, and of one of two."""

import random
import time

import pytest

from moe_embed import checkpoint
from tests.faults import runs

pytestmark = pytest.mark.faults


def test_killed_at_random_times_it_ends_with_the_same_weights(long_flags, undisturbed, tmp_path):
    """Saves follow each other closely: most kills meet one. No step that verified is lost, and none is made up."""
    workdir, rng, verified = tmp_path / "w", random.Random(time.time_ns()), 0
    for _ in range(5):
        running = runs.start(workdir, long_flags)
        runs.wait_for_step(workdir, verified + 12, running)  # the save at 10 more has begun: the one at 5 more counts
        time.sleep(rng.uniform(0, 0.4))
        running.kill()
        running.wait()
        found = runs.newest(workdir)
        assert found >= verified + 5
        assert found <= runs.rows(workdir)[-1]["step"] + 1
        verified = found
        if verified > 70:
            break
    assert runs.to_the_end(workdir, long_flags) == 0
    assert f"continuing {workdir} from step {verified} of 100" in runs.said(workdir)
    assert runs.digest(workdir) == runs.digest(undisturbed)
    assert runs.numbers(workdir) == runs.numbers(undisturbed)
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    assert checkpoint.steps(workdir / "checkpoints") == [95, 100]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_killed_ends_the_other(endless_flags, tmp_path, victim):
    """Within what the run allows for a step: jax's own heartbeat would take 100 s to miss process 1."""
    workdir, limit = tmp_path / "w", 12
    flags = [*endless_flags, f"--config.run.watchdog={limit}"]
    both = runs.start_two(workdir, flags)
    runs.wait_for_step(workdir, 12, *both)  # the save at 10 has begun: the one at 5 counts
    both[victim].kill()
    both[victim].wait()
    other = 1 - victim
    start = time.monotonic()
    assert both[other].wait(timeout=100) not in (0, 2)
    assert time.monotonic() - start < limit + 25
    verified = runs.newest(workdir)
    assert verified >= 5
    both = runs.start_two(workdir, [*flags, f"--config.run.steps={verified + 6}"])
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert [row["step"] for row in runs.rows(workdir)] == list(range(verified + 6))

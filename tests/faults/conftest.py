"""Runs that the tests of faults share."""

import gzip
import itertools

import pytest

from tests.faults import runs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with gzip.open(runs.ROOT / "moe_embed/sample/pairs/crosslingual.jsonl.gz", "rt") as file:
        path.write_text("".join(itertools.islice(file, 200)))
    return path


@pytest.fixture(scope="session")
def long_flags(pairs):
    """Steps and saves enough that a signal or a kill meets the run somewhere inside."""
    return runs.flags(pairs, "run.steps=100", "run.save_every=5")


@pytest.fixture(scope="session")
def endless_flags(pairs):
    """A run that can be told to end later: its learning rate does not depend on its length."""
    return runs.flags(pairs, "run.steps=2000", "run.save_every=5", "optim.schedule=constant")


@pytest.fixture(scope="session")
def undisturbed(long_flags, tmp_path_factory):
    """The same run, left alone, as one process."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    assert runs.to_the_end(workdir, long_flags) == 0, runs.said(workdir)
    return workdir

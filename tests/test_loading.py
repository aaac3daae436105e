"""Batches made ahead: in order, the same from a thread and from processes, and how long they were waited for."""

import multiprocessing

import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import prepare, run_data
from moe_embed.data import loading

SAMPLE = "moe_embed/sample/pairs/titles.jsonl.gz"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "data"
    prepare.main([f"--input={SAMPLE}", f"--output={folder}", "--processes=1"])
    return folder


def batches(source, **options):
    overrides = [
        f"--config.data.sources={source}",
        "--config.data.batch_size=64",
        "--config.data.weights=()",
        "--config.data.dev=()",
    ]
    config = config_lib.load("configs/demo.py:tiny", [*overrides, "--config.run.steps=9", "--config.run.eval_every=0"])
    return run_data.open_data(config, num_shards=2, **options)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(prepared, workers):
    rows_of = []

    def agree(step: int, rows: int) -> int:
        rows_of.append((step, rows))
        return rows

    made = batches(prepared, agree=agree)
    expected = [made.batch_at(step) for step in range(3, 9)]
    asked = list(rows_of)
    rows_of.clear()
    found = list(loading.iterate(made, 3, 9, workers=workers))
    assert rows_of == asked  # in order, by the process that can ask the others
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.source == other.source
        assert one.arrays.keys() == other.arrays.keys()
        assert all(np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items())
        assert one.counts == other.counts | {"waited": one.counts["waited"]}
        assert one.counts["waited"] >= 0
    assert not np.array_equal(found[0].arrays["document_id_N"], expected[1].arrays["document_id_N"])
    assert not list(loading.iterate(made, 9, 9, workers=workers))


def test_a_fault_of_a_batch_is_the_callers(prepared):
    made = batches(prepared)
    made.batch_at = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(loading.iterate(made, 0, 9))


def test_killed_processes_cost_no_batch(prepared, capfd):
    """As by SIGTERM to the whole group of the run, which still has steps to make until all processes stop at one."""
    made = batches(prepared)
    expected = [made.batch_at(step) for step in range(9)]
    found = []
    for batch in loading.iterate(made, 0, 9, workers=1):
        found.append(batch)
        for child in multiprocessing.active_children():
            child.terminate()
    assert len(found) == 9
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(array, other.arrays[name]) for name, array in one.arrays.items())
    assert capfd.readouterr().err.count("the loader's processes were killed") == 1

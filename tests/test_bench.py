"""The benchmark's pieces at toy size, so that they do not rot. What they measure is not looked at; what needs torch is in parity/."""

import dataclasses
import json
import mmap
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import hf_layout
from moe_embed.infonce import Ids, infonce
from moe_embed.ring_infonce import ring_infonce
from tests import hf_tiny
from tests.bench import ablations, devices, inference, losses, ratios, workloads

SIZE = workloads.QUICK


def test_sides_take_turns_and_the_ratio_is_of_neighbours(monkeypatch):
    monkeypatch.setattr(ratios, "PAUSE", 0)
    called = []
    sides = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = ratios.interleaved(sides, rounds=4)
    assert "".join(called) == "abcbcacababc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert ratios.ratio([2, 30, 4], [1, 10, 4]) == 2  # not 4 / 4, of the medians


def test_the_table_has_a_date_a_machine_and_a_line_for_each_row():
    facts = ratios.machine("jax 1")
    assert facts["versions"] == "jax 1"
    assert facts["processor"].endswith(f"{ratios.threads()} threads for every side")
    row = ratios.Row("encode", "torch", 10.0, 25.0, "texts/s", 2.5, "at least 1.2x")
    lines = ratios.table([row], facts=facts, notes=["a note"]).splitlines()
    assert lines[0].startswith("# CPU, 2")
    assert "| encode | torch | 10 | 25 | texts/s | 2.50 | at least 1.2x |" in lines
    assert lines[-1] == "- a note"


def test_a_batch_holds_what_the_peers_are_given():
    (rows, length), pairs = SIZE.mix_rows, workloads.distinct(workloads.shipped_pairs("titles"), SIZE.mix_pairs)
    c = workloads.train_config(SIZE, pairs=SIZE.mix_pairs, rows=rows, row_length=length, texts_per_row=64)
    arrays, queries, documents = workloads.make_batch(c, pairs)
    assert len(queries) == len(documents) == SIZE.mix_pairs
    assert sum(map(len, queries + documents)) == (arrays["segments_MBL"] > 0).sum()
    assert all(text[0] == 0 and text[-1] == 2 for text in queries + documents)  # <s> and </s>
    assert sorted(set(arrays["document_id_N"])) == sorted(arrays["document_id_N"])
    assert sorted(set(arrays["query_id_N"])) == sorted(arrays["query_id_N"])


def test_full_length_is_full():
    c = workloads.train_config(SIZE, pairs=SIZE.full_pairs, rows=8, row_length=SIZE.length, texts_per_row=1)
    arrays, queries, documents = workloads.make_batch(c, workloads.long_pairs(SIZE))
    assert {len(text) for text in queries + documents} == {SIZE.length}
    assert arrays["segments_MBL"].min() == 1


def test_the_plain_loss_is_ours():
    rng = np.random.default_rng(0)
    query, document = (rng.normal(size=(16, 12)).astype(np.float32) for _ in range(2))
    ids = Ids(*(jnp.arange(16, dtype=jnp.int32) for _ in range(2)))
    found = [losses.compiled(form, 16, dim=12)(query, document, ids) for form in (losses.plain, infonce, ring_infonce)]
    for (loss, _), gradients in found[1:]:
        np.testing.assert_allclose(loss, found[0][0][0], rtol=1e-6)
        for a, b in zip(gradients, found[0][1], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    other = losses.compiled(losses.plain, 16, dim=12)(query, document[::-1], ids)
    assert abs(other[0][0] - found[0][0][0]) > 1e-2


def test_the_measure_of_memory_sees_the_scores():
    """The plain loss holds N x C numbers, several times."""
    sizes = [losses.temporary(losses.compiled(losses.plain, size, dim=12)) for size in (128, 256)]
    assert sizes[0] >= 4 * 128 * 128
    assert 3 < sizes[1] / sizes[0] < 5


def test_the_losses_are_measured(monkeypatch):
    monkeypatch.setattr(ratios, "PAUSE", 0)
    plain = lambda q, d: lambda: float(infonce(q, d, Ids(jnp.arange(64), jnp.arange(64)), c=config_lib.Loss())[0])  # noqa: E731
    rows, notes = losses.measure((32, 64), dim=24, rounds=1, torch_loss=plain)
    assert len(rows) == 2 * 2 + 4 + 2
    assert len(notes) == 2
    with pytest.raises(SystemExit, match="the losses differ"):
        losses.measure((32, 64), dim=24, rounds=1, torch_loss=lambda q, d: lambda: 0.0)


def test_devices_are_compared(tmp_path):
    hf_tiny.write_folder(tmp_path / "model", hf_tiny.BERT, hf_tiny.DENSE)
    found = devices.differences(str(tmp_path / "model"), ["one text", "another, longer text"], counts=(1, 2))
    assert set(found) == {"the same rows", "encode"}
    for counts in found.values():
        assert counts["1"] == {"difference": 0.0, "identical": 1.0}
        assert counts["2"]["difference"] < 1e-5


def test_dense_models_have_the_mixtures_parameters():
    total, active = hf_layout.num_parameters(inference.FULL, inference.MIXTURE)
    assert (total, active) == (475_292_928, 305_423_616)
    shapes = inference.models(inference.size_of(quick=False, layers=12, texts=2, rounds=1))
    count = lambda c: hf_layout.num_parameters(c, inference.DENSE)[0]  # noqa: E731
    for name, expected in (("active", active), ("total", total)):
        c, _ = shapes[f"dense, equal {name}"]
        assert count(c) == pytest.approx(expected, rel=1e-3)
        wider = dataclasses.replace(c, ffn_dim=c.ffn_dim + 64)
        assert count(wider) != pytest.approx(expected, rel=1e-3)


def test_resident_memory_is_seen():
    before, size = ratios.resident(), 2**26
    with mmap.mmap(-1, size) as held:  # new pages: an array may stand in memory that was freed, and still counts
        for page in range(0, size, mmap.PAGESIZE):  # no second copy, which malloc may keep
            held[page] = 1
        assert 0.9 * size < ratios.resident() - before < 1.5 * size


@pytest.mark.bench
def test_the_benchmark_of_inference_runs_at_toy_size():
    command = [sys.executable, "-m", "tests.bench.inference", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| one query, median |") == 4
    assert "One query meets" in done.stdout


@pytest.mark.bench
def test_the_whole_benchmark_runs_at_toy_size(tmp_path):
    path = tmp_path / "bench.md"
    command = [sys.executable, "-m", "tests.bench.cpu", "--quick", f"--output={path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "training, shipped lengths" in path.read_text("utf-8")
    assert path.read_text("utf-8") in done.stdout


def test_ablations_know_of_seeds_and_queries(tmp_path):
    """A gain is the mean's; seeds that disagree widen its interval, though queries do not."""
    rng = np.random.default_rng(0)
    base = [[rng.random(400), rng.random(300)] for _ in range(3)]
    for name, seeds in (
        ("a", base),
        ("b", [[task + 0.1 for task in tasks] for tasks in base]),
        ("c", [[task + shift for task in tasks] for tasks, shift in zip(base, (-0.5, 0.0, 0.8), strict=True)]),
    ):
        for i, tasks in enumerate(seeds):
            queries = {
                f"t{t}": {"ndcg@10": 0.0, "recall@10": 0.0, "queries": dict(enumerate(map(float, v)))}
                for t, v in enumerate(tasks)
            }
            (tmp_path / f"{name}-seed{i}.json").write_text(json.dumps({"moe_embed": queries}))
    found = ablations.read(tmp_path)
    assert {name: len(seeds) for name, seeds in found.items()} == {"a": 3, "b": 3, "c": 3}
    gain, low, high = ablations.difference(found["b"], found["a"])
    assert gain == pytest.approx(0.1, abs=1e-9)
    assert 0.05 < low < 0.1 < high < 0.15
    gain, low, high = ablations.difference(found["c"], found["a"])
    assert gain == pytest.approx(0.1, abs=1e-9)
    assert low < -0.2 < 0.4 < high
    text = ablations.table(found, against="a")
    assert "| `b` |" in text
    assert "+10.0 |" in text

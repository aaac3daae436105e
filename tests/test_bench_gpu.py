"""The measurements of tests/bench/gpu.py at toy size on this CPU: they run, count what they should, and make a table."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from tests.bench import gpu, gpu_parts


def part(name: str) -> list[dict]:
    one_step = dataclasses.replace(gpu_parts.TOY, steps=gpu_parts.TOY.steps[1:])  # each is a compilation
    rows = gpu.run_part(name, deadline=time.monotonic() + 100, peak=1e12, sizes=one_step)["rows"]
    assert json.loads(json.dumps(rows)) == rows
    return rows


def test_the_model_s_flops_are_those_of_the_research():
    """231.3 MFLOP a token at 128 tokens, counted by hand from the shapes; 174.6 for the dense encoder."""
    c = gpu_parts.configuration(gpu_parts.FULL)
    assert gpu_parts.flops_per_token(c.encoder, c.moe, length=128) == pytest.approx(231.3e6, rel=1e-3)
    dense = config_lib.Moe(num_experts=0)
    assert gpu_parts.flops_per_token(c.encoder, dense, length=128) == pytest.approx(174.6e6, rel=1e-2)
    assert gpu_parts.flops_per_token(c.encoder, c.moe, length=512) > 240e6


def test_a_full_batch_has_no_padding_and_every_text_its_slot():
    c = gpu_parts.configuration(gpu_parts.TOY, "--config.data.batch_size=8", "--config.data.rows=2",
                                "--config.data.texts_per_row=4")  # fmt: skip
    batch = gpu_parts.full_batch(c, text_length=16)
    assert batch["tokens_MBL"].shape == (2, 2, 64)
    assert (batch["segments_MBL"] > 0).all()
    np.testing.assert_array_equal(batch["segments_MBL"][0, 0], np.repeat([1, 2, 3, 4], 16))
    np.testing.assert_array_equal(batch["positions_MBL"][1, 1, :20], [*range(16), *range(4)])
    slots = np.stack([batch["query_slot_N"], batch["document_slot_N"]], axis=1).ravel()
    np.testing.assert_array_equal(slots, np.arange(16))


def test_every_part_runs_and_the_table_holds_its_rows():
    parts = {name: {"versions": {"jax": jax.__version__}, "rows": part(name)} for name in ("layer", "train", "encode")}
    parts["kernels"] = {
        "versions": {},
        "rows": gpu_parts.kernel_rows(gpu_parts.TOY, candidates=gpu_parts.CANDIDATES[:1]),
    }
    parts["torch"] = gpu.fault("torch not installed")
    assert [len(parts[name]["rows"]) for name in gpu.PARTS] == [5, 2, 1, 1, 1]
    for row in parts["train"]["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["gib"] > 0
        assert 0 < row["mfu"] < 1
    assert not any("fault" in row for name in ("kernels", "layer", "train", "encode") for row in parts[name]["rows"])
    text = gpu.report(parts, gpu="a GPU", peak=1e12)
    assert "torch not installed" in text
    for name in gpu.PARTS:
        for row in parts[name]["rows"]:
            assert f"| {row['what']} |" in text
    ratios = text[text.index("## Ratios") :]
    assert ratios.count("not measured") == 3  # those that need torch
    assert "| mixture / dense MLP" in ratios


def test_what_time_does_not_allow_is_said():
    rows = gpu_parts.train_rows(gpu_parts.TOY, deadline=time.monotonic() - 1)
    assert [row["fault"] for row in rows] == ["not run: out of time"] * 2


def test_a_part_that_breaks_is_a_line_and_not_the_end(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert gpu.in_process("layer", seconds=20, peak=None)["rows"][0]["fault"] == "exit code 1: no word"


def test_a_gpu_that_jax_cannot_use_is_said():
    done = gpu.in_process("layer", seconds=60, peak=None)["rows"][0]
    assert done["fault"].startswith(f"exit code 2: error: jax {jax.__version__} sees no GPU")


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    gpu_parts.grouped_matmul_is_right()
    right = gpu_parts.gm.grouped_matmul
    monkeypatch.setattr(gpu_parts.gm, "grouped_matmul", lambda x, w, tile_expert, n: right(x, w, tile_expert[::-1], n))
    with pytest.raises(AssertionError, match="nothing is timed"):
        gpu_parts.grouped_matmul_is_right()


def test_without_a_gpu_it_is_one_sentence_and_exit_code_2(tmp_path):
    environment = {"PATH": str(tmp_path), "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nvidia-smi finds no GPU here; run this on a machine with one.\n"

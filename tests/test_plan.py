"""The verb: the plan's contract, its sentences, and what it suggests. Compiled plans: tests/aot."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from moe_embed import ahead, estimate, hlo_count, plan, topology
from moe_embed import config as config_lib

GIB = 2**30
PAPER = "configs/nomic_v2/pretrain.py:paper"


def paper(*overrides: str) -> config_lib.Config:
    """The paper's preset in 32 rows of 512, whatever it cuts them to now."""
    return config_lib.load(PAPER, ["--config.data.row_length=512", "--config.data.rows=32", *overrides, plan.UNREAD])


def test_a_gpu_host_is_planned_by_arithmetic():
    made = plan.plan(paper(), topology.find("8xH100"))
    assert made["parameters"] == {"total": 475_292_928, "active": 305_423_616}
    assert made["flops"]["model"] == pytest.approx(3.862e14, rel=1e-3)
    assert made["flops"]["compiled"] is None
    assert made["hbm"]["peak"] == sum(made["hbm"]["bars"].values())
    assert made["hbm"]["limit"] == topology.find("8xH100").chip.hbm
    assert made["collectives"]["total"] == pytest.approx(3.42e9, rel=0.01)
    assert made["collectives_source"] == "arithmetic"
    assert 0 < made["step_seconds"]["low"] < made["step_seconds"]["high"]
    assert made["recipe"]["chip_hours"]["low"] == pytest.approx(made["step_seconds"]["low"] * 97_656 / 3600 * 8)
    assert made["fits"] is True
    assert made["verdict"].startswith("fits: ")
    assert any("nothing is compiled for h100" in note for note in made["notes"])
    assert json.loads(json.dumps(made)) == made


def test_more_tokens_are_more_of_everything_but_parameters():
    short, long = (plan.plan(paper(), topology.find("8xH100"), tokens_a_pair=n) for n in (64, 128))
    assert long["step"]["micro_batches"] == 2 * short["step"]["micro_batches"]
    assert long["flops"]["model"] == pytest.approx(2 * short["flops"]["model"], rel=0.01)
    assert long["hbm"]["bars"]["parameters"] == short["hbm"]["bars"]["parameters"]


def test_lines_for_a_person_fit_a_hundred_columns():
    for spec, name in (("paper", "8xH100"), ("paper", "h100-16")):
        c = config_lib.load(f"configs/nomic_v2/pretrain.py:{spec}", [plan.UNREAD])
        lines = plan.lines(
            plan.plan(c, topology.find(name)), title=" ".join([spec, *["--config.data.rows=16"] * 9, name])
        )
        assert max(map(len, lines)) <= 100, max(lines, key=len)
        assert "nothing was run" in lines[-1]
    masked = config_lib.load("configs/nomic_v2/mlm.py:paper", [plan.UNREAD])
    lines = plan.lines(plan.plan(masked, topology.find("8xH100")), title="mlm")
    assert max(map(len, lines)) <= 100
    assert not any(line.startswith("loss ") for line in lines)


def works(*kernels, unknown=()) -> hlo_count.Count:
    return hlo_count.Count((), (hlo_count.Work("all-gather", "", 2.0, bytes=50.0),), kernels, unknown, ())


def test_what_xla_took_and_what_it_refused():
    parts = {"parameters": 2.0 * GIB, "activations": 5.0 * GIB, "loss": 1.0 * GIB}
    taken = ahead.Compiled(1.0, 2 * GIB, 7 * GIB, 2 * GIB, 2 * GIB, 8 * GIB, works(), "")
    found = plan.memory_of(taken, parts, limit=16.0 * GIB)
    assert (found["peak"], found["source"]) == (8 * GIB, "compiled")
    assert found["bars"] == parts | {"activations": 5.0 * GIB}  # what the others do not explain
    assert found["xla"]["temporaries"] == 7 * GIB
    refused = plan.memory_of(ahead.Refused(1.0, 20.0 * GIB, 15.75 * GIB), parts, limit=16.0 * GIB)
    assert (refused["peak"], refused["limit"]) == (20 * GIB, 15.75 * GIB)
    assert refused["bars"]["activations"] == 17 * GIB


def test_kernels_that_nobody_can_count_are_said():
    known = hlo_count.Work("gmm", "f/gmm", 3.0, flops=10.0)
    other = hlo_count.Work("mystery", "f/mystery", 4.0)
    count = works(known, known, unknown=(other,))
    assert plan.custom_calls(count) == {"gmm": {"calls": 6.0, "flops": 60.0}, "mystery": {"calls": 4.0, "flops": None}}
    notes = plan.notes_of(ahead.Compiled(1.0, 1, 1, 1, 1, 1, count, ""))
    assert notes == ["NOT COUNTED: the custom call mystery (f/mystery), 4 times a step"]
    assert "refuses" in plan.notes_of(ahead.Refused(1.0, 2.0, 1.0))[0]
    assert plan.notes_of(ahead.Compiled(1.0, 1, 1, 1, 1, 1, None, "unreadable")) == ["unreadable"]


@pytest.mark.parametrize(
    ("overrides", "activations", "other", "words"),
    [
        ((), 12, 6, "--config.data.rows=16, 64 micro-batches"),
        ((), 18, 6, "--config.data.rows=8, 128 micro-batches"),
        ((), 5, 16, "--topology=v5e-16 (not computed)"),
        (("--config.run.recompute=false",), 100, 5, "--topology=v5e-16 (not computed)"),
        (("--config.run.recompute=false",), 15, 6, "--config.run.recompute=true"),
        (("--config.data.batch_size=131072", "--config.loss.form=gathered"), 5, 14, "--config.loss.form=ring"),
        (("--config.data.batch_size=131072", "--config.loss.form=ring"), 12, 6, "--config.data.rows=16, 512 micro-batches"),
    ],
)  # fmt: skip
def test_what_would_fit_is_suggested(overrides, activations, other, words):
    c = paper(*overrides)
    step = estimate.step_of(c, num_devices=8, tokens_a_pair=256)
    hbm = {"peak": (activations + other) * GIB, "limit": 16.0 * GIB, "bars": {"activations": activations * GIB}}
    assert plan.remedy(c, step, topology.find("v5e-8"), hbm) == words
    assert plan.verdict(hbm, False, words).startswith(f"does not fit: {activations + other:.1f} of 16.0 GiB; try --")


def test_no_larger_slice_is_said():
    c = paper("--config.data.rows=1")
    step = estimate.step_of(c, num_devices=256, tokens_a_pair=256)
    hbm = {"peak": 30.0 * GIB, "limit": 16.0 * GIB, "bars": {"activations": 1.0 * GIB}}
    assert "no larger slice" in plan.remedy(c, step, topology.find("v5e-256"), hbm)


def test_a_step_that_does_not_fit_a_gpu(monkeypatch):
    small = dataclasses.replace(topology.find("8xH100").chip, hbm=8e9)
    made = plan.plan(paper(), dataclasses.replace(topology.find("8xH100"), chip=small))
    assert made["fits"] is False
    assert re.fullmatch(
        r"does not fit: \d+\.\d of 7\.5 GiB; try --config\.data\.rows=\d+, \d+ micro-batches", made["verdict"]
    )


def test_main_writes_json_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jax.config.update", lambda name, value: None)  # the tests' own choice of platform stays
    output = tmp_path / "plan.json"
    rows = "--config.data.rows=16"
    plan.main([f"--config={PAPER}", "--topology=8xH100", f"--output={output}", "--tokens_per_pair=200", rows])
    made = json.loads(output.read_text())
    assert made["config"] == f"{PAPER} {rows}"
    assert made["step"]["tokens_per_pair"] == 200
    assert {"parameters", "flops", "hbm", "collectives", "step_seconds", "fits"} <= set(made)
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert f"{PAPER} {rows} on 8xH100: fits" in (tmp_path / "plan.svg").read_text()
    said = capsys.readouterr().out
    assert said.startswith(f"plan         {PAPER} {rows} on 8xH100\n")
    assert "verdict      fits" in said
    assert f"wrote {output}" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology=v5e-9",), "--topology=v5e-9 is not known; known: v5e-{1,4,8"),
        (("--topology=8xH100", "--config.data.batch_size=100"), "not divisible by the mesh's 8 devices"),
        (("--topology=8xH100", "--config.mesh.expert=3"), "does not divide the 8 devices"),
        (("--topology=8xH100", "--tokens_per_pair=0"), "--tokens_per_pair=0.0 must be a positive number"),
        (("--topology=8xH100", "--tokens_per_pair=nan"), "--tokens_per_pair=nan must be a positive number"),
        (("--topology=8xH100", "--tokens_per_pair=inf"), "--tokens_per_pair=inf must be a positive number"),
        (("--topology=8xH100", "--output=p.svg"), "--output=p.svg is for JSON; name a .json file"),
        (("--topology=8xH100", "--output=/nowhere/plan.json"), "cannot be written"),
    ],
)
def test_faults_are_sentences(arguments, words):
    with pytest.raises(config_lib.UserError) as error:
        plan.main([f"--config={PAPER}", *arguments])
    assert words in str(error.value)


def test_a_fault_ends_the_verb_with_2_and_no_traceback():
    command = [sys.executable, "-m", "moe_embed.plan", f"--config={PAPER}", "--topology=v5e-9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "is not known" in done.stderr

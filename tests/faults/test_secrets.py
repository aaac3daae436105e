"""Fault 25: what the environment holds for others is in no file of a run and in nothing it says."""

import subprocess
import sys

import pytest

from tests.faults import runs

pytestmark = pytest.mark.faults
SECRET = "s3cr3t-do-not-write"


def test_no_secret_is_written_down(pairs, tmp_path):
    workdir = tmp_path / "w"
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY")
    given = {name: f"{SECRET}-{name}" for name in names}
    running = runs.start(workdir, runs.flags(pairs, "run.steps=2"), env=runs.environ(**given))
    assert running.wait(timeout=240) == 0
    command = [sys.executable, "-m", "moe_embed.export", f"--model={workdir}", f"--output={tmp_path / 'e'}"]
    exported = subprocess.run(
        command, env=runs.environ(**given), cwd=runs.ROOT, capture_output=True, text=True, check=True
    )
    assert SECRET not in exported.stdout + exported.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {"README.md", "workdir.json", "config.json"} <= {path.name for path in files}  # the card among them
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    (tmp_path / "e2").write_text(SECRET)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_signed_address_is_not_written_down(tmp_path):
    names = (f"gs://b/a.jsonl?X-Goog-Signature={SECRET}", f"s3://key:{SECRET}@b/a.jsonl")
    start = ["train", "--config=configs/demo.py:tiny"]
    said = runs.all_refused(
        [[*start, f"--config.data.sources={name}", f"--workdir={tmp_path / 'w'}"] for name in names]
    )
    assert said.count("has credentials in it") == 2
    assert SECRET not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

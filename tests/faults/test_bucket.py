"""Fault 26: a workdir in a bucket, killed, damaged and shared; and a bucket that cannot be."""

import pathlib
import subprocess
import sys
import time

import pytest

from moe_embed import checkpoint
from tests import fake_gcs
from tests.faults import runs

pytestmark = [pytest.mark.faults, pytest.mark.gcs]
WORKDIR = "gs://bucket/runs/w"
CHECKPOINTS = "runs/w/checkpoints/"


@pytest.fixture
def store(monkeypatch):
    with fake_gcs.serve("bucket") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture(scope="module")
def flags(pairs):
    return runs.flags(pairs, "run.steps=40", "run.save_every=5")


@pytest.fixture(scope="module")
def in_a_folder(flags, tmp_path_factory):
    """The same run, left alone, in a folder."""
    workdir = tmp_path_factory.mktemp("folder") / "w"
    assert runs.to_the_end(workdir, flags) == 0, runs.said(workdir)
    return workdir


def copied(store, folder: pathlib.Path) -> pathlib.Path:
    """What gcloud storage cp -r would bring here."""
    with store.lock:
        items = list(store.buckets["bucket"].items())
    for name, item in items:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
    return folder / "runs" / "w"


def test_killed_and_damaged_it_ends_as_a_run_in_a_folder_does(store, flags, in_a_folder, tmp_path):
    """Killed between the saves; then a bit of the newest step is another: the one before is taken, and it is said why."""
    here, until = tmp_path / "w", time.monotonic() + 240
    running = runs.start(here, flags, at=WORKDIR)
    while f"{CHECKPOINTS}15/{checkpoint.MANIFEST}" not in store.buckets["bucket"]:
        assert running.poll() is None, runs.said(here)
        assert time.monotonic() < until
        time.sleep(0.01)
    running.kill()
    running.wait()
    found = copied(store, tmp_path / "killed")
    newest = runs.newest(found)
    assert newest >= 15
    assert [row["step"] for row in runs.rows(found)][:newest] == list(range(newest))  # every row of what is saved
    name = max((n for n in store.buckets["bucket"] if n.startswith(f"{CHECKPOINTS}{newest}/")),
               key=lambda n: len(store.buckets["bucket"][n].data))  # fmt: skip
    data = bytearray(store.buckets["bucket"][name].data)
    data[len(data) // 2] ^= 1
    store.buckets["bucket"][name].data = bytes(data)
    assert runs.start(here, flags, at=WORKDIR).wait(timeout=240) == 0, runs.said(here)
    said = runs.said(here)
    assert f"checkpoint {newest} is passed over: digest mismatch in gs://bucket/{name}" in said
    assert f"continuing {WORKDIR} from step {newest - 5} of 40" in said
    assert runs.start(here, flags, at=WORKDIR).wait(timeout=240) == 0
    assert f"{WORKDIR} is finished: step 40 of 40, verified." in runs.said(here)
    ended = copied(store, tmp_path / "ended")
    assert runs.digest(ended) == runs.digest(in_a_folder)
    assert runs.digest(found) != runs.digest(in_a_folder)
    assert runs.numbers(ended) == runs.numbers(in_a_folder)
    assert checkpoint.steps(ended / "checkpoints") == [35, 40]
    assert {path.name for path in ended.iterdir()} == {path.name for path in in_a_folder.iterdir()}
    token = store.environment["GOOGLE_AUTH_TOKEN_FOR_TESTING"]
    assert token not in said
    assert not [name for name, item in store.buckets["bucket"].items() if token.encode() in item.data]
    report = [sys.executable, "-m", "moe_embed.report"]
    of_copy, of_bucket = (subprocess.run([*report, f"--workdir={where}"], env=runs.environ(), cwd=runs.ROOT, text=True,
                                  capture_output=True, check=True).stdout for where in (ended, WORKDIR))  # fmt: skip
    assert of_bucket.replace(WORKDIR, str(ended)) == of_copy
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name, where in (("copy", ended), ("bucket", WORKDIR)):
        embed = [sys.executable, "-m", "moe_embed.embed", f"--model={where}", f"--input={tmp_path / 'texts.jsonl'}"]
        subprocess.run([*embed, f"--output={tmp_path / name}.npy"], env=runs.environ(), cwd=runs.ROOT, check=True)
    assert (tmp_path / "bucket.npy").read_bytes() == (tmp_path / "copy.npy").read_bytes()


def test_two_processes_share_a_bucket(store, endless_flags, tmp_path):
    """Each writes its part of a step; the same command with more steps goes on from the last one."""
    for steps in (5, 8):
        both = runs.start_two(tmp_path / "w", [*endless_flags, f"--config.run.steps={steps}"], at=WORKDIR)
        said = [process.wait(timeout=240) for process in both]
        assert said == [0, 0], runs.said(tmp_path / "w", ".p0")
    assert f"continuing {WORKDIR} from step 5 of 8" in runs.said(tmp_path / "w", ".p0")
    ended = copied(store, tmp_path / "ended")
    assert runs.newest(ended) == 8
    assert [row["step"] for row in runs.rows(ended)] == list(range(8))
    (of_the_second, *_) = [path for path in ended.glob("checkpoints/8/**/ocdbt.process_1/**/*") if path.is_file()]
    of_the_second.write_bytes(of_the_second.read_bytes()[:-1] + b"?")
    assert checkpoint.problem(ended / "checkpoints", 8).startswith("digest mismatch in ")


def refused(flags, workdir: str) -> str:
    """The one sentence of a run that is refused before anything is compiled."""
    command = [sys.executable, *runs.MODULE, *flags, f"--workdir={workdir}"]
    done = subprocess.run(command, env=runs.environ(), cwd=runs.ROOT, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert "compiling" not in done.stdout
    return sentence


def test_a_bucket_that_cannot_be_is_a_sentence(store, flags):
    said = refused(flags, "gs://no-such-bucket/w")
    assert said == "error: --workdir=gs://no-such-bucket/w cannot be written: there is no bucket no-such-bucket."
    store.refuse = lambda method, name: 403 if method == "POST" else 0
    said = refused(flags, WORKDIR)
    assert said.startswith(f"error: --workdir={WORKDIR} cannot be written: refused by the test; gcloud auth")
    store.refuse = lambda method, name: 401
    assert refused(flags, WORKDIR).startswith(f"error: --workdir={WORKDIR} cannot be written: ")
    assert store.buckets["bucket"] == {}

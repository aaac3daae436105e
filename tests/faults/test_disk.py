"""Faults 17 and 18: a disk that fills up, and a workdir that cannot be."""

import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import pytest

from moe_embed import checkpoint
from tests.faults import runs

pytestmark = pytest.mark.faults
# From the third save on no file may grow beyond 512 KiB, for so many saves.
FILLS = """
import os, resource
from moe_embed import checkpoint, saving, train, verb
saving.PAUSE = saving.PAUSE_AT_END = 0.0
begun, prepare = [], checkpoint.prepare
def preparing(folder, step):
    begun.append(step)
    full = 3 <= len(begun) < 3 + int(os.environ["FAILURES"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (524288 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # above what Orbax says of its failures
    return prepare(folder, step)
checkpoint.prepare = preparing
verb.run(train.main, copies=True)
"""


@pytest.mark.parametrize(("failures", "status"), [(2, 0), (99, 2)])
def test_a_disk_that_fills_up(endless_flags, tmp_path, failures, status):
    """Training goes on, what was saved stays, the save is tried again; and not for ever."""
    (tmp_path / "fills.py").write_text(FILLS)
    workdir = tmp_path / "w"
    flags = [*endless_flags, "--config.run.steps=40"]
    running = runs.start(workdir, flags, program=(tmp_path / "fills.py",), env=runs.environ(FAILURES=str(failures)))
    assert running.wait(timeout=240) == status, runs.said(workdir)
    said = runs.said(workdir)
    assert "warning: the save of step 15 failed: " in said
    steps = checkpoint.steps(workdir / "checkpoints")
    assert not [step for step in steps if checkpoint.problem(workdir / "checkpoints", step)]
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    if status:  # what gives up may leave the folder of its last try behind: no step, and gone at the next start
        assert all(checkpoint.STRAY.fullmatch(name) for name in names)
        assert steps == [5, 10]
        assert "error: 5 saves in a row failed, the last one with: " in said
    else:
        assert all(name.isdigit() for name in names)
        assert steps == [35, 40]
        assert said.count("warning: the save of") == 2
        assert len(runs.rows(workdir)) == 40


def tiny_limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


KINDS = (
    "a file",
    "below a file",
    "read-only",
    "a full disk",
    "no room for a checkpoint",
    "an object store",
    "no gcsfs",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_workdir_that_cannot_be_is_a_sentence_before_anything_runs(kind, pairs, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "w",
        "read-only": pathlib.Path("/proc/w"),  # not even root's
        "an object store": "s3://bucket/w",
        "no gcsfs": "gs://bucket/w",
    }
    options, program = {}, runs.MODULE
    if kind == "a full disk":
        options["preexec_fn"] = tiny_limit
    if kind == "no room for a checkpoint":
        program = (tmp_path / "full.py",)
        program[0].write_text(
            "import shutil, types\nfrom moe_embed import train, verb\n"
            "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)\nverb.run(train.main, copies=True)\n"
        )
    if kind == "no gcsfs":
        program = (tmp_path / "without.py",)
        program[0].write_text(
            "import sys\nsys.modules['gcsfs'] = None\nfrom moe_embed import train, verb\nverb.run(train.main, copies=True)\n"
        )
    where = workdir[kind] if kind in workdir else tmp_path / "w"
    command = [sys.executable, *map(str, program), *runs.flags(pairs), f"--workdir={where}"]
    done = subprocess.run(command, env=runs.environ(), cwd=runs.ROOT, capture_output=True, text=True, timeout=120,
                          check=False, **options)  # fmt: skip
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"error: --workdir={where} ") or (kind == "a file" and str(where) in sentence)
    assert "compiling" not in done.stdout
    assert not list(tmp_path.rglob("checkpoints/*"))


NOBODY = """
import os, pathlib, sys
from moe_embed import same_run, verb
if not os.getuid():
    os.setuid(65534)
verb.run(lambda argv: same_run.check_workdir(None, pathlib.Path(argv[0])), copies=True)
"""


def test_a_folder_of_somebody_else_is_a_sentence_too():
    """As a user who may not write there: the tests may run as root, who may."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders let nobody else in
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", NOBODY, f"{folder}/w"]
        done = subprocess.run(command, env=runs.environ(), cwd=runs.ROOT, capture_output=True, text=True, timeout=120,
                              check=False)  # fmt: skip
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: --workdir={folder}/w cannot be written: Permission denied.\n"
        os.chmod(folder, 0o755)

"""Two real processes, joined over loopback, that train as one does."""

import gzip
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_embed import checkpoint, cluster, metrics, sharding, train
from moe_embed import config as config_lib
from moe_embed.load import load

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "h:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}


def test_alone_the_talk_is_with_oneself():
    assert cluster.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert cluster.on_first(lambda: 3) == 3
    assert (cluster.several(), cluster.is_first(), cluster.failure()) == (False, True, None)
    cluster.end(0, "")
    cluster.end(2, "nobody hears it, and the exit is the caller's")


def test_start_alone_starts_nothing_and_says_what_slurm_meant(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    cluster.start()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SLURM_NTASKS", "4")
    cluster.start()
    assert "Slurm gave 4 tasks, but only srun starts as many" in capsys.readouterr().out


def test_a_verb_of_one_process_refuses_copies(monkeypatch):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(config_lib.UserError, match=r"mine runs as one process, and this is one of 2 \(flags or JAX_"):
        cluster.refuse_several("mine")


@pytest.mark.parametrize(
    ("several", "platform", "named", "kept"),
    [(True, "gpu", False, False), (True, "gpu", True, True), (True, "tpu", False, True), (False, "gpu", False, True)],
)
def test_gpu_hosts_keep_compiled_programs_only_where_the_user_says(several, platform, named, kept, monkeypatch):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    monkeypatch.setattr(cluster, "several", lambda: several)
    try:
        jax.config.update("jax_compilation_cache_dir", "/shared" if named else cluster.OWN_CACHE)
        cluster.choose_cache(platform)
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_enable_compilation_cache", before[1])


# Two real processes.


def launch(*arguments, python=sys.executable, devices=1, **options) -> subprocess.CompletedProcess:
    environ = {**os.environ, "CLUSTER_PYTHON": str(python), "DEVICES": str(devices), "PYTHONPATH": os.getcwd()}
    return subprocess.run(["bash", "launch/local_cluster.sh", "2", *map(str, arguments)], env=environ, text=True,
                          capture_output=True, check=False, timeout=300, **options)  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A short run with evaluations on few real pairs: enough steps that the learning rate has come up."""
    folder = tmp_path_factory.mktemp("data")
    with gzip.open("moe_embed/sample/pairs/crosslingual.jsonl.gz", "rt") as file:
        (folder / "pairs.jsonl").write_text("".join(itertools.islice(file, 300)))
    (folder / "task" / "qrels").mkdir(parents=True)
    words = ("rows", "cells", "page style", "a chart", "print range")
    (folder / "task" / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "d{i}", "text": "{w}"}}\n' for i, w in enumerate(words))
    )
    (folder / "task" / "queries.jsonl").write_text('{"_id": "q0", "text": "cells"}\n')
    (folder / "task" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    return [
        f"--config.data.sources={folder / 'pairs.jsonl'}", f"--config.data.dev={folder / 'task'}", "--config.run.steps=8",
        "--config.run.save_every=4", "--config.run.eval_every=4", "--config.data.batch_size=16", "--config.data.rows=24",
        "--config.optim.warmup_steps=2",
    ]  # fmt: skip


def train_flags(flags, workdir):
    return ["-m", "moe_embed.train", "--config=configs/demo.py:tiny", f"--workdir={workdir}", *flags]


def alone(flags, workdir, monkeypatch, *, devices: int):
    """The same run as one process, here, on some of this process's devices."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda c, **_: make(c, devices=jax.devices()[:devices]))
    train.train(config_lib.load("configs/demo.py:tiny", flags), workdir=workdir)
    monkeypatch.undo()


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "w"
    done = launch(*train_flags(flags, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        workdirs = {n: tmp_path_factory.mktemp("one") / "w" for n in (1, 2)}
        for n, workdir in workdirs.items():
            alone(flags, workdir, monkeypatch, devices=n)
    return workdirs


def losses(workdir) -> np.ndarray:
    rows = metrics.read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))  # one process wrote, each step once
    return np.array([row["loss"] for row in rows])


def test_two_processes_train_as_one_does(two, one):
    workdir, _ = two
    for n in (1, 2):
        np.testing.assert_allclose(losses(workdir), losses(one[n]), rtol=1e-5)
    shifted = np.roll(losses(one[1]), 1)
    assert np.abs(losses(workdir) / shifted - 1).max() > 1e-2  # the steps differ by more than the tolerance
    ours, theirs = (metrics.read(w / "evaluations.jsonl") for w in (workdir, one[1]))
    assert [row["step"] for row in ours] == [0, 4, 8]
    assert ours == theirs


def test_process_0_alone_prints_and_says_who_is_there(two):
    _, done = two
    said = [line for line in done.stdout.splitlines() if "[Gloo]" not in line]
    assert all(line.startswith("[p0] ") for line in said)
    table = [line.split() for line in said[:3]]
    assert table[0][1:3] == ["process", "host"]
    assert [row[1] for row in table[1:]] == ["0", "1"]
    assert [row[3:5] for row in table[1:]] == [["1", "2"], ["1", "2"]]  # local and global devices
    assert "mesh data=2" in done.stdout


def continued(workdir, tmp_path) -> pathlib.Path:
    """A copy that stands at step 4."""
    copy = tmp_path / "w"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "8")
    return copy


def test_one_process_continues_what_two_began(two, flags, tmp_path, monkeypatch, capsys):
    """And from the same checkpoint the next steps are the same: each within 1e-6."""
    workdir, _ = two
    copy = continued(workdir, tmp_path)
    alone(flags, copy, monkeypatch, devices=1)
    assert "from step 4 of 8" in capsys.readouterr().out
    np.testing.assert_allclose(losses(copy)[4:], losses(workdir)[4:], rtol=1e-6)
    assert checkpoint.steps(copy / "checkpoints") == [4, 8]


def test_two_processes_continue_what_one_began_at_the_step_that_verifies(one, flags, tmp_path):
    copy = continued(one[1], tmp_path)
    (copy / "checkpoints" / "6").mkdir()  # a save that did not finish
    done = launch(*train_flags(flags, copy))
    assert done.returncode == 0, done.stderr
    assert "checkpoint 6 is passed over" in done.stdout
    assert "from step 4 of 8" in done.stdout
    np.testing.assert_allclose(losses(copy)[4:], losses(one[1])[4:], rtol=1e-6)
    ours, theirs = (jax.device_get(load(w).params) for w in (copy, one[1]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture
def other_python(tmp_path):
    """A python that gives process 1 one more argument."""
    path = tmp_path / "python"

    def write(argument):
        path.write_text(
            f'#!/bin/sh\nif [ "$JAX_PROCESS_ID" = 1 ]; then set -- "$@" {argument}; fi\nexec {sys.executable} "$@"\n'
        )
        path.chmod(0o755)
        return path

    return write


def test_hosts_with_different_configs_end_before_anything_is_compiled(other_python, flags, tmp_path):
    python = other_python("--config.optim.learning_rate=0.5")
    done = launch(*train_flags(flags, tmp_path / "w"), python=python)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert sorted(line[:5] for line in errors) == ["[p0] ", "[p1] "]
    assert all("in config.optim.learning_rate (0.5, not 0.004): give every process the same" in e for e in errors)
    assert "compil" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


FAILS = """
import sys, time
import jax, numpy as np
from moe_embed import cluster, config, sharding, verb
def main(argv):
    cluster.start()
    mesh = sharding.make_mesh(config.Mesh())
    put = lambda x_N: sharding.put_batch({"x_N": x_N}, mesh=mesh)["x_N"]
    expected = np.arange(8.0) + 1
    assert np.array_equal(sharding.fetch(put(expected)), expected)
    assert not np.array_equal(sharding.fetch(put(expected + 1)), expected)
    assert cluster.gather(jax.process_index()) == [0, 1]
    assert cluster.on_first(jax.process_index) == 0
    if jax.process_index() == 1:
        raise config.UserError("a file of its own is missing.")
    sharding.fetch(put(expected) * 2)  # a collective to which the other does not come
verb.run(main, copies=True)
"""


def test_a_fault_of_one_process_ends_all_with_its_sentence(tmp_path):
    """In seconds, though the others wait in a collective: jax alone would take minutes, and end them by an abort."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = launch(tmp_path / "fails.py", devices=2)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "[p1] error: a file of its own is missing." in errors
    (other,) = [line for line in errors if line.startswith("[p0]")]
    assert other.endswith("ended: a file of its own is missing.")
    assert other.startswith("[p0] error: process 1 on ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_all(tmp_path):
    (tmp_path / "sleeps.py").write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1], str(os.getpid())).touch()\ntime.sleep(60)\n"
    )
    environ = {**os.environ, "CLUSTER_PYTHON": sys.executable}
    command = ["bash", "launch/local_cluster.sh", "2", tmp_path / "sleeps.py", tmp_path]
    running = subprocess.Popen(command, env=environ, start_new_session=True, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    pids = []
    until = time.monotonic() + 30
    while len(pids) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(pids) == 2
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(timeout=30) == 130
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_not_all_came(tmp_path):
    """One of two processes, and nobody else: a sentence in time, not jax's abort."""
    code = "from moe_embed import cluster, verb; verb.run(lambda argv: cluster.start(seconds=3), copies=True)"
    environ = {**os.environ, **EXPLICIT, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_PROCESS_ID": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == cluster.GONE
    assert "error: not all of 2 processes came within 3 s" in done.stderr


def test_whatever_ends_process_0s_part_the_others_hear_of_it(monkeypatch):
    store = {}
    monkeypatch.setattr(cluster, "several", lambda: True)
    monkeypatch.setattr(cluster, "_put", store.__setitem__)
    monkeypatch.setattr(cluster, "_take", store.__getitem__)

    def fails():
        raise OSError(39, "Directory not empty")

    with pytest.raises(OSError, match="not empty"):
        cluster.on_first(fails, call="a")
    monkeypatch.setattr(cluster, "is_first", lambda: False)
    with pytest.raises(config_lib.UserError, match=r"process 0: OSError: .*Directory not empty"):
        cluster.on_first(fails, call="a")

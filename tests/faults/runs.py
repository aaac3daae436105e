"""Small runs as processes of their own, to be disturbed."""

import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from moe_embed import checkpoint, metrics
from moe_embed.load import load

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULE = ("-m", "moe_embed.train")


def flags(pairs: pathlib.Path, *overrides: str) -> list[str]:
    """A run of milliseconds a step."""
    given = [f"data.sources={pairs}", "data.batch_size=16", "data.rows=24", "optim.warmup_steps=2", "encoder.dim=16",
             "encoder.ffn_dim=16", *overrides]  # fmt: skip
    return ["--config=configs/demo.py:tiny", *(f"--config.{override}" for override in given)]


def environ(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **more}


def start(workdir: pathlib.Path, arguments, *, program=MODULE, log: str = "", at: str = "", **more) -> subprocess.Popen:
    """The run as a process, its output in workdir.log (stdout and stderr). `at` is where it writes, if that is no folder."""
    command = [sys.executable, *map(str, program), *arguments, f"--workdir={at or workdir}"]
    with open(f"{workdir}{log}.log", "a") as output:
        given = {"cwd": ROOT, "stdout": output, "stderr": output, "text": True, "env": environ()} | more
        return subprocess.Popen(command, **given)


def start_two(workdir: pathlib.Path, arguments, *, program=MODULE, at: str = "") -> list[subprocess.Popen]:
    """Two processes of one run; each with its own log, workdir.p0.log and workdir.p1.log.

    Without LLVM's optimisations: process 1 compiles at each start, since jax keeps what process 0 compiled alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for i in (0, 1):
        where = {
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        both.append(start(workdir, arguments, program=program, log=f".p{i}", at=at, env=environ(**where)))
    return both


def said(workdir: pathlib.Path, process: str = "") -> str:
    return pathlib.Path(f"{workdir}{process}.log").read_text()


def to_the_end(workdir: pathlib.Path, arguments) -> int:
    return start(workdir, arguments).wait(timeout=240)


def rows(workdir: pathlib.Path) -> list[dict]:
    return metrics.read(workdir / "metrics.jsonl")


def wait_for_step(workdir: pathlib.Path, step: int, *processes: subprocess.Popen) -> None:
    """Until the row of this step is written."""
    until = time.monotonic() + 240
    while not (found := rows(workdir)) or found[-1]["step"] < step:
        gone = [process for process in processes if process.poll() is not None]
        if gone or time.monotonic() > until:
            for process in processes:
                process.kill()
                process.wait()
            raise AssertionError(f"{workdir} is not at step {step}: {[p.returncode for p in gone]} ended, see its log")
        time.sleep(0.02)


def newest(workdir: pathlib.Path) -> int:
    """The newest step that verifies, 0 where none has been saved yet; a UserError where one was and none verifies."""
    return checkpoint.newest_verified(workdir / "checkpoints", say=lambda _: None) or 0


def digest(workdir: pathlib.Path) -> str:
    """Of the parameters of the newest step that verifies."""
    params = jax.device_get(load(workdir).params)
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        whole.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return whole.hexdigest()


def numbers(workdir: pathlib.Path) -> list[dict]:
    """The rows of a run, without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "waited")} for row in rows(workdir)
    ]


VERBS = """
import importlib, json, sys
from moe_embed import verb
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        verb.run(importlib.import_module(f"moe_embed.{name}").main)
    except SystemExit as end:
        print("ended", name, end.code, file=sys.stderr, flush=True)
"""


def all_refused(commands: list[list[str]]) -> str:
    """Run verbs, one after the other in one process: each is to end with 2 and one sentence. Returns what they said."""
    command = [sys.executable, "-c", VERBS, json.dumps(commands)]
    said = subprocess.run(command, env=environ(), cwd=ROOT, capture_output=True, text=True, check=False).stderr
    ends = [line.split()[1:] for line in said.splitlines() if line.startswith("ended ")]
    assert ends == [[name, "2"] for name, *_ in commands], said
    assert "Traceback" not in said, said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == len(commands), said
    return said

"""Without a GPU: launch/gpu_check.sh and `-m gpu` say so, and the tests of that marker run with a CPU device standing in."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def pytest_in(*arguments: str, platforms: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_asked_for_without_a_gpu_they_are_an_error_and_no_skip():
    for platforms in ("cpu", "cuda,cpu"):
        done = pytest_in("-m", "gpu", "tests/gpu", platforms=platforms)
        assert done.returncode == 4  # pytest's code for a usage error
        assert f"-m gpu needs a GPU, and JAX_PLATFORMS={platforms} gives jax none" in done.stderr + done.stdout


def test_not_asked_for_they_are_deselected():
    done = pytest_in("tests/gpu", platforms="cpu")
    assert " deselected" in done.stdout
    assert " passed" not in done.stdout
    assert done.returncode == 5  # nothing was run


def test_with_a_cpu_device_standing_in_they_run():
    """A few of them; all take a minute."""
    done = pytest_in("-m", "gpu", "--stand_in", "tests/gpu", "-k", "losses or loop", platforms="cpu")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_script_needs_a_gpu(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # as where there is a driver and no card
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"OUTPUT": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "launch/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: nvidia-smi finds no GPU here; run this on a machine with one.\n"


def test_the_script_says_which_packages_are_missing(tmp_path):
    """A machine with a GPU and a Python that has nothing of ours."""
    for name, script in {"nvidia-smi": "echo 'GPU 0: one'", "bare": f'exec {sys.executable} -I -S "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTPUT": str(tmp_path), "PYTHON": str(tmp_path / "bare"),
        "WHEELS": str(tmp_path / "none"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "launch/gpu_check.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "lacks jax, jaxlib, flax" in done.stderr

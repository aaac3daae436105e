"""colab/: every cell of every notebook, executed in a copy by nbclient (marker `notebooks`); and what each has to be on paper."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
OF_MACHINES = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|content|Users|mnt)\b"
)  # a path that is nobody else's
SECONDS = 600  # for one cell, on a machine that does other things too


def cells(path: pathlib.Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind
    ]


def with_exit_codes(source: str) -> str:
    """A cell whose shell commands must end with 0: IPython goes on after one that fails.

    >>> print(with_exit_codes("!ls"))
    !ls
    assert _exit_code == 0, _exit_code
    """
    return re.sub(r"^( *)(!(?:.*\\\n)*.*)$", r"\1\2\n\1assert _exit_code == 0, _exit_code", source, flags=re.MULTILINE)


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """What the notebooks read, and nothing else."""
    for name in ("moe_embed", "configs", "colab"):
        shutil.copytree(ROOT / name, tmp_path / "moe_embed" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.txt", tmp_path / "moe_embed")
    return tmp_path / "moe_embed"


def test_there_are_four():
    assert [path.name for path in NOTEBOOKS] == [
        "1_quickstart.ipynb", "2_finetune_your_pairs.ipynb", "3_look_inside_the_router.ipynb", "4_plan_a_pod.ipynb",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_on_paper(path):
    text = path.read_text("utf-8")
    for cell in json.loads(text)["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert not OF_MACHINES.search(text)
    code, prose = cells(path, "code"), cells(path, "markdown")
    assert code[0] == cells(NOTEBOOKS[0], "code")[0]  # the set-up is one
    assert len(prose) >= len(code) / 2  # and every few cells are explained
    owner = re.search(r'^REPOSITORY = "(.+)"$', code[0], flags=re.MULTILINE)[1]
    assert f"colab.research.google.com/github/{owner}/blob/main/colab/{path.name})" in prose[0]
    linked = [name for text in prose for name in re.findall(r"\]\((\w+\.ipynb)\)", text)]
    assert {path.parent / name for name in linked} <= set(NOTEBOOKS)
    # A library of cells would be a second library: what a notebook does, a verb or a public function does.
    assert not [cell for cell in code if re.search(r"^\s*(def|class) ", cell, flags=re.MULTILINE)]


def test_what_reads_paths_and_commands_sees_them():
    assert OF_MACHINES.search('open("/content/a")')
    assert not OF_MACHINES.search("https://x/tmp.html runs/tmp")
    assert with_exit_codes("if a:\n    !ls \\\n  -l\nb") == (
        "if a:\n    !ls \\\n  -l\n    assert _exit_code == 0, _exit_code\nb"
    )


def execute(path: pathlib.Path):
    """The notebook after every cell has run in a kernel of its own, in the notebook's folder."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = with_exit_codes(cell.source)
    client = NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    return client.execute()


@pytest.mark.notebooks
@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_every_cell_runs(name, copy, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    book = execute(copy / "colab" / name)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code if "!python" in cell.source)
    said = "".join(str(output.text) for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "Traceback" not in said
    assert "error:" not in said
    wanted = {
        "1": "workdir and export differ by",
        "2": "nDCG@10",
        "3": "normalised mutual information",
        "4": "verdict ",
    }
    assert wanted[name[0]] in said
    shown = {kind for cell in code for output in cell.outputs for kind in getattr(output, "data", ())}
    assert {"3": "text/html", "4": "image/svg+xml"}.get(name[0]) in (*shown, None)


@pytest.mark.notebooks
def test_a_cell_that_fails_ends_the_test(tmp_path):
    from nbclient.exceptions import CellExecutionError

    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "!exit 3", "outputs": [], "execution_count": None}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    with pytest.raises(CellExecutionError, match="3"):
        execute(tmp_path / "a.ipynb")


def set_up(folder: pathlib.Path, *, owner: str = "OWNER", **environ: str) -> subprocess.CompletedProcess:
    """The first cell as a program: it has no magics. Then where verbs would run."""
    source = cells(NOTEBOOKS[0], "code")[0].replace('REPOSITORY = "OWNER/', f'REPOSITORY = "{owner}/')
    source += '\nimport moe_embed\nprint(os.environ.get("JAX_PLATFORMS"), pathlib.Path(moe_embed.__file__).parents[1])'
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "PYTHONPATH")}
    given = {"cwd": folder, "env": kept | {"PIP_NO_INDEX": "1"} | environ, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", source], **given)


@pytest.mark.notebooks
@pytest.mark.parametrize(
    ("capability", "platforms"),
    [
        ("7.5", "cpu"),
        ("8.0", "None"),
        ("9.0\n9.0", "None"),
        ("", "None"),
        ("NVIDIA-SMI has failed because", "None"),
        ("[N/A]", "None"),
    ],
)
def test_an_old_gpu_is_left_aside_and_said(copy, capability, platforms):
    folder = copy.parent / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{capability}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    done = set_up(copy / "colab", PATH=f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{platforms} {copy}"
    assert ("everything here runs on the CPU" in done.stdout) == (platforms == "cpu")


@pytest.mark.notebooks
def test_the_runtimes_jax_is_kept_or_the_cell_ends(copy):
    with open(copy / "requirements.txt", "a") as file:
        file.write("jax>=99\n")
    done = set_up(copy / "colab")
    assert done.returncode == 1
    assert f"beside jax=={__import__('jax').__version__}" in done.stderr or "jaxlib==" in done.stderr
    assert "%pip install --upgrade" in done.stderr


@pytest.mark.notebooks
def test_where_the_code_is_not_it_is_cloned(copy, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    done = set_up(away)
    assert done.returncode == 1
    assert "Write the owner of your copy into REPOSITORY" in done.stderr
    for command in ("init --quiet", "add .", "-c user.name=a -c user.email=a@b commit --quiet -m a"):
        subprocess.run(["git", *command.split()], cwd=copy, check=True)
    elsewhere = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{copy}.insteadOf"}
    elsewhere["GIT_CONFIG_VALUE_0"] = "https://github.com/someone/moe_embed"
    for _ in range(2):  # the second time it is there
        done = set_up(away, owner="someone", **elsewhere)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith(str(away / "moe_embed"))

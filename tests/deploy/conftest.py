"""The table of who opened the exported folder, printed at the end of a run; RECORD_DEPLOY=FILE also writes it there, dated."""

import datetime
import importlib.metadata
import importlib.util
import os
import pathlib

import pytest

ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def note(request):
    """note(software, package, form=..., cosine=...) puts a line into the table."""
    rows = request.config.stash.setdefault(ROWS, [])

    def add(software: str, package: str, *, form: str, cosine: float) -> None:
        version = importlib.metadata.version(package)
        rows.append(f"{software:<42} {version:<12} {form:<8} {1 - cosine:>12.1e}")

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, None)
    if not rows:
        return
    title = f"64 texts in 10 languages beside Model.encode, {datetime.date.today()}"
    header = f"{'opened by':<42} {'version':<12} {'position':<8} {'1 - cosine':>12}  (the largest)"
    absent = ["vLLM", "text-embeddings-inference"]
    absent += [] if importlib.util.find_spec("llama_cpp") else ["llama.cpp"]
    table = [header, *rows, *(f"{name:<42} not run: names, shapes and keys checked" for name in absent)]
    terminalreporter.section(title)
    for row in table:
        terminalreporter.write_line(row)
    if "RECORD_DEPLOY" in os.environ:
        text = "\n".join(("    " + line).rstrip() for line in table)
        pathlib.Path(os.environ["RECORD_DEPLOY"]).write_text(f"# {title}\n\n{text}\n", encoding="utf-8")

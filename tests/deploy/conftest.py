"""The table of who opened the exported folder, printed at the end of a run."""

import datetime
import importlib.metadata

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
    terminalreporter.section(f"64 texts in 10 languages beside Model.encode, {datetime.date.today()}")
    terminalreporter.write_line(f"{'opened by':<42} {'version':<12} {'position':<8} {'1 - cosine':>12}  (the largest)")
    for row in [*rows, *(f"{name:<42} not run: names, shapes and keys checked" for name in ("vLLM", "TEI"))]:
        terminalreporter.write_line(row)

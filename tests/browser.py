"""A headless browser, if there is one: what tests of marker `report` open pages in."""

import os
import pathlib
import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """CHROME of the environment, or the first of NAMES on PATH."""
    return os.environ["CHROME"] if "CHROME" in os.environ else next(filter(None, map(shutil.which, NAMES)), None)


def opened(page: pathlib.Path, tmp_path: pathlib.Path, *flags: str) -> tuple[str, list[str]]:
    """(the page's DOM after its scripts have run, what its console said)."""
    done = subprocess.run(
        [find(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900",
         "--enable-logging=stderr", "--virtual-time-budget=5000", *flags, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)

"""What a run writes down: metrics.jsonl (a row a step), evaluations.jsonl, events.jsonl, and a progress bar for whoever is watching."""

import json
import os
import pathlib
import sys
import time

import numpy as np
import tqdm

from moe_embed.config import UserError

SHOWN = {"loss": "loss", "accuracy": "acc", "ndcg": "dev nDCG@10", "tokens_per_second": "tok/s"}


def scalars(metrics: dict) -> dict[str, float]:
    """Device metrics -> floats by name; `router_load_RE` becomes router_load/<layer>/<expert>, mixture layers from 0."""
    row = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            row[name] = float(value)
        else:
            stem = name.rpartition("_")[0]
            for index in np.ndindex(value.shape):
                row["/".join((stem, *map(str, index)))] = float(value[index])
    return row


class Writer:
    """Appends rows to metrics.jsonl and draws the bar. Rows at or after `first_step` of an earlier try are dropped.

    Of several processes one has a workdir; the others (None) do all the same, to no file.
    """

    def __init__(self, workdir: pathlib.Path | None, *, first_step: int, last_step: int):
        self.path = workdir / "metrics.jsonl" if workdir else pathlib.Path(os.devnull)
        self.evaluations = workdir / "evaluations.jsonl" if workdir else pathlib.Path(os.devnull)
        self.events = workdir / "events.jsonl" if workdir else pathlib.Path(os.devnull)  # of all tries: none is dropped
        keep(self.path, first_step - 1)
        keep(self.evaluations, first_step)
        self._waiting = {self.path: "", self.evaluations: "", self.events: ""}  # what could not be written
        self._bar = tqdm.tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stdout,
                              mininterval=0.5 if sys.stdout.isatty() else 15.0)  # fmt: skip
        self._shown: dict[str, str] = {}
        self._last = time.perf_counter()

    def step(self, step: int, row: dict[str, float]) -> None:
        """Write the row of a finished step; adds seconds and useful tokens a second."""
        now = time.perf_counter()
        row = {"step": step, **row, "seconds": now - self._last}
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        self._last = now
        self._add(self.path, row)
        self._show(row)
        self._bar.update()

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write held-out figures, as a row of their own after a step's."""
        self._add(self.evaluations, {"step": step, **figures})
        self._show(figures)
        self.lap()

    def event(self, step: int, name: str) -> None:
        """Write down that something began before step `step`, and when, in seconds since 1970: "begin", "resume" or "save"."""
        self._add(self.events, {"step": step, "event": name, "time": time.time()})

    def evaluated(self, step: int) -> bool:
        """Whether this step's held-out figures are written."""
        return any(row["step"] == step for row in read(self.evaluations))

    def lap(self) -> None:
        """Begin the next step's time now: what went before (an evaluation, a compilation) is nobody's step."""
        self._last = time.perf_counter()

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self._bar.write(sentence, file=sys.stdout)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        """Finish the bar."""
        self._bar.close()
        for path, text in self._waiting.items():
            if text:
                print(f"warning: {text.count(chr(10))} rows were never written to {path}.")

    def _add(self, path: pathlib.Path, row: dict) -> None:
        """Write a row. Where that fails, on a full disk, it waits for the next one's try: training goes on."""
        before = self._waiting[path]
        self._waiting[path] += json.dumps(row) + "\n"
        try:
            append(path, self._waiting[path])
            self._waiting[path] = ""
        except OSError as error:
            if not before:
                self.say(f"warning: {path} cannot be written ({error.strerror}); its rows wait, and training goes on.")

    def _show(self, row: dict[str, float]) -> None:
        for name, label in SHOWN.items():
            if name in row:
                digits = ",.0f" if name == "tokens_per_second" else ".3f"
                self._shown[label] = format(row[name], digits)
        self._bar.set_postfix(self._shown, refresh=False)


def append(path: pathlib.Path, text: str) -> None:
    """All of `text` at the end of a file, or, with an OSError, nothing of it."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def keep(path: pathlib.Path, last_step: int) -> None:
    """Drop the rows of a .jsonl file after `last_step`: they will be written again."""
    if not path.is_file():
        return
    kept = [row for row in read(path) if row["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a .jsonl file, none if there is no file; a last line cut short by a crash is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and "step" in row and isinstance(row["step"], int):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"{path}:{number} is no row with a step; mend or remove the file.")
    return rows

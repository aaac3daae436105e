"""What a run writes down: metrics.jsonl (a row a step), evaluations.jsonl, events.jsonl, and a progress bar for whoever is watching."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import tqdm

from moe_embed import bucket, stored
from moe_embed.config import UserError

PUT_EVERY = 30.0  # seconds between two times that a bucket is given the rows of steps
PUT_SHARE = 0.01  # of all time, at most, that this takes
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
    """Appends rows to metrics.jsonl and draws the bar. Rows at or after `first_step` of an earlier try are dropped, evaluations
    after it.

    Of several processes one has a workdir; the others (None) do all the same, to no file. `also` gets each step's numbers, and
    each evaluation's.
    """

    def __init__(
        self,
        workdir: pathlib.Path | None,
        *,
        first_step: int,
        last_step: int,
        also: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        self.path = workdir / "metrics.jsonl" if workdir else pathlib.Path(os.devnull)
        self.evaluations = workdir / "evaluations.jsonl" if workdir else pathlib.Path(os.devnull)
        self.events = workdir / "events.jsonl" if workdir else pathlib.Path(os.devnull)  # of all tries: none is dropped
        self._later = 0.0  # when rows of steps may next be put in a bucket: each time it is the whole file
        keep(self.path, first_step - 1)
        keep(self.evaluations, first_step)
        keep(self.events, math.inf)
        self._waiting = {self.path: "", self.evaluations: "", self.events: ""}  # what is not written yet
        self._failing: set[pathlib.Path] = set()
        self._bar = tqdm.tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stdout,
                              mininterval=0.5 if sys.stdout.isatty() else 15.0)  # fmt: skip
        self._shown: dict[str, str] = {}
        self._also = also
        for row in read(self.evaluations):
            if row["step"] == first_step:  # kept; a tracker that forgets what came from first_step on has lost it
                self._send(first_step, row)
        self._last = time.perf_counter()

    def step(self, step: int, row: dict[str, float]) -> None:
        """Write the row of a finished step; adds seconds and useful tokens a second."""
        now = time.perf_counter()
        row = {"step": step, **row, "seconds": now - self._last}
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        self._last = now
        self._add(self.path, row)
        self._send(step, row)
        self._show(row)
        self._bar.update()

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write held-out figures, as a row of their own after a step's."""
        self._put(self.path)
        self._add(self.evaluations, {"step": step, **figures})
        self._send(step, figures)
        self._show(figures)
        self.lap()

    def event(self, step: int, name: str) -> None:
        """Write down that something began before step `step`, and when, in seconds since 1970: "begin", "resume" or "save".

        The rows of steps are in the workdir before it: what is saved has all rows up to it.
        """
        self._put(self.path)
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
        """Finish the bar, and write what waits."""
        for path in self._waiting:
            self._put(path)
        self._bar.close()
        for path, text in self._waiting.items():
            if text:
                print(f"warning: {text.count(chr(10))} rows were never written to {path}.")

    def _add(self, path: pathlib.Path, row: dict) -> None:
        """Write a row, or let it wait for the next time that a bucket is given the rows of steps."""
        self._waiting[path] += json.dumps(row) + "\n"
        if path != self.path or not bucket.is_remote(path) or time.monotonic() > self._later:
            self._put(path)

    def _put(self, path: pathlib.Path) -> None:
        """Write the rows that wait. Where that fails, on a full disk, they wait for the next try: training goes on."""
        if not self._waiting[path]:
            return
        start = time.monotonic()
        try:
            append(path, self._waiting[path])
            self._waiting[path] = ""
            self._failing.discard(path)
        except OSError as error:
            if path not in self._failing:
                self.say(f"warning: {path} cannot be written ({error.strerror}); its rows wait, and training goes on.")
            self._failing.add(path)
        if path == self.path:
            end = time.monotonic()
            self._later = end + max(PUT_EVERY, (end - start) / PUT_SHARE)

    def _send(self, step: int, row: Mapping[str, float]) -> None:
        if self._also:
            self._also(step, {name: value for name, value in row.items() if name != "step"})

    def _show(self, row: dict[str, float]) -> None:
        for name, label in SHOWN.items():
            if name in row:
                digits = ",.0f" if name == "tokens_per_second" else ".3f"
                self._shown[label] = format(row[name], digits)
        self._bar.set_postfix(self._shown, refresh=False)


def append(path: pathlib.Path, text: str) -> None:
    """All of `text` at the end of a file, or, with an OSError, nothing of it. In a bucket the file is read and put again, whole."""
    if bucket.is_remote(path):
        return bucket.write(path, bucket.read(path) + text.encode())
    size = path.stat().st_size if path.is_file() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def keep(path: pathlib.Path, last_step: float) -> None:
    """Drop the rows of a .jsonl file after `last_step`: they will be written again. A last line cut short goes too."""
    if not bucket.is_file(path):
        return
    kept = [row for row in read(path) if row["step"] <= last_step]
    stored.write_bytes(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a .jsonl file, none if there is no file; a last line cut short by a crash is left out."""
    lines = bucket.read(path).splitlines()
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

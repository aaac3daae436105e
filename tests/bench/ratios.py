"""What a benchmark is made of: sides timed in turns, and a dated table of their ratios."""

import datetime
import gc
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

PAUSE = 0.05  # seconds between turns: the threads of the side before, of OpenMP or XLA, have gone to sleep by then


class Row(NamedTuple):
    """A line of the table: numbers of one peer beside ours, in `unit`."""

    what: str
    peer: str
    theirs: float
    ours: float
    unit: str
    ratio: float  # above 1 is ours ahead, unless `bar` says "at most"
    bar: str  # as the project states it; "" where it states none


def threads() -> int:
    """Cores this process may run on; XLA's CPU client takes as many threads, and torch is told to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident() -> int:
    """Bytes of this process that are in memory. Linux."""
    return int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def interleaved(sides: dict[str, Callable[[], object]], *, rounds: int, in_a_row: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each side, which take turns: a b c, b c a, c a b, ... Each must block until it is done.

    A turn is `in_a_row` calls of which the last is timed: what runs for hours, as training does, is measured as it runs, on
    memory that its own last step used and not the other side's. Nothing is called before the first turn: compile before.
    """
    names, seconds = list(sides), {name: [] for name in sides}
    gc.collect()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(PAUSE)
            for _ in range(in_a_row - 1):
                sides[name]()
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as long theirs took: the median over rounds, each against its own neighbour in time."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def say(text: str) -> None:
    """Progress, at once."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", flush=True)


def table(rows: Iterable[Row], *, facts: dict[str, str], notes: Iterable[str]) -> str:
    """Markdown: the date and the machine, the rows, the notes."""
    lines = [f"# CPU, {datetime.date.today().isoformat()}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| what | peer | theirs | ours | unit | ratio | bar |", "|---|---|---:|---:|---|---:|---|"]
    for row in rows:
        numbers = (f"{row.theirs:,.4g}", f"{row.ours:,.4g}", row.unit, f"{row.ratio:.2f}")
        lines.append("| " + " | ".join((row.what, row.peer, *numbers, row.bar)) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def machine(versions: str) -> dict[str, str]:
    """What the figures depend on; `versions` is the caller's list of packages."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": f"{model}, {threads()} threads for every side",
        "system": f"Python {platform.python_version()} on {platform.platform()}",
        "versions": versions,
        "GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"] if "GLIBC_TUNABLES" in os.environ else "not set",
        "load average": ", ".join(f"{load:.2f}" for load in os.getloadavg()) + " (1, 5, 15 minutes, before)",
    }

"""Watch a workdir that another process trains: every checkpoint, once it is whole, is opened here and measured.

A checkpoint is whole when its manifest is there and every file has its digest (checkpoint.problem); until then it is left
alone. The trainer keeps only its newest ones (run.keep): one that it deletes before or while it is read is named and passed.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Collection, Iterator

from moe_embed import bucket, checkpoint, metrics
from moe_embed.config import UserError
from moe_embed.data import sources
from moe_embed.load import DESCRIPTION, Model, load, read_description

PAUSE = 5.0  # seconds between two looks at the workdir
SAY = functools.partial(print, flush=True)  # hours may pass between two lines


def watch(
    root: pathlib.Path,
    output: pathlib.Path,
    measure: Callable[[Model], dict],
    *,
    tasks: Collection[str],
    say: Callable[[str], None] = SAY,
    pause: float = PAUSE,
) -> None:
    """Append {"step", "workdir", **measure(model)} to `output`, a .jsonl file, for each step of the run in `root`.

    `measure` gives at least {"ndcg@10", "recall@10", "seconds", "tasks": {one of `tasks`: ...}}. Steps that `output` has are not
    done again. Returns after the run's last step. UserError for a workdir of no run, or an output of another one.
    """
    done = _done(output, root, tasks)
    if done:
        say(f"{output} has {len(done)} steps, up to {max(done)}; they are not measured again.")
    for step, last, model in checkpoints(root, done=done, say=say, pause=pause):
        row = {"step": step, "workdir": str(root)} | measure(model)
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        ndcg, recall = 100 * row["ndcg@10"], 100 * row["recall@10"]
        say(f"step {step:>7} of {last}  nDCG@10 {ndcg:5.1f}  recall@10 {recall:5.1f}  {row['seconds']:.0f} s")


def checkpoints(
    root: pathlib.Path, *, done: Collection[int] = (), say: Callable[[str], None] = SAY, pause: float = PAUSE
) -> Iterator[tuple[int, int, Model]]:
    """(step, the run's last step, its model) of each checkpoint that verifies, the oldest first, as they come.

    Waits for a workdir that is not there yet, and for steps that are not; ends with the last one.
    """
    folder = root / "checkpoints"
    done, gone, faults = set(done), set(), {}  # a damaged step -> its manifest
    waiting, last = False, None
    while last is None or last not in done:
        last, every = _length(root)
        if last is None and not waiting:
            waiting = True
            say(f"waiting for {root / DESCRIPTION} ...")
        for step in checkpoint.steps(folder) if last is not None else []:
            stamp = _stamp(folder, step)
            if step in done or stamp is None or (step in faults and faults[step] == stamp):
                continue  # measured, not finished, or known to be damaged
            model, fault = _open(root, step)
            if model is not None:
                yield step, last, model
                done.add(step)
            elif _stamp(folder, step) is not None:  # else it is among those that are gone
                faults[step] = stamp
                say(f"checkpoint {step} is passed over: {fault}.")
        there = set(checkpoint.steps(folder))
        expected = set(range(every, max(there | done, default=0), every)) if every else set()
        if new := sorted(expected - there - done - gone):
            gone.update(new)
            say(f"not measured, no longer there (run.keep): step {', '.join(map(str, new))}.")
        if last is None or last not in done:
            time.sleep(pause)


def _open(root: pathlib.Path, step: int) -> tuple[Model | None, str]:
    """The model of a step; None and the reason if its files are damaged, or go while they are read."""
    try:
        return load(root, step=step), ""
    except Exception:  # our own, Orbax's or the system's, of files that may have been there a moment ago
        fault = _fault(root / "checkpoints", step)
        if not fault:
            raise
        return None, fault


def _fault(folder: pathlib.Path, step: int) -> str:
    try:
        return checkpoint.problem(folder, step)
    except OSError as error:  # between its list of files and their digests
        return str(error)


def _stamp(folder: pathlib.Path, step: int) -> bytes | None:
    """A step's manifest, None where there is none: the save is under way, or the step is gone."""
    try:
        return bucket.read(folder / str(step) / checkpoint.MANIFEST) or None
    except OSError:
        return None


def _length(root: pathlib.Path) -> tuple[int | None, int]:
    """(the run's last step, steps between checkpoints); (None, 0) before there is a run."""
    if not bucket.is_file(root / DESCRIPTION):
        return None, 0
    config = read_description(root).config
    if config is None:
        raise UserError(f"{root} is a model folder, nothing trains it; evaluate it without --watch.")
    return config.run.steps, config.run.save_every


def _done(output: pathlib.Path, root: pathlib.Path, tasks: Collection[str]) -> set[int]:
    """The steps that `output` has; a last line that a crash cut short is removed. UserError if it is about something else."""
    rows = metrics.read(output)
    for row in rows:
        same = "workdir" in row and bucket.path_of(row["workdir"]).resolve() == root.resolve()
        if not same or "tasks" not in row or set(row["tasks"]) != set(tasks):
            raise UserError(f"{output} has figures of another workdir or of other tasks; name another --output.")
    if output.is_file():
        sources.write_lines(output, map(json.dumps, rows))
    return {row["step"] for row in rows}

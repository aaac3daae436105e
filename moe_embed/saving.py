"""Saving beside the training: a step is copied to the host, and training goes on while it is written, digested and counted.

A thread waits for Orbax, digests what this process wrote and, on process 0, writes the manifest (checkpoint.py) and drops old
steps. A save that fails is said at once and tried again, PAUSE seconds later or when the next is due; after TRIES in a row
the run ends. Several processes agree on how a save went, and try again when the next is due: only there all are at one step.
"""

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable

import orbax.checkpoint as ocp

from moe_embed import bucket, checkpoint, cluster
from moe_embed.config import UserError

TRIES = 5
PAUSE = 30.0  # seconds after a failed save, for whoever makes room
PAUSE_AT_END = 3.0  # where training cannot go on meanwhile
LAST_WAIT = 60.0  # seconds that a run which ends with an error gives the save it has begun


class Saver:
    """Saves of one run, one at a time. As a context it ends with the save it has begun, whatever ended the run."""

    def __init__(self, folder: pathlib.Path, *, facts: dict, keep: int, say: Callable[[str], None]):
        self.folder, self.facts, self.keep, self.say = folder, facts, keep, say
        self._thread: threading.Thread | None = None
        self._problem = ""  # of the last save that ended
        self._failures = 0  # in a row
        self._failed_at = 0.0
        cluster.on_first(lambda: checkpoint.clean(folder))

    def save(self, state: dict) -> None:
        """Begin to save `state`, which may be donated as soon as this returns; the save before it is waited for.

        UserError after TRIES failures in a row. Of several processes all call this at the same steps.
        """
        self.wait()
        if self._failures >= TRIES:
            raise UserError(
                f"{TRIES} saves in a row failed, the last one with: {self._problem}; make room, and run again."
            )
        self._problem, step = "its thread ended", int(state["step"])
        calls = [cluster.new_call() for _ in range(2)]  # the thread's, numbered here: on all processes alike
        try:
            path = checkpoint.prepare(self.folder, step)
            checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            checkpointer.save(path, args=checkpoint.to_save(state))
        except Exception as error:  # of a disk, of Orbax or of a store's client: the others wait to hear of it
            path, checkpointer, said = None, None, _sentence(error)
        else:
            said = ""
        arguments = step, path, checkpointer, said, checkpoint.arrays_of(state), calls
        self._thread = threading.Thread(target=self._finish, args=arguments, name=f"save of step {step}", daemon=True)
        self._thread.start()

    def wants_again(self) -> bool:
        """Whether a save has failed and its next try is due, at any step: of a single process only."""
        if cluster.several() or self._thread is None or self._thread.is_alive():
            return False
        return bool(self._problem) and time.monotonic() > self._failed_at + PAUSE

    def wait(self) -> None:
        """Until the save that was begun has ended, well or not."""
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(1.0)  # so that Ctrl-C is heard
        self._thread = None
        self._failures = self._failures + 1 if self._problem else 0

    def save_now(self, state: dict) -> None:
        """Save `state` and wait until it counts, with as many tries as there are. UserError if none succeeds."""
        while True:
            self.save(state)
            self.wait()
            if not self._problem:
                return
            time.sleep(PAUSE_AT_END)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error) -> None:
        """What was begun is finished, also where the run failed or was stopped."""
        if self._thread is not None:
            self._thread.join(LAST_WAIT if error[0] else None)

    def _finish(self, step: int, path: pathlib.Path, checkpointer, said: str, arrays: dict, calls: list[str]) -> None:
        """The thread."""
        mine = {"problem": said}
        if not said:
            try:
                checkpointer.wait_until_finished()
                checkpointer.close()
                mine = {"problem": "", "files": checkpoint.digests(path)}
            except Exception as error:  # whatever it is, the others wait to hear of it, and the run to try again
                mine = {"problem": _sentence(error)}
        rows = cluster.gather(mine, call=calls[0])
        self._problem = cluster.on_first(lambda: self._conclude(step, path, rows, arrays), call=calls[1])
        if self._problem:
            self._failed_at = time.monotonic()
            self.say(
                f"warning: the save of step {step} failed: {self._problem}; training goes on, and it is tried again."
            )

    def _conclude(self, step: int, path: pathlib.Path, rows: list[dict], arrays: dict) -> str:
        """Process 0's part; what went wrong, or ""."""
        problems = [
            f"process {i}: {row['problem']}" if len(rows) > 1 else row["problem"]
            for i, row in enumerate(rows) if row["problem"]
        ]  # fmt: skip
        if not problems:
            try:
                files = [row["files"] for row in rows]
                checkpoint.finish(path, files, arrays=arrays, facts=self.facts)
            except Exception as error:
                problems = [_sentence(error)]
        if problems and bucket.is_remote(path):
            # Orbax's threads may still write there, and only with its mark beside it is that no step. The next save cleans.
            return "; ".join(problems)
        with contextlib.suppress(OSError):  # Orbax's threads may still write there: the next save does it
            checkpoint.clean(self.folder)  # of what failed: it may be what fills the disk
        if not problems:
            try:
                checkpoint.drop(self.folder, step, keep=self.keep)
            except Exception as error:  # the step counts all the same
                self.say(f"warning: steps before {step} could not be dropped: {_sentence(error)}.")
        return "; ".join(problems)


def _sentence(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    if len(said) > 300:  # where, and at the end what: "No space left on device"
        said = f"{said[:140]} ... {said[-150:]}"
    return said.rstrip(".")


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_is_not_orbax)  # of a failed save it logs a traceback for every array

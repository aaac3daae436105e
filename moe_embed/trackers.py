"""TensorBoard and Weights & Biases, for whoever watches runs there: config.run.log_to=tensorboard,wandb sends them each row.

The workdir's own files stay the record. TensorBoard's are in WORKDIR/tensorboard; W&B takes its account, project and mode from
the environment (WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE=offline). A tracker that fails during a run is named once and left
behind: training goes on.
"""

import contextlib
import importlib.util
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from moe_embed import bucket, stored
from moe_embed.config import UserError
from moe_embed.fields import first_line

Log = Callable[[int, Mapping[str, float]], None]  # a step and its numbers by name
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
LEAVE = 60.0  # seconds that a tracker has at the end of a run: the other processes wait for this one
WANDB_ID = "wandb.json"  # in the workdir: a run that continues is the same run there


def check(names: Collection[str], workdir: pathlib.Path) -> None:
    """UserError for a tracker that does not exist, whose package is not installed, or that cannot write below `workdir`."""
    if names and bucket.is_remote(workdir):
        raise UserError(f"config.run.log_to={','.join(names)} writes files of its own, and {workdir} is no folder.")
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"config.run.log_to={name} is none of {', '.join(PACKAGES)}.")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f'config.run.log_to={name} needs {PACKAGES[name]}, which is not installed: pip install -e ".[trackers]"'
            )


@contextlib.contextmanager
def opened(
    names: Collection[str],
    workdir: pathlib.Path,
    *,
    config: dict[str, Any],
    first_step: int,
    say: Callable[[str], None] = print,
) -> Iterator[Log]:
    """Within it, a function that sends a step's numbers to all trackers of `names`. Steps from `first_step` on come again.

    UserError where one cannot begin: no account, no network.
    """
    check(names, workdir)
    logs, closes, failed = {}, {}, True
    try:
        for name in names:
            begin = {"tensorboard": _tensorboard, "wandb": _wandb}[name]
            try:
                logs[name], closes[name] = begin(workdir, config=config, first_step=first_step)
            except Exception as error:  # whatever a client of a service may throw
                raise UserError(f"config.run.log_to={name} cannot begin: {_about(error)}") from error

        def log(step: int, row: Mapping[str, float]) -> None:
            for name in list(logs):
                try:
                    logs[name](step, row)
                except Exception as error:  # a picture elsewhere is no reason to lose a run
                    del logs[name]
                    say(f"warning: {name} takes no more rows ({_about(error)}); training goes on without it.")

        yield log
        failed = False
    finally:
        for name, close in closes.items():
            if said := _within(LEAVE, close, failed):
                say(f"warning: {name} did not take leave ({said}).")


def _within(seconds: float, f: Callable, *given) -> str:
    """Call f(*given), and wait for it so long at most; why it did not end well, "" if it did."""
    said = [f"no answer in {seconds:.0f} s"]

    def call() -> None:
        try:
            f(*given)
            said[0] = ""
        except Exception as error:
            said[0] = _about(error)

    thread = threading.Thread(target=call, daemon=True)  # else the process would wait for it at its exit
    thread.start()
    thread.join(seconds)
    return said[0]


def _tensorboard(workdir: pathlib.Path, *, config: dict[str, Any], first_step: int) -> tuple[Log, Callable]:
    # Not its SummaryWriter: that writes from a thread, and where the disk is full waits for that one for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    folder = workdir / "tensorboard"
    begun = folder.is_dir()
    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"))

    def put(step: int, **what) -> None:
        writer.write_event(Event(step=step, wall_time=time.time(), **what))
        writer.flush()

    def log(step: int, row: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        put(step, summary=Summary(value=values))

    if begun:  # what it has from first_step on is forgotten
        put(first_step, session_log=SessionLog(status=SessionLog.START))
    return log, lambda failed: writer.close()


def _wandb(workdir: pathlib.Path, *, config: dict[str, Any], first_step: int) -> tuple[Log, Callable]:
    import wandb

    path = workdir / WANDB_ID
    if not (first_step and path.is_file()):
        stored.write_json(path, {"id": secrets.token_hex(8)})
    run = wandb.init(
        id=stored.read_json(path)["id"],
        name=workdir.resolve().name,
        dir=str(workdir),
        config=config,
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")  # its own counter cannot go back to the step of a checkpoint
    return lambda step, row: run.log({"step": step, **row}), lambda failed: run.finish(exit_code=int(failed))


def _about(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error):.300}"

"""What a run may continue with: the config, the beginning and the data it began with, in the workdir it began in."""

import contextlib
import pathlib
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from moe_embed import bucket, checkpoint, metrics, stored
from moe_embed import config as config_lib
from moe_embed.config import Config, UserError
from moe_embed.load import DESCRIPTION, Description, read_description

LOCK = "lock"  # in a workdir that is written to
# What a rerun may say otherwise. The data itself is compared by content: the fingerprint beside each checkpoint.
MAY_CHANGE = (
    "data.sources",
    "data.tokenizer",
    "mesh.",
    "run.eval_every",
    "run.save_every",
    "run.keep",
    "run.log_to",
    "run.max_skips",
    "run.watchdog",
    "run.recompute",
    "data.dev",
    "data.rows",
    "data.row_length",
    "data.workers",
    "loss.form",
)


def same_beginning(
    before: Description | None, init_from: str | None, workdir: pathlib.Path, *, begun: bool
) -> str | None:
    """What the run in `workdir` starts from. UserError where an earlier call said otherwise: it would be another run."""
    if before is None or before.config is None or (not begun and init_from):
        return init_from  # new; or nothing is trained yet
    if init_from and init_from != before.init_from:
        began = f"--init_from={before.init_from}" if before.init_from else "fresh parameters"
        raise UserError(
            f"{workdir} began with {began}, not --init_from={init_from}; leave it out, or name another --workdir."
        )
    if before.init_from and not begun:
        raise UserError(
            f"{workdir} was to begin with --init_from={before.init_from}; say so again, or name another --workdir."
        )
    return before.init_from


def workdir_of(text: str) -> pathlib.Path:
    """A --workdir. UserError for an object store other than gs://, of which a path would make a folder of that name here."""
    return bucket.path_of(text, flag="--workdir=")


def check_kind(workdir: pathlib.Path) -> None:
    """UserError for what no run can be in: a file, a folder of another kind, one that cannot be written. Nothing is made."""
    bucket.check(workdir)
    if bucket.is_file(workdir / "config.json") and not bucket.is_file(workdir / DESCRIPTION):
        raise UserError(
            f"--workdir={workdir} is a Hugging Face folder; name another --workdir, and --init_from={workdir}."
        )
    if (before := _before(workdir)) and before.config is None:
        raise UserError(f"{workdir} is a model folder, not a run; name another --workdir, and --init_from={workdir}.")
    if not bucket.is_remote(workdir) and workdir.exists():
        _check_writable(workdir)


def check_workdir(config: Config, workdir: pathlib.Path, *, allow: Collection[str] = ()) -> None:
    """Make the workdir, or recognise it. UserError if it cannot be written, or holds checkpoints of another config.

    `allow` names parts of the data fingerprint that may change ("seed", "batch_size"), and with them their fields.
    """
    if not bucket.is_remote(workdir):
        _check_writable(workdir)
    if before := _before(workdir):
        refuse_changes(before.config, config, workdir, allow=allow)


def _before(workdir: pathlib.Path) -> Description | None:
    """What stands in a workdir with checkpoints; None of another."""
    there = bucket.is_file(workdir / DESCRIPTION) and checkpoint.steps(workdir / "checkpoints")
    return read_description(workdir) if there else None


def _check_writable(workdir: pathlib.Path) -> None:
    """Makes it if absent."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "writable").write_bytes(bytes(65536))  # on a full disk an empty file can still be made
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            (workdir / "writable").unlink()


def say_if_begun(workdir: pathlib.Path) -> None:
    """A run that begins where another has been says so: its checkpoints were removed, or it was killed before the first."""
    rows = metrics.read(workdir / "metrics.jsonl")
    if rows:
        print(f"starting over in {workdir}: it has rows up to step {rows[-1]['step']}, and no checkpoint.")


@contextlib.contextmanager
def alone(workdir: pathlib.Path | None) -> Iterator[None]:
    """Within it no other run writes to the workdir (None: nor does this process). UserError where one does; a bucket has no locks."""
    lock = None
    if workdir and not bucket.is_remote(workdir):
        try:
            lock = stored.open_alone(workdir / LOCK)
        except BlockingIOError as error:
            raise UserError(
                f"another process trains in {workdir}; wait for it, stop it, name another --workdir, or, if its machine "
                f"is gone, delete {workdir / LOCK}."
            ) from error
        except OSError as error:
            raise UserError(f"{workdir / LOCK} cannot be opened: {error.strerror}.") from error
    try:
        yield
    finally:
        if lock:
            (workdir / LOCK).unlink(missing_ok=True)
            lock.close()


def check_space(workdir: pathlib.Path, num_bytes: int) -> None:
    """UserError where the next checkpoint, of so many bytes, would not fit beside those that are there; a bucket has no end."""
    if bucket.is_remote(workdir):
        return
    free = shutil.disk_usage(workdir).free
    if free < num_bytes:
        raise UserError(
            f"--workdir={workdir} has {free / 2**30:.2f} GiB free, and a checkpoint takes {num_bytes / 2**30:.2f} GiB; make room."
        )


def refuse_changes(before: Config, now: Config, workdir: pathlib.Path, *, allow: Collection[str] = ()) -> None:
    """A run continues only under the config it began with; the mesh, and how often it saves or evaluates, may change.

    So may its length, where the learning rate of a step does not depend on it.
    """
    old, new = config_lib.to_dict(before), config_lib.to_dict(now)
    changed = [f"{s}.{k}" for s in new for k in new[s] if old[s][k] != new[s][k]]
    may_change = MAY_CHANGE + (("run.steps",) if now.optim.schedule in ("constant", "inverse_sqrt") else ())
    may_change += tuple(f"{section}.{name}" for name in allow for section in config_lib.SECTIONS)
    refused = [name for name in changed if not name.startswith(may_change)]
    if refused:
        value = lambda tree, name: tree[name.split(".")[0]][name.split(".")[1]]  # noqa: E731
        raise UserError(*(
            f"{workdir} was trained with config.{name}={value(old, name)!r}, not {value(new, name)!r}; "
            f"give another --workdir, or the old value." for name in refused
        ))  # fmt: skip


def check_fingerprint(saved: dict, now: dict, workdir: pathlib.Path, *, allow: Collection[str] = ()) -> None:
    """The data a run continues with is the data it began with, but for what `allow` names ("files", "seed", ...).

    UserError names everything that changed, file by file. What is allowed is said.
    """
    unknown = sorted(set(allow) - set(now))
    if unknown:
        raise UserError(f"--allow_data_change={unknown[0]} is none of {', '.join(now)}.")
    faults = []
    for name in now:
        before = saved[name] if name in saved else None
        if before == now[name]:
            continue
        changes = (
            _files_changed(before, now[name])
            if name == "files" and before
            else [f"{name} was {before}, is {now[name]}"]
        )
        if name in allow:
            print(f"allowed     {'; '.join(changes)}: which pairs are in a step changes with it")
        else:
            faults += [f"the data of {workdir} changed: {change}." for change in changes]
    if faults:
        raise UserError(
            *faults, "Give the old data or another --workdir, or continue with this by --allow_data_change=NAME[,NAME]."
        )


def _files_changed(before: Sequence[list], now: Sequence[list]) -> list[str]:
    """What became of each file, of [name, pairs, digest] each."""
    gone, came_new, changed = [], [], []
    for name in dict.fromkeys(name for name, *_ in (*before, *now)):  # files of several folders may have one name
        old, new = (Counter(tuple(of) for other, *of in files if other == name) for files in (before, now))
        left, came = list((old - new).elements()), list((new - old).elements())
        for (number, _), (number_now, _) in zip(left, came, strict=False):
            counts = f"{number:,} pairs, now {number_now:,}"
            changed.append(f"{name} is another: it had {counts}" if number != number_now else f"{name} has other bytes")
        gone += [f"{name} ({number:,} pairs) is gone" for number, _ in left[len(came) :]]
        came_new += [f"{name} ({number:,} pairs) is new" for number, _ in came[len(left) :]]
    return [f"files: {one}" for one in (*gone, *came_new, *changed)] or ["files: their order is another"]

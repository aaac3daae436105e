"""A workdir in Google Cloud Storage, gs://BUCKET/PATH: what differs from a folder, for whoever writes or lists one.

An object is there whole or not at all, and replaces what had its name. Nothing is appended to, renamed or locked, and a
folder is no more than what names begin with. Listing and reading show what was last written, to all processes.
Other paths go through here unchanged. Orbax writes a checkpoint's arrays there itself, as far as it knows stores: gs:// alone.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable

from etils import epath

from moe_embed.config import UserError

# No signature or password: it would be written down. No pattern either: gcsfs deletes whatever one matches.
ADDRESS = re.compile(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/?#@*\[\]]+)+/?")

PATIENCE = 120.0  # seconds for a store that fails where a run begins, on top of gcsfs's own tries: a restart should outlast that
PAUSE = 10.0
TRIES = 3  # of deleting what is in a folder, where some of it was deleted meanwhile


def path_of(text: str | pathlib.Path | epath.Path, *, flag: str = "") -> pathlib.Path | epath.Path:
    """A workdir by its name, nothing asked of the network. UserError, which begins with `flag`, for an address of no use here."""
    text = str(text)
    if "://" not in text:
        return pathlib.Path(text)
    plain = re.split("[?#]", re.sub("://.*@", "://", text))[0]  # what may be said of it: a secret may have a '/' in it
    if not text.startswith("gs://"):
        scheme = text.partition("://")[0]
        raise UserError(
            f"{flag}{plain} is an object store that checkpoints cannot be written to: gs:// is one; mount "
            f"{scheme}:// and name the mounted folder."
        )
    if not ADDRESS.fullmatch(text):
        raise UserError(f"{flag}{plain} is not gs://BUCKET/PATH, or has one of ? # @ * [ ] in it.")
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f'{flag}{text} needs gcsfs, which is not installed: pip install -e ".[gcs]"')
    _store()
    return epath.Path(text.rstrip("/"))


def is_remote(path: pathlib.Path | epath.Path) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith("gs://")


def check(path: pathlib.Path | epath.Path) -> None:
    """UserError where nothing can be written, listed and deleted below a path in a bucket. It makes the first connection.

    A store that says no is believed at once; another failure is waited out, up to PATIENCE seconds.
    """
    if not is_remote(path):
        return
    probe, until = path / "writable", time.monotonic() + PATIENCE
    while True:
        try:
            write(probe, b"")
            listed = names(path)
            remove(probe)
            break
        except FileNotFoundError as error:
            raise UserError(f"--workdir={path} cannot be written: there is no bucket {path.parts[2]}.") from error
        except OSError as error:
            if _is_refusal(error) or time.monotonic() >= until:
                raise UserError(
                    f"--workdir={path} cannot be written: {error.strerror}; gcloud auth application-default login gives "
                    "credentials, and Storage Object User is the role they need."
                ) from error
            left = until - time.monotonic()
            print(f"{path} cannot be written: {error.strerror}; it is tried again for {left:.0f} s.", flush=True)
            time.sleep(PAUSE)
    if probe.name not in listed:
        raise UserError(f"--workdir={path} does not list what was just written there.")


def _is_refusal(error: OSError) -> bool:
    """Whether the store itself said no (401, 403), in what `errors_of` raises: asking again is of no use."""
    said = error.__cause__
    return getattr(said, "code", None) in (401, "401") or str(said).startswith("Forbidden")  # so gcsfs tells a 403


def read(path: pathlib.Path | epath.Path) -> bytes:
    """A file's bytes, none where there is no such file. OSError: it cannot be told."""
    if not is_remote(path):
        return path.read_bytes() if path.is_file() else b""
    try:
        with errors_of(path):
            return _store().cat_file(str(path))
    except FileNotFoundError:
        return b""


def is_file(path: pathlib.Path | epath.Path) -> bool:
    """Whether there is such a file. OSError: it cannot be told (where epath says no, or raises what gcsfs does)."""
    if not is_remote(path):
        return path.is_file()
    try:
        with errors_of(path):
            return _store().info(str(path))["type"] == "file"
    except FileNotFoundError:
        return False


def write(path: epath.Path, data: bytes) -> None:
    """One object, whole. OSError: it could not be, after the tries that gcsfs makes."""
    with errors_of(path):
        _store().pipe_file(str(path), data)


def names(folder: pathlib.Path | epath.Path) -> list[str]:
    """The files below a folder by their paths from it, sorted; none where there is no folder."""
    if not is_remote(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with errors_of(folder):
        start = str(folder).removeprefix("gs://") + "/"
        return sorted(name.removeprefix(start) for name in _store().find(str(folder)) if name.startswith(start))


def remove(path: pathlib.Path | epath.Path, *, first: str = "") -> None:
    """Delete a file or a folder if it is there; in a bucket the file `first` of the folder before all others."""
    if not is_remote(path):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return
    there = names(path)
    if first in there or not there:
        _delete(path, _store().rm_file, f"{path}/{first}" if there else str(path))
    for _ in range(TRIES):
        if left := [f"{path}/{name}" for name in there if name != first]:
            _delete(path, _store().rm, left)
            there = names(path)


def _delete(path: epath.Path, f: Callable, what: str | list[str]) -> None:
    """What is not there is deleted: gcsfs asks again where an answer was lost, and is told so; of a list it then stops."""
    with errors_of(path), contextlib.suppress(FileNotFoundError):
        f(what)


@functools.cache
def _store():
    """gcsfs, as epath and with it Orbax use it too."""
    os.environ["EPATH_USE_TF"] = "false"  # else an installed TensorFlow would be asked for some of it
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
        "false"  # the JSON API serves such buckets too, and is what is tested
    )
    import fsspec

    fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # others write there, Orbax among them
    for name in ("gcsfs", "google.auth"):  # they log, with a traceback, what is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def errors_of(path: pathlib.Path | epath.Path):
    """Within it, of a path in a bucket: FileNotFoundError as it is; all else that gcsfs raises (HttpError, aiohttp's, google.auth's) as an OSError with a sentence."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) or not is_remote(path):
            raise
        said = str(error).strip().splitlines()
        raise OSError(errno.EIO, (said[-1] if said else type(error).__name__).rstrip("."), str(path)) from error

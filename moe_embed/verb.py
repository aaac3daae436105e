"""How every verb starts and ends: its flags, jax set up once, exit 0 or 2 with one clear sentence, no traceback for a user's fault."""

import argparse
import errno
import glob
import itertools
import os
import pathlib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence

from moe_embed import fields
from moe_embed.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # whoever runs it can mend that
# A TPU is /dev/accel0 or, from v5e on, /dev/vfio/0; /dev/vfio/vfio is there wherever the kernel's module is.
ACCELERATORS = ("/dev/nvidiactl", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd", "/dev/dxg")


class Parser(argparse.ArgumentParser):
    """The flags of the verb `name`. What is wrong with them is one sentence, a UserError, where argparse prints its usage.

    With `overrides` parse_known_args also takes --config.a.b=value, and leaves them to config.load.
    """

    def __init__(self, name: str, description: str, *, overrides: bool = False):
        super().__init__(
            prog=f"python -m moe_embed.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.overrides = overrides

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's. A misspelt flag is named before one that is therefore missing."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in itertools.takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            left = not name.startswith("--") or (self.overrides and name.startswith("--config."))
            if not left and not any(flag.startswith(name) for flag in flags):
                raise UserError(f"{name} is no flag of {self.prog}{fields.did_you_mean(name, flags)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        """UserError with argparse's sentence."""
        raise UserError(f"{message}; {self.prog} --help shows all flags.")


def say(sentence: str) -> None:
    """A line about what is being done, on stderr and at once: what a verb prints may be read by a program."""
    print(sentence, file=sys.stderr, flush=True)


def check_output(path: pathlib.Path, flag: str) -> None:
    """UserError, before any work, when a file cannot be written at `path`: a missing folder, or a folder in its place."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        fault = f"{folder} is read-only" if folder.is_dir() else f"there is no folder {folder}"
        what = "is a folder" if path.is_dir() else f"cannot be written: {fault}"
        raise UserError(f"{flag}={path} {what}; name a file in a folder that exists.")


def run(main: Callable[[Sequence[str]], int | None], *, copies: bool = False) -> typing.NoReturn:
    """Run a verb's main(argv): exit 0, or 2 with the sentences of a UserError. Also the process-wide jax settings.

    A verb is one process's work, and refuses to be started as several, unless `copies` of it are no harm or it joins them
    itself (cluster.start). Of joined processes one that fails ends all, with its sentence.
    """
    import jax  # here: the door itself is plain Python

    from moe_embed import cluster

    if not os.environ.get("JAX_PLATFORMS"):
        os.environ.pop("JAX_PLATFORMS", None)  # empty: jax chooses, as where it is not set
        if not any(map(glob.glob, ACCELERATORS)):
            jax.config.update(
                "jax_platforms", "cpu"
            )  # else an installed libtpu or CUDA plugin is probed, and complains
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cluster.OWN_CACHE)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    why = ""
    try:
        if not copies:
            cluster.refuse_several(pathlib.Path(sys.argv[0]).stem)
        status = main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone is noticed here, not by the interpreter at its end
    except UserError as error:
        status, why = 2, str(error)
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
    except KeyboardInterrupt:
        status, why = 130, "it was stopped"
        print("\nstopped.", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, why = 141, "nobody reads its output"
    except Exception as error:
        status, why = 1, f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and "initialize backend" in str(error):
            print(
                f"error: jax finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {error}",
                file=sys.stderr,
            )
            status = 2
        elif isinstance(error, OSError) and str(error.filename).startswith("gs://"):
            status, why = 2, f"{error.filename} cannot be read or written: {error.strerror}."
            print(f"error: {why}", file=sys.stderr)
        elif isinstance(error, OSError) and error.errno in FULL:
            status, why = (
                2,
                f"{error.strerror}{f': {error.filename}' if error.filename else ''}; make room, or name another place.",
            )
            print(f"error: {why}", file=sys.stderr)
        elif said := cluster.failure_after(why):  # another process has left, and a collective with it
            status, why = said
            print(f"error: {why}", file=sys.stderr)
        elif cluster.several() and any(library in str(error) for library in ("Gloo", "NCCL")):
            status, why = (
                cluster.GONE,
                f"a collective broke: a process is gone without a word, killed or with its machine ({why})",
            )
            print(f"error: {why}", file=sys.stderr)
        elif cluster.several():
            traceback.print_exc()
        else:
            raise
    cluster.end(status or 0, why)
    sys.exit(status or 0)


def local_path(text: str) -> pathlib.Path:
    """The type of an output's flag. UserError for an address, of which a path would make a folder of that name here."""
    if "://" in text:
        raise UserError(
            f"{text.partition('://')[0]}:// is no folder of this machine; this is written to a local one: copy it there afterwards."
        )
    return pathlib.Path(text)

"""How every verb starts and ends: jax set up once, exit 0 or 2 with one clear sentence, no traceback for a user's fault."""

import errno
import os
import pathlib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence

from moe_embed.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # whoever runs it can mend that


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

    accelerators = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/vfio", "/dev/kfd", "/dev/dxg")
    if "JAX_PLATFORMS" not in os.environ and not any(map(os.path.exists, accelerators)):
        jax.config.update("jax_platforms", "cpu")  # else an installed libtpu or CUDA plugin is probed, with a warning
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_embed/xla"))
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
        elif isinstance(error, OSError) and error.errno in FULL:
            status, why = (
                2,
                f"{error.strerror}{f': {error.filename}' if error.filename else ''}; make room, or name another place.",
            )
            print(f"error: {why}", file=sys.stderr)
        elif cluster.failure():  # another process has left, and a collective with it
            status, why = cluster.failure()
            print(f"error: {why}", file=sys.stderr)
        elif cluster.several() and "Gloo" in str(error):
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

"""How every verb starts and ends: jax set up once, exit 0 or 2 with one clear sentence, no traceback for a user's fault."""

import os
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence

from moe_embed.config import UserError


def check_output(path: pathlib.Path, flag: str) -> None:
    """UserError, before any work, when a file cannot be written at `path`: a missing folder, or a folder in its place."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        fault = f"{folder} is read-only" if folder.is_dir() else f"there is no folder {folder}"
        what = "is a folder" if path.is_dir() else f"cannot be written: {fault}"
        raise UserError(f"{flag}={path} {what}; name a file in a folder that exists.")


def run(main: Callable[[Sequence[str]], int | None]) -> typing.NoReturn:
    """Run a verb's main(argv): exit 0, or 2 with the sentences of a UserError. Also the process-wide jax settings."""
    import jax  # here: the door itself is plain Python

    accelerators = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/vfio", "/dev/kfd", "/dev/dxg")
    if "JAX_PLATFORMS" not in os.environ and not any(map(os.path.exists, accelerators)):
        jax.config.update("jax_platforms", "cpu")  # else an installed libtpu or CUDA plugin is probed, with a warning
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_embed/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()  # a reader that has gone is noticed here, not by the interpreter at its end
    except UserError as error:
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except RuntimeError as error:
        if "initialize backend" not in str(error):
            raise
        print(
            f"error: jax finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {error}", file=sys.stderr
        )
        status = 2
    sys.exit(status or 0)

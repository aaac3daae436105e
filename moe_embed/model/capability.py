"""Which GPUs the kernels for Triton run on. On one that is too old, what the other platforms run is run: XLA compiles it."""

import re
from collections.abc import Callable, Iterable

import jax

LEAST = (8, 0)  # compute capability, that of Ampere: jax's Pallas refuses to compile for Triton below it; a T4 has 7.5


def too_old(devices: Iterable[jax.Device]) -> str:
    """The first GPU among `devices` that Triton's kernels do not run on, in words; "" where there is none."""
    for device in devices:
        found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
        if found and tuple(map(int, found.groups())) < LEAST:
            return f"{device.device_kind} has compute capability {found[0]}, and Triton's kernels need {LEAST[0]}.{LEAST[1]}"
    return ""


def choose(kernel: Callable, *, otherwise: Callable) -> Callable:
    """What CUDA devices are to run: `kernel`, or `otherwise` if one of this process's is too old for it."""
    return otherwise if too_old(jax.devices()) else kernel

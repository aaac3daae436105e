"""What a bug report needs: devices, memory, versions, precision, disk, and how fast this machine multiplies.

python -m moe_embed.doctor
"""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import moe_embed
from moe_embed import verb
from moe_embed.model import capability

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "tensorflow-datasets",
            "ml-collections", "torch", "transformers", "sentence-transformers")  # fmt: skip
KERNELS = {"gpu": "Pallas for Triton", "tpu": "megablox and splash attention"}  # of jax; the rest is XLA's own


def main(argv: Sequence[str]) -> None:
    verb.Parser("doctor", __doc__).parse_args(argv)
    for name, value in facts().items():
        print(f"{name:<12} {value}")


def facts() -> dict[str, str]:
    """Name -> one line of text, measured now."""
    devices = jax.devices()
    return {
        "moe_embed": moe_embed.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {version}" for name, version in _versions().items()),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} process(es)",
        "cores": f"{os.cpu_count()}",
        "memory": _memory(devices[0]),
        "bfloat16": _bfloat16(devices[0]),
        "kernels": capability.too_old(devices) or KERNELS.get(devices[0].platform) or "XLA's own",
        "multiply": f"{multiply_rate(jnp.float32):,.0f} GFLOP/s float32, {multiply_rate(jnp.bfloat16):,.0f} bfloat16 "
        "(2048 x 2048, one device)",
        "disk": f"{shutil.disk_usage('.').free / 2**30:,.0f} GiB free here",
        "cache": str(jax.config.jax_compilation_cache_dir),
    }


def multiply_rate(dtype, *, size: int = 2048, repeats: int = 3) -> float:
    """Billions of floating-point operations a second in a square matrix product: the best of `repeats`."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _memory(device) -> str:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return f"{stats['bytes_limit'] / 2**30:,.1f} GiB on each device"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:,.1f} GiB of the host"


def _bfloat16(device) -> str:
    if device.platform == "cpu":
        return "computed, but slower than float32 on most CPUs: use encoder.dtype=float32"
    if old := capability.too_old([device]):
        return f"not native ({old}): use encoder.dtype=float32"
    return "native: use encoder.dtype=bfloat16"


if __name__ == "__main__":
    verb.run(main, copies=True)

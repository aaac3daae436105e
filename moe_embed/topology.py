"""The accelerators that can be planned for: what a chip can do, and the names people give to groups of them."""

import dataclasses
import re

from moe_embed.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one chip, as its maker states them. None of them was measured here."""

    name: str
    flops: float  # bfloat16 multiplications and additions a second, dense
    hbm: float  # bytes that a program can have
    bandwidth: float  # bytes a second from and to HBM
    wires: float  # bytes a second that a chip sends to others of its slice, or its host, over all its links
    network: float = 0.0  # bytes a second to other hosts, where `wires` end at the host
    cores: int = 1  # that a chip has in the suffix of a name: v5p-64 is 32 chips
    slices: tuple[str, ...] = ()  # shapes that libtpu knows; () is a GPU, for which nothing can be compiled here
    options: tuple[tuple[str, str], ...] = ()  # that libtpu needs beside the shape


GIB, GB, TERA = 2.0**30, 1e9, 1e12
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. A link speed in Gbit/s there is the sum over a chip's links, one direction.
# What a program can have of the HBM is what libtpu 0.0.42 says when it refuses one ("exceeds available HBM (15.75G)").
# GPU: NVIDIA's data sheets of the SXM boards, dense; of the memory GPU_SHARE, which launch/gpus.sh lets jax take; NVLink one way; a
# 400 Gbit/s card for each GPU of several hosts.
GPU_SHARE = 0.92
CHIPS = (
    Chip(name="v5e", flops=197 * TERA, hbm=15.75 * GIB, bandwidth=819 * GB, wires=1600 * GB / 8, slices=FLAT),
    Chip(name="v6e", flops=918 * TERA, hbm=31.24 * GIB, bandwidth=1640 * GB, wires=3584 * GB / 8, slices=FLAT),
    Chip(name="v5p", flops=459 * TERA, hbm=95.73 * GIB, bandwidth=2765 * GB, wires=4800 * GB / 8, slices=CUBES, cores=2),
    Chip(name="v4", flops=275 * TERA, hbm=30.75 * GIB, bandwidth=1228 * GB, wires=2400 * GB / 8, slices=CUBES, cores=2,
         options=(("chip_config_name", "megacore"),)),
    Chip(name="h100", flops=989 * TERA, hbm=GPU_SHARE * 80 * GB, bandwidth=3350 * GB, wires=450 * GB, network=50 * GB),
    Chip(name="h200", flops=989 * TERA, hbm=GPU_SHARE * 141 * GB, bandwidth=4800 * GB, wires=450 * GB, network=50 * GB),
    Chip(name="a100", flops=312 * TERA, hbm=GPU_SHARE * 80 * GB, bandwidth=2039 * GB, wires=300 * GB, network=50 * GB),
)  # fmt: skip
GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A number of chips that work together."""

    name: str
    chip: Chip
    num_chips: int
    slice: str  # libtpu's name, "v5e:2x4"; "" for GPUs

    @property
    def wires(self) -> float:
        """Bytes a second that a chip sends, at the narrowest place."""
        return self.chip.network if not self.slice and self.num_chips > GPUS_A_HOST else self.chip.wires


def find(name: str) -> Topology:
    """ "v5e-8", "v5p-64", "h100-8" or "8xH100" -> Topology; UserError with the known names for any other."""
    text = name.lower().replace("v5litepod", "v5e")
    turned, plain = re.fullmatch(r"(\d+)x([a-z]\w*)", text), re.fullmatch(r"(\w+)-(\d+)", text)
    count, kind = turned.groups() if turned else plain.groups()[::-1] if plain else ("0", "")
    for chip in CHIPS:
        if chip.name != kind:
            continue
        if not chip.slices and int(count) > 0 and (int(count) <= GPUS_A_HOST or int(count) % GPUS_A_HOST == 0):
            return Topology(name=name, chip=chip, num_chips=int(count), slice="")
        for shape in chip.slices:
            if num_chips(shape) * chip.cores == int(count):
                return Topology(name=name, chip=chip, num_chips=num_chips(shape), slice=f"{chip.name}:{shape}")
    raise UserError(f"--topology={name} is not known; known: {', '.join(known(chip) for chip in CHIPS)}.")


def bigger(topology: Topology) -> Topology | None:
    """The next one up of the same chips, mostly twice as many; None beyond the largest."""
    chip, twice = topology.chip, 2 * topology.num_chips
    counts = [num_chips(shape) for shape in chip.slices]
    if not counts:  # of GPUs up to a host's, then whole hosts
        counts = [twice if twice <= GPUS_A_HOST or not twice % GPUS_A_HOST else GPUS_A_HOST]
    more = [count for count in counts if count > topology.num_chips]
    return find(f"{chip.name}-{min(more) * chip.cores}") if more else None


def num_chips(shape: str) -> int:
    """ "2x4" -> 8."""
    product = 1
    for size in shape.split("x"):
        product *= int(size)
    return product


def known(chip: Chip) -> str:
    """The names of all its groups, for a sentence."""
    if not chip.slices:
        return f"{chip.name}-1 to -{GPUS_A_HOST} and multiples of {GPUS_A_HOST}"
    counts = [str(num_chips(shape) * chip.cores) for shape in chip.slices]
    return f"{chip.name}-{{{','.join(counts)}}}"

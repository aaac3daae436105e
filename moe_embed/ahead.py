"""The train step compiled ahead of time, for chips that are not here: what it holds, computes and sends by its own HLO.

libtpu compiles for any TPU slice without one. The compiler's figures are those of a compile, not of a run.
"""

import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_embed import config as config_lib
from moe_embed import hlo, hlo_count, sharding
from moe_embed import topology as topology_lib
from moe_embed.config import UserError
from moe_embed.estimate import Step, expert_parts
from moe_embed.model.grouped_matmul import tile_rows
from moe_embed.program import Program

# Without these libtpu asks a metadata server what machine this is, and two processes collide on a lock file.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
ATTENTION_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of splash attention's kernels; scores are computed in each


class Compiled(NamedTuple):
    """A step that XLA takes."""

    seconds: float  # that compiling took
    arguments: int  # bytes on a device, and so on
    temporaries: int
    outputs: int
    aliased: int  # outputs in the place of arguments
    peak: int  # the most that is alive at once, arguments included. `temporaries` counts what takes turns in one place twice:
    # 15.5 GiB where the compiler's own report had 11.5 GiB in use, of which it gives 11.3 as the peak (v5e-8, libtpu 0.0.42)
    count: hlo_count.Count | None  # None: this libtpu's program cannot be read back
    note: str


class Refused(NamedTuple):
    """A step that XLA does not take, for want of memory on a device."""

    seconds: float
    needed: float
    available: float


def devices(topology: topology_lib.Topology) -> Sequence:
    """The chips of a slice, for compiling only. UserError if libtpu is absent or does not know it."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {topology.name} needs libtpu, which is not installed; install the tpu extra: pip install -e .[tpu]"
        )
    from jax.experimental import topologies

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if topology.num_chips == 1 else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice, **dict(topology.chip.options), **one_chip
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot plan for {topology.name} ({topology.slice}): {str(error)[:200]}") from error


def abstract_batch(config: config_lib.Config, step: Step, *, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that a step takes, by name, without contents; a teacher's vectors as wide as the model's."""
    c, all_rows, pairs = config.data, config.data.rows * step.num_devices, step.items * step.num_devices
    shapes = {f"{name}_MBL": (step.num_micro, all_rows, c.row_length) for name in ("tokens", "segments", "positions")}
    floats = {}
    if config.loss.objective == "mlm":
        places = math.ceil(config.loss.mask_fraction * c.row_length)
        shapes |= {f"{name}_MBZ": (step.num_micro, all_rows, places) for name in ("place", "target")}
    else:
        shapes |= {"query_slot_N": (pairs,), "query_id_N": (pairs,)}
        shapes |= {"document_slot_N": (step.candidates,), "document_id_N": (step.candidates,)}
        if config.loss.distill == "scores":
            floats = {"teacher_score_N": (step.candidates,)}
        elif config.loss.distill == "embeddings":
            floats = {f"teacher_{side}_ND": (pairs, config.encoder.dim) for side in ("query", "document")}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    batch |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in floats.items()}
    laid_out = sharding.shardings(batch, column="activation", mesh=mesh)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid_out[name]) for name, x in batch.items()}


def compile_step(prog: Program, step: Step, *, options: dict | None = None) -> Compiled | Refused:
    """Compile `prog.step` for its mesh, and count. UserError if XLA refuses for another reason than memory.

    `options` are XLA's own.
    """
    start = time.perf_counter()
    platform = prog.mesh.devices.flat[0].platform
    batch = abstract_batch(prog.config, step, mesh=prog.mesh)
    lowered = prog.step.trace(prog.abstract_state, batch).lower(lowering_platforms=(platform,))
    try:
        with uncached():
            compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        needed = refusal(str(error))
        if needed is None:
            raise UserError(f"XLA does not compile this step: {str(error)[:400]}") from error
        return Refused(time.perf_counter() - start, *needed)
    stats = compiled.memory_analysis()
    count, note = None, ""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # a libtpu newer than its jaxlib: RET_CHECK
        note = f"this libtpu's program cannot be read back, so nothing in it is counted: {str(error)[:100]}"
    else:
        count = count_step(text, prog)
    return Compiled(
        time.perf_counter() - start, stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes,
        stats.alias_size_in_bytes, stats.peak_memory_in_bytes, count, note,
    )  # fmt: skip


@contextlib.contextmanager
def uncached():
    """Keep what is compiled out of the persistent cache: a program for chips that are not here cannot be read back from it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def refusal(message: str) -> tuple[float, float] | None:
    """Bytes (needed, available) of HBM in XLA's words; what it calls temporaries has the arguments in it. None: other words."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (rf"temporaries \({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        found = re.search(pattern, message)
        if found:
            number, unit, limit, limit_unit = found.groups()
            return float(number) * UNITS[unit], float(limit) * UNITS[limit_unit]
    return None


def count_step(text: str, prog: Program) -> hlo_count.Count:
    """Count the step in its optimised HLO.

    How many tiles the grouped products of a mixture have depends on the routing. They count as if devices shared the choices
    evenly and half of each expert's last tile were empty.
    """
    config, parts = prog.config, expert_parts(prog.mesh)
    choices, experts = config.data.rows * config.data.row_length * config.moe.top_k, config.moe.num_experts // parts
    tile = tile_rows(choices * parts, num_experts=experts)
    rows = choices + experts * tile / 2

    def trips(op_name: str) -> float | None:
        _, scope, path = op_name.rpartition("grouped_matmul")
        of_one_expert = path.count("while") > 1  # a loop over experts is around it
        return rows / tile / (experts if of_one_expert else 1) if scope else None

    def kernel_flops(kernel: hlo.Instruction, operands: list[hlo.Array]) -> float | None:
        return grouped_flops(kernel, operands, rows=rows) or attention_flops(kernel, operands)

    return hlo_count.count(hlo.read(text), kernel_flops=kernel_flops, trips=trips)


def grouped_flops(kernel: hlo.Instruction, operands: list[hlo.Array], *, rows: float) -> float | None:
    """Of megablox: `rows` times the matrix of one expert, which is an operand (gmm) or the result (tgmm)."""
    if not re.match(r"t?gmm\b", kernel.name):
        return None
    experts = next(array for array in (*operands, *kernel.arrays) if len(array.dims) == 3)
    return 2.0 * rows * experts.dims[1] * experts.dims[2]


def attention_flops(kernel: hlo.Instruction, operands: list[hlo.Array]) -> float | None:
    """Of splash attention: products of [L, K] and [K, J], as if all of a row's keys were in its segment."""
    phase = hlo.one(r"splash_mha_(fwd|dq|dkv)", kernel.name)
    if phase is None:
        return None
    q, k = [array for array in operands if array.dtype in ("bf16", "f32") and len(array.dims) >= 3][:2]
    fused = any(len(array.dims) > len(q.dims) for array in kernel.arrays)  # dq too, a part for each block of keys
    products = ATTENTION_PRODUCTS[phase] + (phase == "dkv" and fused)
    return 2.0 * products * math.prod(q.dims) * k.dims[-2]

"""What a compiled program does, counted in its HLO: matrix products, collectives, kernels, and how often each runs.

XLA's own `cost_analysis` counts the body of a loop once. Here the program is walked from its entry: fusions, calls, branches
and loops, and each product and collective counts as often as the loops around it run. Nothing is guessed: a loop with a
product or a collective in it and no length in its text is an error, and a kernel that nobody can count is named.

Bytes of a collective are those that one device sends over the wires in a ring of n devices: (n - 1) times its part in an
all-gather, (n - 1) / n of the operand in a reduce-scatter or all-to-all, twice that in an all-reduce, the operand in a
collective-permute.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_embed.config import UserError
from moe_embed.hlo import Array, Computation, Instruction, Module, ints, one, trip_count

WIRE = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,  # at most
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}  # sent by one device, in units of its operand
BOOKKEEPING = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "AsyncCollectiveStart",
    "AsyncCollectiveDone", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "Sharding", "TopK", "PartialReduce", "ApproxTopK",
}  # fmt: skip


class Work(NamedTuple):
    """Something that is done `times` in a run of the program."""

    what: str  # dot, convolution, all-gather, ...; a kernel's name
    op_name: str
    times: float
    flops: float = 0.0  # once
    bytes: float = 0.0  # sent by one device, once
    place: str = ""  # name of the instruction


class Loop(NamedTuple):
    """A loop whose length was asked for."""

    name: str
    op_name: str
    trips: float
    source: str  # "text", or "caller": its length depends on the data


class Count(NamedTuple):
    """All that counts in a program."""

    products: tuple[Work, ...]
    collectives: tuple[Work, ...]
    kernels: tuple[Work, ...]  # custom calls that compute; by the caller's arithmetic
    unknown: tuple[Work, ...]  # custom calls of which nobody says what they compute: missing in `flops`
    loops: tuple[Loop, ...]

    @property
    def flops(self) -> float:
        """Of products and kernels: twice the multiplications."""
        return sum(work.flops * work.times for work in self.products + self.kernels)

    def bytes_by_kind(self) -> dict[str, float]:
        """Opcode -> bytes sent by one device."""
        kinds = dict.fromkeys(sorted({work.what for work in self.collectives}), 0.0)
        for work in self.collectives:
            kinds[work.what] += work.bytes * work.times
        return kinds


def count(
    module: Module,
    *,
    kernel_flops: Callable[[Instruction, list[Array]], float | None] = lambda kernel, operands: None,
    trips: Callable[[str], float | None] = lambda op_name: None,
) -> Count:
    """Walk the program and count.

    Args:
      kernel_flops: (custom call, its operands' shapes) -> FLOPs of one run, None if it is not known.
      trips: op_name of a loop whose length depends on the data -> how often to count its body, None if it is not known.

    Raises UserError that names a loop that cannot be counted.
    """
    products, collectives, kernels, unknown, loops, seen = [], [], [], [], [], set()
    for inside, instruction, times in _walk(module, module.computations[module.entry], 1.0, trips, loops):
        operands = inside.operands(instruction)
        kind = instruction.opcode.removesuffix("-start")
        work = Work(kind, instruction.op_name, times, place=instruction.name)
        if kind in WIRE:
            kind, key = _collective(inside, instruction)
            if key is None or key not in seen:
                seen.add(key)
                wire = WIRE[kind](_group_size(instruction, module)) * sum(array.bytes for array in operands)
                collectives.append(work._replace(what=kind, bytes=wire))
        elif kind == "dot":
            products.append(work._replace(flops=_dot_flops(instruction, operands)))
        elif kind == "convolution":
            products.append(work._replace(flops=_convolution_flops(instruction, operands)))
        elif kind == "custom-call":
            flops = kernel_flops(instruction, operands)
            work = work._replace(what=re.sub(r"[.\d]+$", "", instruction.name), flops=flops or 0.0)
            (unknown if flops is None else kernels).append(work)
    return Count(*map(tuple, (products, collectives, kernels, unknown, loops)))


def _walk(module, inside: Computation, times: float, trips, loops) -> Iterator[tuple[Computation, Instruction, float]]:
    """(computation, instruction, how often it runs) for everything below a computation that may count."""
    for instruction in inside.instructions.values():
        names = re.findall(r"(?:calls|called_computations|to_apply)=\{?%([\w.\-]+)", instruction.attributes)
        if instruction.opcode in ("fusion", "call", "custom-call", "async-start"):
            for name in names:
                yield from _walk(module, module.computations[name], times, trips, loops)
        if instruction.opcode == "conditional":
            branches = one(r"branch_computations=\{([^}]*)\}", instruction.attributes) or instruction.attributes
            names = re.findall(r"%([\w.\-]+)", branches)
            below = [list(_walk(module, module.computations[name], times, trips, loops)) for name in names]
            yield from max(below, key=len)  # one of them runs; branches of ours differ in having anything to do at all
        elif instruction.opcode == "while":
            body = module.computations[one(r"body=%?([\w.\-]+)", instruction.attributes)]
            held = list(_walk(module, body, 1.0, trips, below := []))
            if held:
                loop = _loop(module, inside, instruction, trips)
                loops += [loop, *below]
                yield from ((where, what, times * loop.trips * once) for where, what, once in held)
        elif instruction.opcode.removesuffix("-start") in ("dot", "convolution", "custom-call", *WIRE):
            target = one(r'custom_call_target="([^"]*)"', instruction.attributes)
            if target not in BOOKKEEPING:
                yield inside, instruction, times


def _loop(module: Module, inside: Computation, loop: Instruction, trips) -> Loop:
    length = trip_count(module, inside, loop)
    if length is not None:
        return Loop(loop.name, loop.op_name, length, "text")
    length = trips(loop.op_name)
    if length is None:
        raise UserError(
            f"the loop {loop.name} ({loop.op_name}) of the compiled program holds matrix products or collectives, and how "
            "often it runs is not in its text: they cannot be counted."
        )
    return Loop(loop.name, loop.op_name, length, "caller")


def _dot_flops(dot: Instruction, operands: list[Array]) -> float:
    summed = ints(one(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes))
    return 2.0 * math.prod(dot.arrays[0].dims) * math.prod(operands[0].dims[dim] for dim in summed)


def _convolution_flops(convolution: Instruction, operands: list[Array]) -> float:
    """Twice the multiplications with a place that exists: neither padding nor a hole of a dilation (XLA's own rule).

    A TPU's dots are convolutions, batched ones with windows as wide as the batch of which one place is real.
    """
    labels = re.match(r".*dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes, re.DOTALL).groups()
    window = one(r"window=\{([^}]*)\}", convolution.attributes) or ""
    lhs, rhs, out = (
        dict(zip(label, array.dims, strict=True))
        for label, array in zip(labels, (operands[0], operands[1], convolution.arrays[0]), strict=True)
    )
    spatial = sorted(label for label in lhs if label.isdigit())

    def field(word: str, default: int) -> list[int]:
        text = one(rf"\b{word}=([\d_x\-]+)", window)
        return [ints(part.replace("_", " "))[0] for part in text.split("x")] if text else [default] * len(spatial)

    stride, low, lhs_dilate, rhs_dilate = (
        field("stride", 1),
        field("pad", 0),
        field("lhs_dilate", 1),
        field("rhs_dilate", 1),
    )
    places = 1
    for i, dim in enumerate(spatial):
        valid = 0
        for k in range(rhs[dim]):
            at = (o * stride[i] - low[i] + k * rhs_dilate[i] for o in range(out[dim]))
            valid += sum(1 for place in at if place % lhs_dilate[i] == 0 and 0 <= place // lhs_dilate[i] < lhs[dim])
        places *= valid
    groups = {
        word: int(one(rf"{word}_group_count=(\d+)", convolution.attributes) or 1) for word in ("feature", "batch")
    }
    return 2.0 * places * (lhs["f"] // groups["feature"]) * rhs["o"] * (lhs["b"] // groups["batch"])


def _collective(inside: Computation, collective: Instruction) -> tuple[str, tuple | None]:
    """What kind it is, and for one that stands in several places of the text (start, middle and end) its identity.

    A TPU's reduce-scatter may be written as a fusion of an all-reduce of which each device takes its own part.
    """
    kind = collective.opcode.removesuffix("-start")
    opcodes = {instruction.opcode for instruction in inside.instructions.values()}
    if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter") and "dynamic-slice" in opcodes:
        kind = "reduce-scatter"
    chain = one(r'chain_id="(\d+)"', collective.attributes)
    channel = one(r"channel_id=(\d+)", collective.attributes)
    return kind, None if chain is None else (kind, channel, chain, collective.arrays)


def _group_size(collective: Instruction, module: Module) -> int:
    """Among how many devices a collective runs; of a permutation it does not matter."""
    text = collective.attributes
    mesh = re.search(r"replica_groups=\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # a part of an axis is written axis:(before)size
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", text)
    if iota:
        return ints(iota[1])[-1]
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(ints(groups[1])) if groups else module.num_devices

"""Optimised HLO text, as `compiled.as_text()` prints it, read into computations; and how often its loops run.

A loop's length is what XLA wrote beside it, or what follows from a number that counts up to a limit, as lax.scan's do. For
anything else there is no answer, rather than a guess.
"""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # the other names say it
WRAPPERS = ("bitcast", "convert", "copy", "reshape", "copy-start", "copy-done")  # of one number: it stays what it is


class Array(NamedTuple):
    """A shape."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without the padding of any layout."""
        known = BITS[self.dtype] if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * known // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result; a tuple's, flat
    operands: tuple[str, ...]
    text: str  # what stands between its parentheses
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from in the Python program, with the named scopes."""
        return one(r'op_name="([^"]*)"', self.attributes) or ""


class Computation(NamedTuple):
    """Instructions by name, in order; the last one is the result unless another says so."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Array]:
        """The shapes an instruction is given, tuples flat."""
        return [array for name in instruction.operands for array in self.instructions[name].arrays]


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def one(pattern: str, text: str) -> str | None:
    """The first group of a pattern's first match."""
    found = re.search(pattern, text)
    return found[1] if found else None


def ints(text: str | None) -> tuple[int, ...]:
    """All whole numbers in a text."""
    return tuple(int(number) for number in re.findall(r"-?\d+", text or ""))


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(Array(d, ints(dims)) for d, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=\s]*)\]", text))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets: {text[start : start + 80]}")


def read(text: str) -> Module:
    """HLO text, as `compiled.as_text()` prints it -> Module."""
    blocks, entry, header = [], "", ""
    for line in text.splitlines():
        opens = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line) if not line.startswith(" ") else None
        if opens:
            blocks.append((opens[2], []))
            entry = opens[2] if opens[1] else entry
        elif line.startswith("HloModule"):
            header = line
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line) and blocks:
            blocks[-1][1].append(line)
        elif blocks and blocks[-1][1] and line.strip() != "}":
            blocks[-1][1][-1] += line  # an attribute that goes on
    computations = {name: _computation(name, lines) for name, lines in blocks}
    sizes = [ints(one(rf"{word}=(\d+)", header)) for word in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(size[0] for size in sizes if size))


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        is_root, label, rest = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line, re.DOTALL).groups()
        result = rest[: _closing(rest, 0) + 1] if rest.startswith("(") else rest.partition(" ")[0]
        rest = rest[len(result) :].lstrip()
        opens = rest.index("(")
        closes = _closing(rest, opens)
        inside = rest[opens + 1 : closes]
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        instructions[label] = Instruction(label, rest[:opens], _arrays(result), operands, inside, rest[closes + 1 :])
        root = label if is_root or not root else root
    return Computation(name, instructions, root)


class Number(NamedTuple):
    """A number in a loop: what the state holds at `index` when an iteration begins, plus `offset`; or just `offset`."""

    index: int | None
    offset: int


def trip_count(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """How often a `while` of the computation `inside` runs; None if the text does not say."""
    known = one(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known)
    condition, body = (
        module.computations[one(rf"{word}=%?([\w.\-]+)", loop.attributes)] for word in ("condition", "body")
    )
    compare = condition.instructions[condition.root]
    state = {"": lambda i: Number(i, 0)}
    if compare.opcode in ("fusion", "call"):  # a comparison on its own, wrapped
        values = [_number(module, condition, name, state) for name in compare.operands]
        condition = module.computations[one(r"(?:calls|to_apply)=%?([\w.\-]+)", compare.attributes)]
        compare, state = condition.instructions[condition.root], dict(enumerate(values))
    if compare.opcode != "compare":
        return None
    left, right = (_number(module, condition, name, state) for name in compare.operands)
    direction = one(r"direction=(\w+)", compare.attributes)
    if direction in ("GT", "GE"):
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    if left is None or right is None or left.index is None or direction not in ("LT", "LE", "NE"):
        return None
    first = _initial(module, inside, loop, left.index)
    after = _after(module, body, left.index)
    last = right.offset if right.index is None else None
    if right.index is not None and _after(module, body, right.index) == Number(right.index, 0):
        last = _initial(module, inside, loop, right.index)
        last = None if last is None else last + right.offset
    if None in (first, after, last) or after.index != left.index or after.offset <= 0:
        return None
    distance = last - (first + left.offset) + (direction == "LE")
    return max(-(-distance // after.offset), 0)


def _after(module: Module, body: Computation, index: int) -> Number | None:
    """What the state holds at `index` when an iteration ends."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    return _number(module, body, root.operands[index], {"": lambda i: Number(i, 0)})


def _initial(module: Module, inside: Computation, loop: Instruction, index: int) -> int | None:
    start = inside.instructions[loop.operands[0]]
    while start.opcode in WRAPPERS:
        start = inside.instructions[start.operands[0]]
    if start.opcode != "tuple":
        return None
    number = _number(module, inside, start.operands[index], {})
    return number.offset if number is not None and number.index is None else None


def _number(module: Module, inside: Computation, name: str, given: dict) -> Number | None:
    """The value of an instruction as a Number, None if it is not one.

    `given`: the values of the parameters by number, or under "" a function from an element of the one tuple to its value.
    """
    instruction = inside.instructions[name]
    operands = instruction.operands
    if instruction.opcode == "constant":
        return Number(None, int(instruction.text)) if re.fullmatch(r"-?\d+", instruction.text) else None
    if instruction.opcode == "parameter":
        place = int(instruction.text)
        return given[place] if place in given else None
    if instruction.opcode == "get-tuple-element":
        of_state = "" in given and inside.instructions[operands[0]].opcode == "parameter"
        return given[""](int(one(r"index=(\d+)", instruction.attributes))) if of_state else None
    if instruction.opcode in WRAPPERS:
        return _number(module, inside, operands[0], given)
    if instruction.opcode in ("fusion", "call"):
        called = module.computations[one(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes)]
        values = dict(enumerate(_number(module, inside, operand, given) for operand in operands))
        return _number(module, called, called.root, values)
    if instruction.opcode in ("add", "subtract"):
        a, b = (_number(module, inside, operand, given) for operand in operands)
        sign = 1 if instruction.opcode == "add" else -1
        if a is not None and b is not None and b.index is None:
            return Number(a.index, a.offset + sign * b.offset)
        if a is not None and b is not None and a.index is None and sign == 1:
            return Number(b.index, a.offset + b.offset)
    return None

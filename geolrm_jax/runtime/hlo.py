"""What a compiled program moves, from its text: collectives and memory traffic, times the trips of the loops around.

XLA's own `cost_analysis` counts the body of a loop once. A loop whose trips the text does not tell counts once here,
too, and is named.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Nothing is read or written: names for parts of what is there, or the second half of what is counted at its start.
FREE = {
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "constant",
    "get-dimension-size",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
INNER = {"async-start", "call", "conditional", "while"}  # their work is that of the computations they call
SLICES = {"dynamic-slice", "gather", "slice"}
ALIASES = {"bitcast", "copy", "convert", "reshape", "transpose"}  # between a fusion's parameter and a slice of it


class Shape(NamedTuple):
    """One array of a shape: bytes, 0 for what is kept on the chip, and how it is written, such as `f32[8,16]`."""

    size: int
    text: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    """Attributes and metadata."""
    root: bool

    def called(self) -> list[str]:
        """Names of computations that it runs, loop conditions and reductions of two numbers left out."""
        found = re.findall(r"(?:calls|body|(?:true|false)_computation)=%?([\w.\-]+)", self.rest)
        for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.rest):
            found += re.findall(r"%?([\w.\-]+)", group)
        if self.opcode == "call":
            found += re.findall(r"to_apply=%?([\w.\-]+)", self.rest)
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: as XLA names it.
      shape: of what each device gives.
      size: bytes of that.
      group: the numbers of the devices of the first group, in the order of the mesh.
      times: how often a run of the program does it.
      source: the operation that it comes from, as JAX names it.
    """

    kind: str
    shape: str
    size: int
    group: tuple[int, ...]
    times: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together, by the rings that need the fewest."""
        n = max(len(self.group), 1)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        return float(self.times * self.size * share.get(self.kind, (n - 1) / n))

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Axes of the mesh along which the group lies."""
        places = np.array(np.unravel_index(self.group, tuple(mesh.values())))
        return tuple(name for name, along in zip(mesh, places, strict=True) if len(set(along)) > 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program's text, taken apart.

    Attributes:
      computations: instructions by name of the computation.
      entry: the name of the one that runs.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def collectives(self) -> list[Collective]:
        """All exchanges, each with how often it is done.

        One that a TPU does in the background of others stands in several of their fusions, from its start to its end.
        """
        found: dict[tuple, Collective] = {}
        for place, i, times in self._walk(self.entry, 1):
            if _kind(i):
                channel, exchange = re.search(r"channel_id=\d+", i.rest), _collective(self, place, i, times)
                found.setdefault((channel[0] if channel else i.name, exchange), exchange)
        return list(found.values())

    def memory_traffic(self) -> int:
        """Bytes read from and written to the device's memory: what instructions take and give, fused ones as one.

        A slice of an array counts by itself and not by the array, and so does an update in place. What stays on the
        chip does not count. An estimate: XLA may keep or fetch more than the text says.
        """
        return sum(_traffic(self, place, i) * times for place, i, times in self._walk(self.entry, 1, fused=False))

    def unknown(self) -> list[str]:
        """Sources of loops whose trips are not in the text: they count once."""
        loops = (i for _, i, _ in self._walk(self.entry, 1) if i.opcode == "while")
        return sorted({_source(i) for i in loops if self.trips(i) is None})

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop's body runs, if the text says so."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        # A loop that counts goes on while its number is less than a constant, and looks at nothing else.
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
        root = _root(condition)
        compare = _root(self.computations[root.called()[0]]) if root.opcode == "fusion" else root
        constants = [c for name in root.operands if (c := condition[name]).opcode == "constant"]
        if "direction=LT" not in compare.rest or len(root.operands) != 2 or len(constants) != 1:
            return None
        return int(constants[0].rest) if constants[0].rest.isdigit() else None  # as where a truth value is compared

    def _walk(self, place: str, times: int, *, fused: bool = True) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs, with its computation and how often; those inside of fusions if asked for."""
        for i in self.computations[place].values():
            yield place, i, times
            if i.opcode in INNER or (fused and i.opcode == "fusion"):
                rounds = (self.trips(i) or 1) if i.opcode == "while" else 1
                for inner in i.called():
                    yield from self._walk(inner, times * rounds, fused=fused)


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    """What a computation gives."""
    return next(i for i in computation.values() if i.root)


def parse(text: str) -> Program:
    """Takes the text of a compiled program (`compiled.as_text()`) apart."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = start[2]
            computations[current] = {}
            entry = current if start[1] else entry
        elif current and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            computations[current][found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("expected the text of a compiled program, found no ENTRY in it")
    return Program(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    shape, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, text = text.lstrip().split("(", 1)
    operands, rest = _balanced("(" + text)
    if opcode in ("constant", "parameter"):  # its value, of any kind, or its number
        return Instruction(name, opcode, _shapes(shape), (), operands[1:-1], root)
    return Instruction(name, opcode, _shapes(shape), tuple(re.findall(r"%([\w.\-]+)", operands)), rest, root)


def _balanced(text: str) -> tuple[str, str]:
    """A text that starts with a parenthesis, cut after the one that closes it."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: at + 1], text[at + 1 :]
    raise ValueError(f"expected a closing parenthesis in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a shape such as `(f32[8,16]{1,0:T(8,128)}, s32[])`."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text)
    return tuple(
        Shape(0 if "S(1)" in layout else _bytes(kind, dims), f"{kind}[{dims}]") for kind, dims, layout in found
    )


def _bytes(kind: str, dims: str) -> int:
    count = math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    if kind in ("pred", "token", "opaque"):
        return count * (kind == "pred")
    bits = int(re.search(r"\d+", kind)[0])  # f32, bf16, u8, f8e4m3fn, c64
    return -(-count * bits // 8)


def _kind(i: Instruction) -> str:
    """The collective that an instruction is or starts; empty if none."""
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _collective(program: Program, place: str, i: Instruction, times: int) -> Collective:
    scope, kind = program.computations[place], _kind(i)
    # Of what lies on the chip the bytes count as well: they travel all the same.
    given = [s.text for name in i.operands if name in scope for s in scope[name].shapes]
    size = sum(_bytes(*re.fullmatch(r"(\w+)\[([\d,]*)\]", text).groups()) for text in given)
    if kind == "all-reduce" and place.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a TPU's fusion, in which each device keeps its part of the sum
    return Collective(kind, " ".join(given), size, _group(i), times, _source(i))


def _group(i: Instruction) -> tuple[int, ...]:
    """The first group of devices that exchange; of pairs, the first pair."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", i.rest):
        return tuple(int(n) for n in listed[1].split(",") if n)
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", i.rest):
        return tuple(int(n) for n in _iota(tiled[2]).reshape(_numbers(tiled[1]))[0])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", i.rest)
    if not named:
        return ()
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    axes, dims = [], []
    for name, size in sizes.items():  # an axis may be exchanged along a part of it: 'a':(2)4 is the middle of 2 x 4 x n
        part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", named[3])
        before, length = (1, size) if not (part and part[1]) else (int(part[1]), int(part[2]))
        axes += [False, part is not None, False]
        dims += [before, length, size // before // length]
    devices = _iota(named[2]) if named[2] else np.arange(math.prod(dims))
    first = tuple(slice(None) if exchanged else 0 for exchanged in axes)
    return tuple(int(n) for n in devices.reshape(dims)[first].ravel())


def _iota(text: str) -> np.ndarray:
    """The numbers of `[4,2]T(1,0)`: of an array counted through, transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (numbers.transpose(_numbers(order)) if order else numbers).ravel()


def _numbers(text: str) -> Sequence[int]:
    return [int(n) for n in text.split(",")]


def _source(i: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', i.rest)
    return found[1] if found else i.name


def _traffic(program: Program, place: str, i: Instruction) -> int:
    """Bytes that one run of an instruction reads and writes."""
    if i.opcode in FREE or i.opcode in INNER or i.opcode.endswith("-done"):
        return 0
    scope = program.computations[place]
    reads = [sum(s.size for s in scope[name].shapes) if name in scope else 0 for name in i.operands]
    writes = sum(s.size for s in i.shapes)
    if i.opcode in ("copy-start", "slice-start"):  # its result holds the operand too
        return reads[0] + i.shapes[0].size if i.opcode == "copy-start" else 2 * i.shapes[1].size
    if i.opcode in ("dynamic-slice", "slice"):
        return 2 * writes
    if i.opcode == "gather":
        return 2 * writes + reads[1]
    if i.opcode == "dynamic-update-slice":
        return 2 * reads[1]
    if i.opcode == "scatter":
        return sum(reads[1:]) + 2 * sum(reads[len(reads) // 2 + 1 :])
    if i.opcode == "fusion":
        return _fused_traffic(program.computations[i.called()[0]], reads, writes)
    return sum(reads) + writes


def _fused_traffic(inside: Mapping[str, Instruction], reads: Sequence[int], writes: int) -> int:
    """Traffic of a fusion: parameters that are only sliced count by their slices, what is updated by the update."""
    users: dict[str, list[Instruction]] = {}
    for i in inside.values():
        for name in i.operands:
            users.setdefault(name, []).append(i)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        for user in users.get(name, ()):
            if user.opcode in ALIASES and not user.root:
                yield from uses(user.name)
            else:
                yield name, user

    parameters = sorted((i for i in inside.values() if i.opcode == "parameter"), key=lambda i: int(i.rest))
    total = 0
    for parameter, size in zip(parameters, reads, strict=True):
        found = list(uses(parameter.name))
        if found and all(user.opcode in SLICES and user.operands[0] == name for name, user in found):
            total += min(size, sum(s.size for _, user in found for s in user.shapes))
        elif found and all(user.opcode == "dynamic-update-slice" and user.operands[0] == name for name, user in found):
            updates = [s.size for _, user in found for s in inside[user.operands[1]].shapes]
            total += sum(updates)
            writes -= min(writes, size) - sum(updates)
        else:
            total += size
    return total + max(writes, 0)

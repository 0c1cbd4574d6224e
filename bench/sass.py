"""Count the instructions that a warp executes, by pipe, before, in and after the main loop.

`read` takes the output of `nvdisasm` for one kernel and counts the instructions of the hot path:
those from the entry to the last EXIT. Code after it is cold (barrier retries, slow paths of a
division). The main loop is the loop with the most tensor-core instructions, the last of equal ones;
without them all loops before an atomic operation count as one. Both sides of a branch within a
section are counted, except in a main loop that also stores results, as of a kernel that walks
several tiles. What a branch skips there is the end of a tile. Exchanges between threads that a
branch in it skips are the first tile's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

TENSOR = ("HGMMA", "HMMA", "DMMA", "IMMA", "QGMMA")
MIO = ("SHFL", "LDS", "STS", "LDSM", "STSM", "ATOMS", "MOVM")
LSU = ("LDG", "STG", "LDGSTS", "ATOM", "ATOMG", "RED", "LDL", "STL", "UTMALDG", "UTMASTG")
LOADS = ("LDG", "LDGSTS", "UTMALDG")
SPIN = 6  # instructions: a shorter loop around a barrier's TRYWAIT is only a wait

_LINE = re.compile(r"^\s+/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_SHAPE = re.compile(r"^(?:HGMMA|QGMMA)\.64x(\d+)x")


@dataclass(frozen=True)
class Section:
    """Instructions that one warp executes once.

    issue: all of them. mio: shuffles and shared memory. lsu: cycles of global memory, 128 bytes
    each. tensor: cycles of a multiprocessor's tensor cores for four warps (a warpgroup). barriers:
    of the whole program.
    """

    issue: int = 0
    mio: int = 0
    lsu: int = 0
    tensor: int = 0
    barriers: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

    def __sub__(self, part: Section) -> Section:
        """Without the instructions of a part of it."""
        counts = (getattr(self, f.name) - getattr(part, f.name) for f in fields(self))
        return Section(*counts)

    @property
    def pipes(self) -> dict[str, int]:
        """Instructions per pipe; "alu" includes the barriers."""
        kinds = {"tensor": TENSOR, "mio": MIO, "lsu": LSU}
        found = {kind: sum(self.opcodes[o] for o in own) for kind, own in kinds.items()}
        return {**found, "alu": self.issue - sum(found.values()), "barriers": self.barriers}


@dataclass(frozen=True)
class Sass:
    """A kernel's sections.

    waits: whether the loop waits for its matrix products before it continues (`wait_group 0`).
    hidden: instructions of the loop issued while its products run: those between a product and the
    next such wait, or all of them without a wait. pipelined: whether its loads are asynchronous
    (TMA or cp.async). loads_after: whether the code after the loop loads from memory. first: an
    equal loop before the main one, as of a kernel of two matrix products; not part of `before`.
    tile: the ends of a tile in a loop over the steps of several tiles; not part of `loop`. What it
    does for the first tile only is part of `after`. last, merge: straight code and loops from the
    last atomic operation on, which the last program to arrive runs; parts of `after`.
    """

    before: Section
    loop: Section
    after: Section
    hidden: int
    waits: bool
    pipelined: bool
    loads_after: bool
    first: Section = Section()
    tile: Section = Section()
    last: Section = Section()
    merge: Section = Section()


def read(disassembly: str) -> Sass:
    """The sections of the one kernel in the output of `nvdisasm`."""
    code, labels = _instructions(disassembly)
    if not code:
        raise ValueError("disassembly: expected the instructions of a kernel, found none")
    end = max((i for i, text in enumerate(code) if _opcode(text) == "EXIT"), default=len(code) - 1)
    code = code[: end + 1]
    atomics = [i for i, text in enumerate(code) if _opcode(text) in ("ATOM", "ATOMG")]
    arrived = atomics[-1] if atomics else len(code)
    every = _loops(code, labels)
    loops = [loop for loop in every if loop[0] < arrived]
    merging = [i for begin, stop in every if begin > arrived for i in range(begin, stop)]
    alone = [i for i in range(arrived, len(code)) if i not in merging]
    multiplying = [loop for loop in loops if _tensor(code[slice(*loop)])]
    main, earlier = loops, []
    if multiplying:
        most = max(_tensor(code[slice(*loop)]) for loop in multiplying)
        *earlier, last = [loop for loop in multiplying if _tensor(code[slice(*loop)]) == most]
        main = [last]
    inside = [i for begin, stop in main for i in range(begin, stop)]
    first = main[0][0] if main else len(code)
    within = set(inside)
    sooner = [i for begin, stop in earlier for i in range(begin, stop)]
    within.update(sooner)
    before = [i for i in range(first) if i not in within]
    after = [i for i in range(first, len(code)) if i not in within]
    if not main:  # no loop: the code after the last product is the epilogue
        last = max((i for i, text in enumerate(code) if _opcode(text) in TENSOR), default=-1) + 1
        before, after = list(range(last)), list(range(last, len(code)))
    ends: list[int] = []
    if multiplying and any(_opcode(code[i]) == "UTMASTG" for i in inside):
        skipped = _skipped(code, labels, *main[0])
        ends = [i for begin, stop in skipped for i in range(begin, stop)]
        inner = [one for region in skipped for one in _skipped(code, labels, *region)]
        exchanges = [one for one in inner if any(_opcode(c) == "SHFL" for c in code[slice(*one)])]
        once = {i for begin, stop in exchanges for i in range(begin, stop)}
        inside = [i for i in inside if i not in set(ends)]
        ends, after = [i for i in ends if i not in once], sorted(once) + after
    hidden, waits = _hidden([code[i] for i in inside])
    parts = [[code[i] for i in part] for part in (before, inside, after)]
    loading = {_opcode(text) for text in parts[1 if main else 0]}
    return Sass(
        *map(_section, parts), hidden, waits,
        pipelined=bool(loading & {"LDGSTS", "UTMALDG"}) or "LDG" not in loading,
        loads_after=_tensor(code) > 0 and any(_opcode(text) in LOADS for text in parts[2]),
        first=_section([code[i] for i in sooner]),
        tile=_section([code[i] for i in ends]),
        last=_section([code[i] for i in alone]),
        merge=_section([code[i] for i in merging]),
    )  # fmt: skip


def tensor_loops(disassembly: str) -> list[tuple[int, int, int]]:
    """Loops with wgmma products, also inner ones: instructions, products, and N of a product."""
    code, labels = _instructions(disassembly)
    found = []
    for begin, stop in _backward(code, labels):
        shapes = [_SHAPE.match(_PREDICATE.sub("", text)) for text in code[begin:stop]]
        products = [int(shape[1]) for shape in shapes if shape]
        if products:
            found.append((stop - begin, len(products), products[0]))
    return found


def _instructions(disassembly: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, predicates and all, and the place that each label names."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif (found := _LINE.match(line)) and not found["text"].startswith("."):
            code.append(found["text"].strip())
    return code, labels


def _opcode(text: str) -> str:
    return _PREDICATE.sub("", text).partition(" ")[0].partition(".")[0]


def _loops(code: Sequence[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Outermost loops as [begin, stop)."""
    outermost: list[tuple[int, int]] = []
    for loop in sorted(_backward(code, labels), key=lambda loop: (loop[0], -loop[1])):
        if not outermost or loop[0] >= outermost[-1][1]:
            outermost.append(loop)
    return outermost


def _skipped(
    code: Sequence[str], labels: dict[str, int], begin: int, stop: int
) -> list[tuple[int, int]]:
    """The outermost parts of [begin, stop) without a product that a branch in it skips."""
    found: list[tuple[int, int]] = []
    for i in range(begin, stop):
        target = re.search(r"`\((\.L_x_\d+)\)", code[i])
        if _opcode(code[i]) != "BRA" or target is None or (found and i < found[-1][1]):
            continue
        end = labels.get(target[1], i)
        if i < end < stop and not _tensor(code[i:end]):
            found.append((i + 1, end))
    return found


def _backward(code: Sequence[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Loops as [begin, stop): backward branches, except those that wait for a barrier."""
    found = []
    for i, text in enumerate(code):
        target = re.search(r"`\((\.L_x_\d+)\)", text)
        if _opcode(text) != "BRA" or target is None:
            continue
        begin = labels.get(target[1], i)
        spins = i - begin < SPIN and any("TRYWAIT" in code[j] for j in range(begin, i))
        if begin < i and not spins:
            found.append((begin, i + 1))
    return found


def _section(code: Sequence[str]) -> Section:
    opcodes = Counter(_opcode(text) for text in code)
    return Section(
        issue=len(code),
        mio=sum(opcodes[name] for name in MIO),
        lsu=sum(_words(text) for text in code if _opcode(text) in LSU),
        tensor=_tensor(code),
        barriers=opcodes["BAR"],
        opcodes=opcodes,
    )


def _words(text: str) -> int:
    """Cycles of the load-store unit for a warp: one per 128 bytes, one for a bulk copy."""
    name = _PREDICATE.sub("", text).partition(" ")[0]
    width = re.search(r"\.(64|128)\b", name)
    return int(width[1]) // 32 if width else 1


def _tensor(code: Sequence[str]) -> int:
    """Cycles: N/2 for wgmma 64xN (4096 dense 16-bit FLOP per cycle), 8 for four warps' 16x8x16."""
    total = 0
    for text in code:
        name = _PREDICATE.sub("", text)
        if shape := _SHAPE.match(name):
            total += int(shape[1]) // 2
        elif _opcode(text) in TENSOR:
            total += 8
    return total


def _hidden(loop: Sequence[str]) -> tuple[int, bool]:
    """Number of instructions issued while products run, and whether the loop waits for them."""
    products = [_opcode(text) == "HGMMA" for text in loop]
    waits = [re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", text) is not None for text in loop]
    if not any(products) or not any(waits):
        return len(loop), False
    hidden, running = 0, False
    for turn in range(2):  # the first turn finds whether a product still runs at the loop's start
        for product, wait in zip(products, waits, strict=True):
            running = (running or product) and not wait
            hidden += running and turn
    return hidden, True

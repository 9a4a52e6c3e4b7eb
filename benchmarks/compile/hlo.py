"""Reads the text of a compiled program (HLO): its instructions, and how often each of them runs.

XLA prints one computation after another. A computation runs as often as the instructions that call it. The body of a
loop runs as often as the loop, which XLA states for some loops and which the condition tells for most others.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^\s*(ROOT\s+)?(%?[\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?(%?[\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computation)=(%?[\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?\}')


@dataclass(frozen=True)
class Shape:
    """An array: its element type, sizes and memory."""

    kind: str
    sizes: tuple[int, ...]
    is_fast: bool = False
    """Whether it is in the memory for vectors of a TPU (memory space 1), not in the main memory."""

    @property
    def count(self) -> int:
        """Number of elements."""
        found = 1
        for size in self.sizes:
            found *= size
        return found

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without padding."""
        if self.kind == "token":
            return 0
        digits = re.search(r"\d+", self.kind)
        return self.count * _BYTES.get(self.kind, int(digits[0]) / 8 if digits else 0)


def shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type, a tuple's one after the other.

    >>> [(x.kind, x.sizes, x.bytes) for x in shapes("(bf16[8,128]{1,0:T(8,128)(2,1)}, pred[])")]
    [('bf16', (8, 128), 2048.0), ('pred', (), 1)]
    """
    return tuple(
        Shape(kind, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), "S(1)" in layout)
        for kind, sizes, layout in _ARRAY.findall(text)
    )


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    name: str
    opcode: str
    result: tuple[Shape, ...]
    operands: tuple[str, ...]
    """The names of its operands."""
    rest: str
    """Its attributes: everything behind the operands."""
    is_root: bool

    def called(self) -> tuple[str, ...]:
        """Returns the names of the computations that it calls."""
        branches = _BRANCHES.search(self.rest)
        more = branches[1].split(",") if branches else []
        return tuple(name.strip().lstrip("%") for name in (*_CALLED.findall(self.rest), *more))

    def attribute(self, name: str) -> str | None:
        """Returns the value of an attribute up to the next comma, or its braces with what they hold."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,]*)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Times:
    """How often an instruction runs."""

    known: int
    """The product of the loops around it whose number of iterations is known."""
    exact: bool
    """False if it is inside a loop whose number of iterations is not known, which counts once."""


class Module:
    """A compiled program.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                name = head[2].lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if head[1] else self.entry
            elif (instruction := _instruction(line)) is not None:
                current[instruction.name] = instruction

    @cached_property
    def times(self) -> Mapping[str, Times]:
        """How often each computation runs. One that several instructions call runs for each of them."""
        found: dict[str, Times] = {}

        def visit(name: str, times: int, exact: bool) -> None:
            before = found.get(name, Times(0, True))
            found[name] = Times(before.known + times, before.exact and exact)
            for instruction in self.computations.get(name, {}).values():
                trips = self._trips(name, instruction) if instruction.opcode == "while" else 1
                for called in instruction.called():
                    visit(called, times * (1 if trips is None else trips), exact and trips is not None)

        visit(self.entry, 1, True)
        return found

    def instructions(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], Times]]:
        """Yields each instruction that may run, those of its computation by name, and how often it runs.

        Of a conditional, every branch counts.
        """
        for name, times in self.times.items():
            for instruction in self.computations.get(name, {}).values():
                yield instruction, self.computations[name], times

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """Returns how often the body of a loop runs; None if that is only known at run time."""
        if stated := _TRIPS.search(loop.rest):
            return int(stated[1])
        condition = self.computations.get((loop.attribute("condition") or "").lstrip("%"), {})
        root = next((each for each in condition.values() if each.is_root), None)
        if root is None or root.opcode != "compare" or root.attribute("direction") != "LT":
            return None
        counter, limit = (condition.get(name) for name in root.operands)
        bound = _constant(limit, condition)
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return None
        here = self.computations[computation]
        given = _source(here.get(loop.operands[0]), here)
        index = int(counter.attribute("index") or 0)
        if given is None or given.opcode != "tuple":
            return None
        first = _constant(here.get(given.operands[index]), here)
        # `scan` and `fori_loop` add 1 in each iteration.
        return None if first is None else max(0, bound - first)


def _source(found: Instruction | None, computation: Mapping[str, Instruction]) -> Instruction | None:
    """Follows copies to the instruction that made a value."""
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start", "optimization-barrier"):
        found = computation.get(found.operands[0])
    return found


def _constant(found: Instruction | None, computation: Mapping[str, Instruction]) -> int | None:
    """Returns the value of an integer constant; None for anything else."""
    found = _source(found, computation)
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.operands[0]):
        return None
    return int(found.operands[0])


def _instruction(line: str) -> Instruction | None:
    """Parses one line; None if it holds no instruction."""
    head = _HEAD.match(line)
    if not head:
        return None
    line = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    kind, after = _split(line) if line.startswith("(") else line.split(" ", 1)
    call = re.match(r"\s*([\w\-]+)(?=\()", after)
    if not call:
        return None
    inside, rest = _split(after[call.end() :])
    operands = tuple(each.strip().split(" ")[-1].lstrip("%") for each in _top_level(inside[1:-1]))
    return Instruction(head[2].lstrip("%"), call[1], shapes(kind), operands, rest, bool(head[1]))


def _split(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes the first one.

    >>> _split("(a, (b)) c(d)")
    ('(a, (b))', ' c(d)')
    """
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _top_level(text: str) -> list[str]:
    """Splits at the commas outside of brackets.

    >>> _top_level("f32[2,3]{1,0} %x, %y")
    ['f32[2,3]{1,0} %x', ' %y']
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts

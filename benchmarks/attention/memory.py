"""The memory that attention takes: `python -m benchmarks.attention.memory` computes one case in a process alone."""

import sys
from collections.abc import Sequence

from benchmarks.attention import implementations, patterns
from benchmarks.attention.case import DIRECTIONS, AttentionCase
from benchmarks.attention.exact import TOLERANCES
from benchmarks.attention.shapes import named
from benchmarks.bench import command, memory
from benchmarks.bench.memory import Peak
from train.devices import environment


def peak(case: AttentionCase, implementation: str) -> Peak:
    """Computes a case once in a process of its own. Raises RuntimeError if that fails."""
    words = [case.shape.name, case.pattern, case.direction, case.dtype, implementation]
    return memory.alone("benchmarks.attention.memory", words)


def measure(case: AttentionCase, implementation: str) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    # Inputs are made one by one, so that NumPy's copies of all of them are never there at once.
    prepare = implementations.NAMES[implementation]
    return memory.here(lambda: prepare(case, case.inputs()), own_allocator=implementation.startswith("torch"))


def parse(words: Sequence[str]) -> tuple[AttentionCase, str]:
    """SHAPE MASK PASS DTYPE IMPLEMENTATION."""
    if len(words) != 5:
        raise ValueError("usage: python -m benchmarks.attention.memory SHAPE MASK PASS DTYPE IMPLEMENTATION")
    shape, pattern, direction, dtype, implementation = words
    command.check("implementation", [implementation], implementations.NAMES)
    if pattern not in patterns.PATTERNS or direction not in DIRECTIONS or dtype not in TOLERANCES:
        raise ValueError(f"no such case: {' '.join(words[:4])}")
    return AttentionCase(named(shape)[0], pattern, direction, dtype), implementation


def main() -> int:
    """Measures what the command line names."""
    case, implementation = parse(sys.argv[1:])
    return memory.answer(lambda: measure(case, implementation))


if __name__ == "__main__":
    environment.command(main)

"""Peak memory of attention: `python -m benchmarks.attention.memory` computes one case in its own process."""

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
    """Computes a case once in its own process. Raises RuntimeError if that fails."""
    words = [case.shape.name, case.pattern, case.direction, case.dtype, implementation]
    return memory.alone("benchmarks.attention.memory", words)


def measure(case: AttentionCase, implementation: str) -> Peak:
    """Returns the peak memory of this process, which must be fresh."""
    # Inputs are created one at a time, so that NumPy copies of all of them never coexist.
    prepare = implementations.NAMES[implementation]
    return memory.here(lambda: prepare(case, case.inputs()), own_allocator=implementation.startswith("torch"))


def parse(words: Sequence[str]) -> tuple[AttentionCase, str]:
    """Parses SHAPE MASK PASS DTYPE IMPLEMENTATION."""
    if len(words) != 5:
        raise ValueError("usage: python -m benchmarks.attention.memory SHAPE MASK PASS DTYPE IMPLEMENTATION")
    shape, pattern, direction, dtype, implementation = words
    command.check("implementation", [implementation], implementations.NAMES)
    if pattern not in patterns.PATTERNS or direction not in DIRECTIONS or dtype not in TOLERANCES:
        raise ValueError(f"no such case: {' '.join(words[:4])}")
    return AttentionCase(named(shape)[0], pattern, direction, dtype), implementation


def main() -> int:
    """Measures the case that the command line names."""
    case, implementation = parse(sys.argv[1:])
    return memory.answer(lambda: measure(case, implementation))


if __name__ == "__main__":
    environment.command(main)

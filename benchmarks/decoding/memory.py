"""Peak memory of decoding: `python -m benchmarks.decoding.memory` decodes one case in its own process."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.bench import command, memory
from benchmarks.bench.marian import RandomMarian, Sizes
from benchmarks.bench.memory import Peak
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.implementations import NAMES
from train.devices import environment


def peak(case: DecodingCase, implementation: str, folder: Path) -> Peak:
    """Decodes a case once in its own process. Raises RuntimeError if that fails.

    Args:
        case: what to decode.
        implementation: the name of the implementation.
        folder: the folder of the `RandomMarian`; an existing CTranslate2 file in it is reused.
    """
    return memory.alone("benchmarks.decoding.memory", [implementation, str(folder), json.dumps(asdict(case))])


def measure(case: DecodingCase, implementation: str, folder: Path) -> Peak:
    """Returns the peak memory of this process, which must be fresh."""
    model = RandomMarian(case.sizes, folder)
    return memory.here(lambda: NAMES[implementation](model)(case), library=implementation)


def parse(words: Sequence[str]) -> tuple[DecodingCase, str, Path]:
    """Parses IMPLEMENTATION FOLDER CASE; CASE is JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.decoding.memory IMPLEMENTATION FOLDER CASE")
    implementation, folder, text = words
    command.check("implementation", [implementation], NAMES)
    fields = json.loads(text)
    return DecodingCase(**(fields | {"sizes": Sizes(**fields["sizes"])})), implementation, Path(folder)


def main() -> int:
    """Measures the case that the command line names."""
    case, implementation, folder = parse(sys.argv[1:])
    return memory.answer(lambda: measure(case, implementation, folder))


if __name__ == "__main__":
    environment.command(main)

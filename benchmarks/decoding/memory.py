"""The memory that decoding takes: `python -m benchmarks.decoding.memory` decodes one case in a process alone."""

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
    """Decodes a case once in a process of its own. Raises RuntimeError if that fails.

    Args:
        case: what to decode.
        implementation: by whom.
        folder: that of the `RandomMarian`; where it holds a file of CTranslate2's, nothing need be converted.
    """
    return memory.alone("benchmarks.decoding.memory", [implementation, str(folder), json.dumps(asdict(case))])


def measure(case: DecodingCase, implementation: str, folder: Path) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    model = RandomMarian(case.sizes, folder)
    return memory.here(lambda: NAMES[implementation](model)(case), library=implementation)


def parse(words: Sequence[str]) -> tuple[DecodingCase, str, Path]:
    """IMPLEMENTATION FOLDER CASE, the last one as JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.decoding.memory IMPLEMENTATION FOLDER CASE")
    implementation, folder, text = words
    command.check("implementation", [implementation], NAMES)
    fields = json.loads(text)
    return DecodingCase(**(fields | {"sizes": Sizes(**fields["sizes"])})), implementation, Path(folder)


def main() -> int:
    """Measures what the command line names."""
    case, implementation, folder = parse(sys.argv[1:])
    return memory.answer(lambda: measure(case, implementation, folder))


if __name__ == "__main__":
    environment.command(main)

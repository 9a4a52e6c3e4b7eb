"""The memory that decoding takes: `python -m benchmarks.decoding_memory` computes one case in a process alone."""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax

from benchmarks import command, machine, memory, translators
from benchmarks.marian import Case, Model, Sizes
from benchmarks.memory import Peak
from train.devices import environment

_MODULES = {"transformers": "transformers.models.marian.modeling_marian", "ctranslate2": "ctranslate2"}
"""Imported before memory is looked at, as ours is: the libraries differ by hundreds of MiB, which do not grow."""


def peak(case: Case, implementation: str, folder: Path) -> Peak:
    """Decodes a case once in a process of its own. Raises RuntimeError if that fails.

    Args:
        case: what to decode.
        implementation: by whom.
        folder: that of the `Model`; where it holds a file of CTranslate2's, nothing need be converted.
    """
    return memory.alone("benchmarks.decoding_memory", [implementation, str(folder), json.dumps(asdict(case))])


def measure(case: Case, implementation: str, folder: Path) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    _ = jax.devices()
    if implementation in _MODULES:
        importlib.import_module(_MODULES[implementation])
    idle = machine.peak_bytes()
    program = translators.NAMES[implementation](Model(case.sizes, folder))(case)
    program.wait(program.run())
    return Peak(machine.peak_bytes(), idle, (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"))


def parse(words: Sequence[str]) -> tuple[Case, str, Path]:
    """IMPLEMENTATION FOLDER CASE, the last one as JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.decoding_memory IMPLEMENTATION FOLDER CASE")
    implementation, folder, text = words
    command.check("implementation", [implementation], tuple(translators.NAMES))
    fields = json.loads(text)
    return Case(**(fields | {"sizes": Sizes(**fields["sizes"])})), implementation, Path(folder)


def main() -> int:
    """Measures what the command line names."""
    case, implementation, folder = parse(sys.argv[1:])
    return memory.answer(lambda: measure(case, implementation, folder))


if __name__ == "__main__":
    environment.command(main)

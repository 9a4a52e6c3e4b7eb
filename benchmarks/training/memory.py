"""The memory that training takes: `python -m benchmarks.training.memory` makes updates in a process alone."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.bench import command, memory
from benchmarks.bench.marian import Sizes
from benchmarks.bench.memory import Peak
from benchmarks.training.case import TrainingCase
from benchmarks.training.implementations import NAMES, UPDATE
from train.devices import environment

_UPDATES = 3


def peak(case: TrainingCase, implementation: str, weights: Mapping[str, np.ndarray]) -> Peak:
    """Makes updates of a case in a process of its own. Raises RuntimeError if that fails.

    Args:
        case: what to train.
        implementation: by whom.
        weights: by Marian's names. They are drawn here, for those of PyTorch would do without JAX's compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        np.savez(path, **weights)  # type: ignore[arg-type]
        return memory.alone("benchmarks.training.memory", [implementation, str(path), json.dumps(asdict(case))])


def measure(case: TrainingCase, implementation: str, weights: Mapping[str, np.ndarray]) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    prepare = NAMES[implementation]
    return memory.here(lambda: prepare(case, weights, UPDATE), library=implementation, calls=_UPDATES)


def parse(words: Sequence[str]) -> tuple[TrainingCase, str, Path]:
    """IMPLEMENTATION WEIGHTS CASE, a file of NumPy's and JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.training.memory IMPLEMENTATION WEIGHTS CASE")
    implementation, weights, text = words
    command.check("implementation", [implementation], NAMES)
    fields = json.loads(text)
    return TrainingCase(**(fields | {"sizes": Sizes(**fields["sizes"])})), implementation, Path(weights)


def main() -> int:
    """Measures what the command line names."""
    case, implementation, path = parse(sys.argv[1:])
    with np.load(path) as weights:
        return memory.answer(lambda: measure(case, implementation, dict(weights)))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # a compilation is a part of what is measured
    environment.command(main)

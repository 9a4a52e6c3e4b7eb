"""Peak memory of training: `python -m benchmarks.training.memory` makes updates in its own process."""

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
    """Makes updates of a case in its own process. Raises RuntimeError if that fails.

    Args:
        case: what to train.
        implementation: the name of the implementation.
        weights: parameters by Marian's names. Drawn by the caller, since drawing loads JAX's compiler, which PyTorch
            does not need.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.npz"
        np.savez(path, **weights)  # type: ignore[arg-type]
        return memory.alone("benchmarks.training.memory", [implementation, str(path), json.dumps(asdict(case))])


def measure(case: TrainingCase, implementation: str, weights: Mapping[str, np.ndarray]) -> Peak:
    """Returns the peak memory of this process, which must be fresh."""
    prepare = NAMES[implementation]
    return memory.here(lambda: prepare(case, weights, UPDATE), library=implementation, calls=_UPDATES)


def parse(words: Sequence[str]) -> tuple[TrainingCase, str, Path]:
    """Parses IMPLEMENTATION WEIGHTS CASE; WEIGHTS is a NumPy file, CASE is JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.training.memory IMPLEMENTATION WEIGHTS CASE")
    implementation, weights, text = words
    command.check("implementation", [implementation], NAMES)
    fields = json.loads(text)
    return TrainingCase(**(fields | {"sizes": Sizes(**fields["sizes"])})), implementation, Path(weights)


def main() -> int:
    """Measures the case that the command line names."""
    case, implementation, path = parse(sys.argv[1:])
    with np.load(path) as weights:
        return memory.answer(lambda: measure(case, implementation, dict(weights)))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # compilation is part of the measurement
    environment.command(main)

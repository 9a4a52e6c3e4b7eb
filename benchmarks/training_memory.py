"""The memory that training takes: `python -m benchmarks.training_memory` makes updates in a process alone."""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from benchmarks import command, machine, memory
from benchmarks.marian import Sizes
from benchmarks.memory import Peak
from benchmarks.training_case import TrainingCase
from benchmarks.training_implementations import NAMES, UPDATE
from train.devices import environment

_MODULES = {"transformers": "transformers.models.marian.modeling_marian", "torch": "torch._dynamo"}
"""Imported before memory is looked at, as ours is: the libraries differ by hundreds of MiB, which do not grow.

That of torch is what its AdamW imports once it is made.
"""
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
        return memory.alone("benchmarks.training_memory", [implementation, str(path), json.dumps(asdict(case))])


def measure(case: TrainingCase, implementation: str, weights: Mapping[str, np.ndarray]) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    _ = jax.devices()
    if implementation in _MODULES:
        importlib.import_module(_MODULES[implementation])
    idle = machine.peak_bytes()
    program = NAMES[implementation](case, weights, UPDATE)
    for _ in range(_UPDATES):
        program.wait(program.run())
    return Peak(machine.peak_bytes(), idle, (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"))


def parse(words: Sequence[str]) -> tuple[TrainingCase, str, Path]:
    """IMPLEMENTATION WEIGHTS CASE, a file of NumPy's and JSON."""
    if len(words) != 3:
        raise ValueError("usage: python -m benchmarks.training_memory IMPLEMENTATION WEIGHTS CASE")
    implementation, weights, text = words
    command.check("implementation", [implementation], tuple(NAMES))
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

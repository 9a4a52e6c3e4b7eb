"""The memory that a call takes, seen from outside: `python -m benchmarks.memory` computes one case in a process alone.

XLA's plan for a call leaves out the scratch memory of the libraries that XLA calls; the peak of a process leaves out
nothing, not even Python and JAX themselves, which `idle` holds for comparison.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from benchmarks import implementations, machine, patterns
from benchmarks.case import DIRECTIONS, Case
from benchmarks.exact import TOLERANCES
from benchmarks.shapes import named
from train.devices import environment


@dataclass(frozen=True)
class Peak:
    """Bytes that a process held at most."""

    process_peak_bytes: int
    """Main memory: inputs, compilation, one call."""
    process_idle_bytes: int
    """Main memory before the inputs, libraries imported and the device started."""
    device_peak_bytes: int | None
    """What the accelerator's allocator counted, or None where it does not count."""


def peak(case: Case, implementation: str) -> Peak:
    """Computes a case once in a process of its own. Raises RuntimeError if that fails."""
    return alone("benchmarks.memory", [case.shape.name, case.pattern, case.direction, case.dtype, implementation])


def alone(module: str, words: Sequence[str]) -> Peak:
    """What a module that ends in `answer` says in a process of its own. Raises RuntimeError if that fails."""
    # Without preallocation, for the calling process holds memory of the device, too.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    if done.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-done.returncode).name}: out of memory?")
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case, implementation: str) -> Peak:
    """What this process, which should have done nothing yet, comes to."""
    _ = jax.devices()
    idle = machine.peak_bytes()
    # Inputs are made one by one, so that NumPy's copies of all of them are never there at once.
    program = implementations.NAMES[implementation](case, case.inputs())
    program.wait(program.run())
    stats = jax.devices()[0].memory_stats() or {}
    device = program.planned_bytes if implementation.startswith("torch") else stats.get("peak_bytes_in_use")
    return Peak(machine.peak_bytes(), idle, device)


def parse(words: Sequence[str]) -> tuple[Case, str]:
    """SHAPE PATTERN PASS DTYPE IMPLEMENTATION."""
    if len(words) != 5:
        raise ValueError("usage: python -m benchmarks.memory SHAPE MASK PASS DTYPE IMPLEMENTATION")
    shape, pattern, direction, dtype, implementation = words
    implementations.check([implementation])
    if pattern not in patterns.PATTERNS or direction not in DIRECTIONS or dtype not in TOLERANCES:
        raise ValueError(f"no such case: {' '.join(words[:4])}")
    return Case(named(shape)[0], pattern, direction, dtype), implementation


def answer(measured: Callable[[], Peak]) -> int:
    """Prints a peak as one line of JSON, or why there is none as the last line of stderr."""
    try:
        print(json.dumps(asdict(measured())))
    except Exception as exception:  # of any library; a traceback of JAX would end with advice
        print(f"{type(exception).__name__}: {' '.join(str(exception).split())}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Measures what the command line names."""
    case, implementation = parse(sys.argv[1:])
    return answer(lambda: measure(case, implementation))


if __name__ == "__main__":
    environment.command(main)

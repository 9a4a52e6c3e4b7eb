"""The memory that a computation takes, seen from outside: each case is computed once in a process alone.

XLA's plan for a call leaves out the scratch memory of the libraries that XLA calls; the peak of a process leaves out
nothing, not even Python and JAX themselves, which `process_idle_bytes` holds for comparison.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from benchmarks.bench import machine
from benchmarks.bench.program import Program

_MODULES = {
    "transformers": "transformers.models.marian.modeling_marian",
    "ctranslate2": "ctranslate2",
    "torch": "torch._dynamo",  # what its AdamW imports once it is made
}
"""Imported before memory is looked at, as ours is: the libraries differ by hundreds of MiB, which do not grow."""


@dataclass(frozen=True)
class Peak:
    """Bytes that a process held at most."""

    process_peak_bytes: int
    """Main memory: inputs, compilation, calls."""
    process_idle_bytes: int
    """Main memory before the inputs, libraries imported and the device started."""
    device_peak_bytes: int | None
    """What the accelerator's allocator counted, or None where it does not count."""


def alone(module: str, words: Sequence[str]) -> Peak:
    """What a module that ends in `answer` says in a process of its own. Raises RuntimeError if that fails."""
    # Without preallocation, for the calling process holds memory of the device, too.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2])
    if done.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-done.returncode).name}: out of memory?")
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def here(prepare: Callable[[], Program], *, library: str = "", calls: int = 1, own_allocator: bool = False) -> Peak:
    """What this process, which should have done nothing yet, comes to.

    Args:
        prepare: makes the program, and its inputs.
        library: a name among the modules that are imported before memory is looked at; others are not.
        calls: how often the program runs.
        own_allocator: the device's peak is what the library's own allocator counted, and not JAX's.
    """
    _ = jax.devices()
    if library in _MODULES:
        importlib.import_module(_MODULES[library])
    idle = machine.peak_bytes()
    program = prepare()
    for _ in range(calls):
        program.wait(program.run())
    stats = jax.devices()[0].memory_stats() or {}
    device = program.planned_bytes if own_allocator else stats.get("peak_bytes_in_use")
    return Peak(machine.peak_bytes(), idle, device)


def answer(measured: Callable[[], Peak]) -> int:
    """Prints a peak as one line of JSON, or why there is none as the last line of stderr."""
    try:
        print(json.dumps(asdict(measured())))
    except Exception as exception:  # of any library; a traceback of JAX would end with advice
        print(f"{type(exception).__name__}: {' '.join(str(exception).split())}", file=sys.stderr)
        return 1
    return 0

"""Peak memory of a computation, measured from outside: each case runs once in its own process.

XLA's memory plan omits the scratch memory of the libraries that XLA calls. The peak of a process includes everything,
even Python and JAX, which `process_idle_bytes` records for comparison.
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
    "torch": "torch._dynamo",  # imported when AdamW is constructed
}
"""Imported before the idle measurement, as our library is: the libraries differ by hundreds of MiB of fixed cost."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of a process, in bytes."""

    process_peak_bytes: int
    """Main memory at the peak: inputs, compilation, calls."""
    process_idle_bytes: int
    """Main memory before the inputs exist, with libraries imported and the device started."""
    device_peak_bytes: int | None
    """Peak of the accelerator's allocator; None if it does not count."""


def alone(module: str, words: Sequence[str]) -> Peak:
    """Runs a module that ends in `answer` in its own process. Raises RuntimeError if that fails."""
    # Without preallocation, since the calling process also holds device memory.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2])
    if done.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-done.returncode).name}: out of memory?")
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def here(prepare: Callable[[], Program], *, library: str = "", calls: int = 1, own_allocator: bool = False) -> Peak:
    """Returns the peak memory of this process, which must be fresh.

    Args:
        prepare: makes the program and its inputs.
        library: the name of a library to import before the idle measurement; unknown names are ignored.
        calls: number of times the program runs.
        own_allocator: if True, takes the device's peak from the library's own allocator instead of JAX's.
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
    """Prints the peak as one line of JSON, or the error as the last line of stderr."""
    try:
        print(json.dumps(asdict(measured())))
    except Exception as exception:  # from any library; the last line of a JAX traceback is advice, not the error
        print(f"{type(exception).__name__}: {' '.join(str(exception).split())}", file=sys.stderr)
        return 1
    return 0

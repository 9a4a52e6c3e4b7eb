"""What is ready to run: one computation, compiled, its arguments on the device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.bench import machine


@dataclass(frozen=True)
class Program:
    """One computation that can be repeated."""

    run: Callable[[], Any]
    """Starts the computation and returns its result, which may not be there yet."""
    wait: Callable[[Any], Any]
    """Returns when a result, and on an accelerator all before it, is there."""
    arrays: Callable[[Any], Sequence[np.ndarray]]
    """What is compared of a result, as NumPy arrays."""
    how: str = ""
    """In which words attention was given its mask."""
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    """Arguments, results and temporaries: what XLA plans for the call, or what PyTorch's allocator came to on a GPU."""


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a function in JAX for these arguments, ahead of its first call."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Program(
        run=lambda: executable(*arguments),
        wait=jax.block_until_ready,
        arrays=lambda result: [np.asarray(x) for x in jax.tree.leaves(result)],
        compile_seconds=seconds,
        planned_bytes=_planned(executable) or None,
    )


def require_memory(program: Program, *arguments: Any) -> None:
    """Raises NotImplementedError where the device lacks what XLA plans for a program, besides its arguments."""
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
    machine.require((program.planned_bytes or 0) - given, "temporaries and results")


def there_already(result: Any) -> None:
    """Waits for the result of a library that returns when it is there, as PyTorch does on a CPU."""


def _planned(executable: Any) -> int:
    """Bytes of arguments, results and temporaries; 0 where the compiler does not tell."""
    memory = executable.memory_analysis()
    if memory is None:
        return 0
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

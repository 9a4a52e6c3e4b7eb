"""A computation that is ready to run: compiled, with its arguments on the device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.bench import machine


@dataclass(frozen=True)
class Program:
    """One repeatable computation."""

    run: Callable[[], Any]
    """Starts the computation and returns its result, which may still be pending."""
    wait: Callable[[Any], Any]
    """Blocks until a result is ready and, on an accelerator, everything before it."""
    arrays: Callable[[Any], Sequence[np.ndarray]]
    """Returns the parts of a result to compare, as NumPy arrays."""
    how: str = ""
    """How attention was given its mask, for the table."""
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    """Arguments, results and temporaries in XLA's plan for the call; the peak of PyTorch's allocator on a GPU."""


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
    """Raises NotImplementedError if the device lacks the memory of XLA's plan, excluding the arguments."""
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
    machine.require((program.planned_bytes or 0) - given, "temporaries and results")


def there_already(result: Any) -> None:
    """Does nothing, for libraries whose calls return finished results, such as PyTorch on a CPU."""


def _planned(executable: Any) -> int:
    """Returns the bytes of arguments, results and temporaries; 0 if the compiler does not report them."""
    memory = executable.memory_analysis()
    if memory is None:
        return 0
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

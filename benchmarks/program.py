"""What is ready to run: a call of one implementation on one case, compiled, its arguments on the device."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from benchmarks import machine
from benchmarks.case import Case


@dataclass(frozen=True)
class Program:
    """One computation that can be repeated."""

    run: Callable[[], Any]
    """Starts the computation and returns its result, which may not be there yet."""
    wait: Callable[[Any], Any]
    """Returns when a result, and on an accelerator all before it, is there."""
    arrays: Callable[[Any], Sequence[np.ndarray]]
    """A result as NumPy arrays: output `[B, T, N, D]`, then the gradients of query, key and value if asked for."""
    how: str = ""
    """In which words the mask was given."""
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    """Arguments, results and temporaries: what XLA plans for the call, or what PyTorch's allocator came to on a GPU."""


@dataclass(frozen=True)
class Call:
    """How attention is called in a library for JAX: `attend(query, key, value, *extra)`."""

    attend: Callable[..., Array]
    how: str
    extra: tuple[Any, ...] = ()
    """Masks, biases and coordinates that the batch brings: arguments of the compiled function, not constants in it."""


def compiled(call: Call, case: Case, inputs: Iterable[np.ndarray]) -> Program:
    """Compiles a call in JAX; raises NotImplementedError where the device lacks the memory that XLA plans for it."""
    arrays = tuple(jax.device_put(x) for x in inputs)
    arguments = (*arrays, *jax.device_put(call.extra))
    start = time.perf_counter()
    executable = jax.jit(_with_gradients(call.attend) if case.backward else call.attend).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    count = planned(executable)
    machine.require(count - sum(x.nbytes for x in jax.tree.leaves(arguments)), "temporaries and results")
    return Program(
        run=lambda: executable(*arguments),
        wait=jax.block_until_ready,
        arrays=lambda result: [np.asarray(x) for x in jax.tree.leaves(result)],
        how=call.how,
        compile_seconds=seconds,
        planned_bytes=count or None,
    )


def planned(executable: Any) -> int:
    """Bytes of arguments, results and temporaries; 0 where the compiler does not tell."""
    memory = executable.memory_analysis()
    if memory is None:
        return 0
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def product(size: int, dtype: str) -> Program:
    """A plain matrix product of `size` by `size`: how fast the device multiplies when nothing else is asked of it."""
    rng = np.random.default_rng(size)
    a, b = (jax.device_put(rng.standard_normal((size, size), np.float32).astype(dtype)) for _ in range(2))
    executable = jax.jit(jax.numpy.matmul).lower(a, b).compile()
    return Program(lambda: executable(a, b), jax.block_until_ready, lambda result: [np.asarray(result)])


def _with_gradients(attend: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    def both(query: Array, key: Array, value: Array, d_output: Array, *extra: Any) -> tuple[Array, ...]:
        output, backward = jax.vjp(lambda *inputs: attend(*inputs, *extra), query, key, value)
        return (output, *backward(d_output))

    return both

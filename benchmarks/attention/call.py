"""A call of attention in JAX, and the compiled program made from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.attention.case import AttentionCase
from benchmarks.bench.program import Program, compiled, require_memory


@dataclass(frozen=True)
class AttentionCall:
    """A call of attention in a JAX library: `attend(query, key, value, *extra)`."""

    attend: Callable[..., Array]
    how: str
    """How the mask is written, for the table."""
    extra: tuple[Any, ...] = ()
    """Masks, biases and coordinates of the batch: arguments of the compiled function, not constants in it."""


def prepare(call: AttentionCall, case: AttentionCase, inputs: Iterable[np.ndarray]) -> Program:
    """Compiles a call that returns the output `[B, T, N, D]`, followed by the gradients of query, key and value if
    wanted.

    Raises NotImplementedError if XLA plans more memory than the device has free.
    """
    arrays = tuple(jax.device_put(x) for x in inputs)
    arguments = (*arrays, *jax.device_put(call.extra))
    program = compiled(_with_gradients(call.attend) if case.backward else call.attend, *arguments)
    require_memory(program, *arguments)
    return replace(program, how=call.how)


def _with_gradients(attend: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    def both(query: Array, key: Array, value: Array, d_output: Array, *extra: Any) -> tuple[Array, ...]:
        output, backward = jax.vjp(lambda *inputs: attend(*inputs, *extra), query, key, value)
        return (output, *backward(d_output))

    return both

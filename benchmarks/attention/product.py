"""A plain matrix product beside each case: how fast the device multiplies when nothing else is asked of it."""

from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.bench.program import Program, compiled
from benchmarks.bench.timing import Times


@dataclass(frozen=True)
class ProductRate:
    """The times of a product of square matrices of `size` rows, in the rounds of a case."""

    size: int
    times: Times

    @property
    def flops(self) -> float:
        """Floating-point operations a second."""
        return 2 * self.size**3 / self.times.median


def product(size: int, dtype: str) -> Program:
    """The product of two random matrices, `size` by `size`."""
    rng = np.random.default_rng(size)
    a, b = (jax.device_put(rng.standard_normal((size, size), np.float32).astype(dtype)) for _ in range(2))
    return compiled(jax.numpy.matmul, a, b)

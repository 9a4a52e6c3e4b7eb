"""A plain matrix product, timed with each case: the throughput of the device without attention's overhead."""

from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.bench.program import Program, compiled
from benchmarks.bench.timing import Times


@dataclass(frozen=True)
class ProductRate:
    """Times of a product of square matrices of `size` rows, in the rounds of a case."""

    size: int
    times: Times

    @property
    def flops(self) -> float:
        """Floating-point operations per second."""
        return 2 * self.size**3 / self.times.median


def product(size: int, dtype: str) -> Program:
    """Returns the product of two random `size` by `size` matrices as a program."""
    rng = np.random.default_rng(size)
    a, b = (jax.device_put(rng.standard_normal((size, size), np.float32).astype(dtype)) for _ in range(2))
    return compiled(jax.numpy.matmul, a, b)

"""One benchmark case of attention: a shape, a mask, a pass and a dtype, with inputs and operation counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.attention import patterns
from benchmarks.attention.shapes import Shape

DIRECTIONS = ("fwd", "bwd")
"""fwd: forward pass. bwd: forward and backward pass, with the gradients of query, key and value."""

BACKWARD = 3.5
"""Operations of bwd relative to fwd: 2 products of T x S x D forward, 5 backward."""


@dataclass(frozen=True)
class AttentionCase:
    """What each implementation computes."""

    shape: Shape
    pattern: str
    direction: str
    dtype: str

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.direction == "bwd"

    @property
    def name(self) -> str:
        """For example "cpu-t4096 causal bwd"."""
        return f"{self.shape.name} {self.pattern} {self.direction}"

    @property
    def pairs(self) -> int:
        """Number of visible query-key pairs over the batch, for one head."""
        return patterns.spans(self.pattern, self.shape).pairs(self.shape.batch)

    @property
    def flops(self) -> float:
        """Useful floating-point operations: the products of visible pairs only, whatever an implementation computes."""
        forward = 4 * self.pairs * self.shape.num_heads * self.shape.head_dim
        return forward * (BACKWARD if self.backward else 1)

    def fields(self) -> dict[str, Any]:
        """Returns sizes, mask, pass, dtype and operations, in base units."""
        shape = self.shape
        return {
            "shape": shape.name,
            "origin": shape.origin,
            "batch": shape.batch,
            "length": shape.length,
            "num_keys": shape.size,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "mask": self.pattern,
            "pass": self.direction,
            "dtype": self.dtype,
            "pairs": self.pairs,
            "useful_flop": self.flops,
        }

    def inputs(self) -> Iterator[np.ndarray]:
        """Yields query, key, value and, for gradients, the output's cotangent; the same in every process."""
        sizes = (self.shape.query, self.shape.key, self.shape.key, self.shape.query)
        for number, size in enumerate(sizes[: 4 if self.backward else 3]):
            rng = np.random.default_rng([number, *size])
            yield rng.standard_normal(size, np.float32).astype(jnp.dtype(self.dtype))

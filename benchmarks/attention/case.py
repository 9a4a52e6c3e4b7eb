"""One thing to compute: a shape, a mask, a pass and a dtype; its inputs and its work."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.attention import patterns
from benchmarks.attention.shapes import Shape

DIRECTIONS = ("fwd", "bwd")
"""Forward; forward and backward, with the gradients of query, key and value."""

BACKWARD = 3.5
"""Useful work of forward and backward by that of forward: 2 products of T x S x D forward, 5 backward."""


@dataclass(frozen=True)
class AttentionCase:
    """What every implementation computes and is compared on."""

    shape: Shape
    pattern: str
    direction: str
    dtype: str

    @property
    def backward(self) -> bool:
        """Whether gradients are wanted, too."""
        return self.direction == "bwd"

    @property
    def name(self) -> str:
        """Such as "cpu-t4096 causal bwd"."""
        return f"{self.shape.name} {self.pattern} {self.direction}"

    @property
    def pairs(self) -> int:
        """Pairs of query and key that may attend, over the batch, for one head."""
        return patterns.spans(self.pattern, self.shape).pairs(self.shape.batch)

    @property
    def flops(self) -> float:
        """Useful work: the products of the pairs that may attend, whatever an implementation computes besides."""
        forward = 4 * self.pairs * self.shape.num_heads * self.shape.head_dim
        return forward * (BACKWARD if self.backward else 1)

    def fields(self) -> dict[str, Any]:
        """Sizes, mask, pass, dtype and work, in units without prefixes."""
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
        """Query, key, value and, for gradients, the output's cotangent; the same in every run and process."""
        sizes = (self.shape.query, self.shape.key, self.shape.key, self.shape.query)
        for number, size in enumerate(sizes[: 4 if self.backward else 3]):
            rng = np.random.default_rng([number, *size])
            yield rng.standard_normal(size, np.float32).astype(jnp.dtype(self.dtype))

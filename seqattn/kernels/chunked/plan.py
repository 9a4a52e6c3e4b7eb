"""A call that tiles can serve, taken apart: what is static in it, and the arrays that a compiled program gets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.call import Call
from seqattn.kernels.chunked import schedule
from seqattn.kernels.chunked.schedule import Grid
from seqattn.kernels.traced import capture
from seqattn.pytrees import pytree

Leaves = list[Any]
"""The leaves of a `Call`: arrays, numbers, and NumPy arrays that are known at trace time."""


@pytree
@dataclasses.dataclass(frozen=True)
class TiledCall(Call):
    """A call whose arrays are all that a program gets: mask and score modification are traced, dropout is its words.

    Attributes:
        words: two words of the dropout's key, or None.
        schedule: the tiles to visit.
    """

    words: Any = None
    schedule: Any = None

    @property
    def inner_scale(self) -> Array | None:
        """The scale where it multiplies the queries; None where they are too coarse and it multiplies the products."""
        return self.scale if self.query.dtype == self.high else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call; `tree` is the structure of its `TiledCall`, whose leaves JAX sees."""

    grid: Grid
    dropout_rate: float
    tree: jax.tree_util.PyTreeDef

    def call(self, leaves: Leaves) -> TiledCall:
        """The call that was taken apart."""
        return jax.tree.unflatten(self.tree, leaves)


def prepare(call: Call) -> tuple[Plan, Leaves]:
    """A call of `attend` with its grid and schedule, taken apart."""
    batch, length, num_heads, _ = call.query.shape
    size, num_kv_heads = call.key.shape[1:3]
    shape = (batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    grid, tiles = schedule.plan(shape, call.mask, call.bias is not None, call.q_at, call.kv_at)
    words = None if call.dropout is None else call.dropout.words()
    given = {field.name: getattr(call, field.name) for field in dataclasses.fields(Call)}
    given |= {"scale": jnp.asarray(call.scale, call.high), "dropout": None}
    tiled = TiledCall(**given, words=words, schedule=tiles)
    leaves, tree = jax.tree.flatten(capture(tiled, like=tiled))
    return Plan(grid, 0.0 if call.dropout is None else call.dropout.rate, tree), leaves


def is_floating(x: Any) -> bool:
    """Whether a leaf has a gradient."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)

"""A call for the tiled kernel, split into a static plan and the arrays that the compiled program receives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.kernels.block_mask import Visits
from seqattn.kernels.call import Call
from seqattn.kernels.chunked import schedule
from seqattn.kernels.chunked.schedule import Grid, Schedule
from seqattn.kernels.traced import capture
from seqattn.mask import Mask
from seqattn.pytrees import pytree, static

Leaves = list[Any]
"""The leaves of a `Call`: arrays, numbers, and NumPy arrays whose values are known at trace time."""


@pytree
@dataclasses.dataclass(frozen=True)
class TiledCall(Call):
    """A call in the form of a program's inputs: mask and score modification are traced, dropout is its key's words.

    Attributes:
        words: two words of the dropout key, or None.
        schedule: the tiles to visit.
    """

    words: Any = None
    schedule: Any = None

    @property
    def inner_scale(self) -> Array | None:
        """The scale, if it multiplies the queries; None if it multiplies the products.

        Rounding scaled bfloat16 or float16 queries would lose precision, so the float32 products are scaled instead.
        """
        return self.scale if self.query.dtype == self.high else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
        grid: how the call is cut into tiles.
        dropout_rate: 0 if there is no dropout.
        tree: the structure of the `TiledCall`, whose leaves are the inputs of the compiled program.
    """

    grid: Grid
    dropout_rate: float
    tree: jax.tree_util.PyTreeDef

    def call(self, leaves: Leaves) -> TiledCall:
        """Rebuilds the call from its leaves."""
        return jax.tree.unflatten(self.tree, leaves)


def shape_of(call: Call) -> tuple[int, int, int, int, int]:
    """Returns B, K, N / K, T and S."""
    batch, length, num_heads, _ = call.query.shape
    size, num_kv_heads = call.key.shape[1:3]
    return batch, num_kv_heads, num_heads // num_kv_heads, length, size


@pytree
@dataclasses.dataclass(frozen=True)
class Found:
    """The grid of a call with the tiles to visit.

    Attributes:
        schedule: the tiles.
        grid: the grid.
    """

    schedule: Schedule
    grid: Grid = static()


def find(call: Call, *, reaching: Mask | None = None) -> Found:
    """Returns the grid of a call and the tiles to visit. For `reaching` see `prepare`."""
    mask = call.mask if reaching is None else reaching
    grid, tiles = schedule.plan(shape_of(call), mask, call.bias is not None, call.q_at, call.kv_at)
    return Found(tiles, grid)


def prepare(call: Call, *, reaching: Mask | None = None) -> tuple[Plan, Leaves]:
    """Returns a call of `attend` with its grid and schedule, split into the static plan and the leaves.

    Args:
        call: the call.
        reaching: the mask that tells which tiles are visible, if that of the call is a program already.
    """
    found = Visits.of(call, "chunked")
    # A list that was made for other sizes does not fit. A bias may mask pairs, so that no tile of it is full.
    if found is None or found.grid.shape != shape_of(call) or call.bias is not None:
        found = find(call, reaching=reaching)
    # The program receives the dropout key as two words, which are all that `dropout.kept` reads.
    words = None if call.dropout is None else call.dropout.words()
    given = {field.name: getattr(call, field.name) for field in dataclasses.fields(Call)}
    # The scale becomes an array, so that another value does not compile again, and so that it can have a gradient.
    given |= {"scale": jnp.asarray(call.scale, call.high), "dropout": None, "visits": None}
    tiled = TiledCall(**given, words=words, schedule=found.schedule)
    # User functions are traced now: the compiled program must not depend on arrays they close over.
    leaves, tree = jax.tree.flatten(capture(tiled, like=tiled))
    return Plan(found.grid, 0.0 if call.dropout is None else call.dropout.rate, tree), leaves

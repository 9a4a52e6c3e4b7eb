"""A mask over given coordinates with the tiles that it reaches, found once and shared by many calls of attention."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from seqattn.checks import check_sizes
from seqattn.coordinates import Coordinates
from seqattn.kernels import blocks
from seqattn.mask import Mask
from seqattn.pytrees import pytree, static

_MOST_SIGNS = 32
"""The most tiles that `print` shows along each side."""

_SIGNS = np.array([".", "o", "#"])
"""How `print` shows a tile of each kind: no visible pair, some, or all."""


@pytree
@dataclasses.dataclass(frozen=True)
class Visits:
    """The tiles that kernels visit.

    Attributes:
        by_name: for each implementation that visits tiles from a list, its list, in a form of its own.
        split: the `Split` for which the lists were made, with its mesh, or None. Each device has lists of its own.
    """

    by_name: dict[str, Any]
    split: Any = static(default=None)

    @staticmethod
    def of(call: Any, name: str) -> Any:
        """Returns the list of an implementation that comes with a call, or None."""
        return None if call.visits is None else call.visits.by_name.get(name)

    @staticmethod
    def of_whole(call: Any) -> Any:
        """Returns the call without lists that are those of each device's share."""
        shared_out = call.visits is not None and call.visits.split is not None
        return dataclasses.replace(call, visits=None) if shared_out else call


@jax.tree_util.register_pytree_node_class
class BlockMask:
    """A `Mask`, the coordinates of queries and keys, and the tiles that kernels visit for them.

    Make it with `seqattn.block_mask` and pass it to `attend` as `mask`, without `q_at` and `kv_at`. Calls that have the
    same one share the lists of tiles. A call for which a list does not fit, such as one with other sizes, makes its
    own, and computes the same. It is a pytree. Its attributes belong together, so none of them can be replaced.

    Args:
        mask: the mask.
        q_at: coordinates of the queries, `[T]` or `[*batch, T]`.
        kv_at: coordinates of the keys, `[S]` or `[*batch, S]`.
        visits: the lists of tiles for these.
    """

    def __init__(self, mask: Mask, q_at: Coordinates, kv_at: Coordinates, visits: Visits) -> None:
        self._parts = mask, q_at, kv_at, visits

    mask = property(lambda self: self._parts[0], doc="The mask.")
    q_at = property(lambda self: self._parts[1], doc="Coordinates of the queries.")
    kv_at = property(lambda self: self._parts[2], doc="Coordinates of the keys.")
    visits = property(lambda self: self._parts[3], doc="The lists of tiles.")

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """Returns the parts as children."""
        return self._parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: tuple[Any, ...]) -> "BlockMask":
        """Inverts `tree_flatten`."""
        made = object.__new__(cls)
        made._parts = tuple(parts)
        return made

    def kinds(self, queries: int, keys: int) -> Int[np.ndarray, "rows I J"] | Int[Array, "rows I J"]:
        """Returns for each tile whether a kernel with such tiles skips it.

        Args:
            queries: queries in a tile.
            keys: keys in a tile.

        Returns:
            `[B or 1, I, J]` integers: 0 if the tile is skipped, 1 if the mask is evaluated for its pairs, 2 if all of
            them are visible. A NumPy array if mask and coordinates are known at trace time.

        Raises:
            ValueError: a size is no integer of at least 1.
        """
        check_sizes(queries=queries, keys=keys)
        return blocks.kinds_of_tiles(self.mask, *self._rows(), queries, keys)

    def _rows(self) -> tuple[Coordinates, Coordinates]:
        """Returns the coordinates with one batch dim, `[B or 1, T]` and `[B or 1, S]`."""
        both = self.q_at.rows(), self.kv_at.rows()
        # Rows that share their keys have batch dims of 1 there.
        batch = np.broadcast_shapes(*(at.shape[:-1] for at in both))

        def field(x: Any) -> Any:
            if math.prod(x.shape[:-1]) > 1:
                x = (jnp if isinstance(x, jax.Array) else np).broadcast_to(x, (*batch, x.shape[-1]))
            return x.reshape(-1, x.shape[-1])

        return jax.tree.map(field, both)

    def __str__(self) -> str:
        """Returns the share of tiles that are visited, and a picture of those of the first row."""
        sizes = self.q_at.shape[-1], self.kv_at.shape[-1]
        if 0 in sizes or not all(map(_is_readable, jax.tree.leaves((self.mask, self.q_at, self.kv_at)))):
            return f"{self.mask} of {sizes[0]} queries and {sizes[1]} keys"
        tile = 1
        while max(sizes) > tile * _MOST_SIGNS:
            tile *= 2
        # Read and computed now: `print` may stand in a traced function, or the arrays lie on several devices.
        known = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, self)
        with jax.ensure_compile_time_eval():
            kinds = np.asarray(known.kinds(tile, tile))
        visited = blocks.visits(int((kinds != blocks.EMPTY).sum()), kinds.size, tile, tile)
        return "\n".join([f"{self.mask} {visited}", *("".join(_SIGNS[row]) for row in kinds[0])])


def _is_readable(x: Any) -> bool:
    """Returns whether the values of a leaf can be read here."""
    if not isinstance(x, jax.Array):
        return True
    return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


def opened(
    mask: Mask | BlockMask | Array | None, q_at: Coordinates | None, kv_at: Coordinates | None
) -> tuple[Mask | Array | None, Coordinates | None, Coordinates | None, Visits | None]:
    """Returns mask, coordinates and lists of tiles of a call. A `BlockMask` holds all of them.

    Raises:
        ValueError: coordinates are given beside a `BlockMask`.
    """
    if not isinstance(mask, BlockMask):
        return mask, q_at, kv_at, None
    if q_at is not None or kv_at is not None:
        raise ValueError("a BlockMask holds the coordinates of queries and keys; give no q_at and kv_at beside it")
    return mask.mask, mask.q_at, mask.kv_at, mask.visits

"""Masks: predicates over the coordinates of one query and one key. True means "may attend"."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqattn.coordinates import Coordinates, Tile
from seqattn.pytrees import pytree
from seqattn.sizes import Size

Truth = Any
"""A boolean scalar: `np.bool_` if coordinates are known at trace time, else a traced boolean."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """The answer of a mask for all pairs between a tile of queries and a tile of keys.

    Attributes:
        some: False proves that every pair is masked: a kernel skips the tile.
        every: True proves that every pair is visible: a kernel leaves the tile unmasked.
    """

    some: Truth
    every: Truth


class Mask:
    """A predicate over one query and one key: True if the query may attend to the key.

    Kernels lift a mask over whole sequences with `jax.vmap`. Compose masks with `&`, `|` and ``~``. A mask is a pytree:
    sizes are static, arrays are its leaves. It may also read `query.batch` and `query.head`, the indices of the batch
    row and of the query head.

    To write a mask of your own, pass a function to `MaskMod`, or subclass `Mask`: register a frozen dataclass with
    `pytree` and override `__call__`. Override `reach` as well if kernels are to skip tiles.

    >>> from seqattn.masks import Causal, Prefix, SlidingWindow
    >>> at = Coordinates.range(4)
    >>> print(Causal().dense(at, at).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]
    >>> print((Causal() & SlidingWindow(2) | Prefix(1)).dense(at, at).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 0 1 1]]
    """

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        """Returns whether the query may attend to the key.

        Args:
            query: the coordinates of one query; all fields are scalars.
            key: the coordinates of one key; all fields are scalars.

        Returns:
            A boolean scalar.
        """
        raise NotImplementedError

    def reach(self, query: Tile, key: Tile) -> Reach:
        """Returns whether some pair and whether every pair of two tiles is visible.

        The answer must be sound, but need not be tight: `some` may be True and `every` False for any tile, which is the
        default. The fields of the tiles broadcast, so use array operations (`&`, `|`, ``~``) and no Python conditions.

        Args:
            query: the ranges of the queries' coordinates.
            key: the ranges of the keys' coordinates.
        """
        return Reach(some=np.True_, every=np.False_)

    def dense(
        self, query: Coordinates, key: Coordinates, num_heads: int | None = None
    ) -> Bool[Array, "*batch T S"] | Bool[Array, "*batch N T S"]:
        """Returns the matrix of all pairs, for inspection and tests.

        Args:
            query: coordinates of the queries, `[*batch, T]`.
            key: coordinates of the keys, `[*batch, S]`. The batch dimensions broadcast.
            num_heads: the number of query heads, N. A mask that reads `query.head` requires it.

        Returns:
            Booleans `[*batch, T, S]`, or `[*batch, N, T, S]` if `num_heads` is given.
        """
        # Under `jax_numpy_rank_promotion="raise"` the ranks of the two batches must be equal.
        rank = max(leaf.ndim for leaf in jax.tree.leaves((query, key)))
        at = jax.tree.map(lambda x: jnp.reshape(x, (1,) * (rank - x.ndim) + x.shape), (query, key))
        batch = jnp.broadcast_shapes(*(leaf.shape[:-1] for leaf in jax.tree.leaves(at)))
        rows = math.prod(batch)
        query, key = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, x.shape[-1])).reshape(rows, x.shape[-1]), at)
        pairs = self._lifted(query, key, rows, num_heads)
        return pairs.reshape(*batch, *pairs.shape[1:])

    def over(
        self, query: Coordinates, key: Coordinates, *, batch: Size, num_heads: int
    ) -> Bool[Array, "rows heads T S"]:
        """Returns the matrix of a call, `[B or 1, N or 1, T, S]`.

        It has N heads only if the mask reads `query.head`, and one row only if nothing differs by row.

        Args:
            query: coordinates of the queries, `[B or 1, T]`.
            key: coordinates of the keys, `[B or 1, S]`.
            batch: the number of batch rows, B.
            num_heads: the number of query heads, N.
        """
        query, key, read = query.rows(), key.rows(), reads(self, query, key)
        rows = key.shape[0] if query.shape[0] == 1 else query.shape[0]
        pairs = self._lifted(query, key, batch if read.batch else rows, num_heads if read.head else None)
        return pairs if read.head else pairs[:, None]

    def _lifted(self, query: Coordinates, key: Coordinates, rows: Size, num_heads: int | None) -> Bool[Array, "..."]:
        """Returns the mask of all pairs, `[rows, T, S]` or `[rows, N, T, S]`. Coordinates have one row or `rows`."""

        def pair(query: Coordinates, key: Coordinates, batch: Array, head: Array | None) -> Truth:
            return self(dataclasses.replace(query, batch=batch, head=head), key)

        query, key = (jax.tree.map(lambda x: x[0], at) if at.shape[0] == 1 else at for at in (query, key))
        heads = None if num_heads is None else jnp.arange(num_heads, dtype=jnp.int32)
        axes = [None if at.position.ndim == 1 else 0 for at in (query, key)]
        lifted = jax.vmap(jax.vmap(pair, (None, 0, None, None)), (0, None, None, None))
        lifted = lifted if heads is None else jax.vmap(lifted, (None, None, None, 0))
        return jax.vmap(lifted, (*axes, 0, None))(query, key, jnp.arange(rows, dtype=jnp.int32), heads)

    def check(self, batch: Size, num_heads: int) -> None:
        """Raises ValueError if the arrays of the mask do not fit a call of B rows and N heads."""

    def __and__(self, other: "Mask") -> "Mask":
        """Returns a mask that allows a pair if both masks do."""
        return And(self, _checked(other))

    def __or__(self, other: "Mask") -> "Mask":
        """Returns a mask that allows a pair if either mask does."""
        return Or(self, _checked(other))

    def __invert__(self) -> "Mask":
        """Returns a mask that allows a pair if this one does not."""
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Reads:
    """Whether a mask depends on the batch row and on the head, apart from the coordinates."""

    batch: bool
    head: bool


def reads(mask: Mask, query: Coordinates, key: Coordinates) -> Reads:
    """Returns whether `mask` reads `query.batch` and `query.head`, from a trace on coordinates of these dtypes."""

    def predicate(query: Coordinates, key: Coordinates, batch: Array, head: Array) -> Truth:
        return mask(dataclasses.replace(query, batch=batch, head=head), key)

    query, key = (jax.tree.map(lambda x: np.zeros((), x.dtype), at) for at in (query, key))
    jaxpr = jax.make_jaxpr(predicate)(query, key, np.int32(0), np.int32(0)).jaxpr
    used = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    batch, head = (any(x is y for y in used) for x in jaxpr.invars[-2:])
    return Reads(batch, head)


def _checked(other: object) -> Mask:
    """Raises TypeError unless `other` is a mask."""
    if not isinstance(other, Mask):
        raise TypeError(
            f"a Mask combines with another Mask, not with {type(other).__name__}; an array becomes one by "
            "MaskMod(lambda query, key, table: table[query.position, key.position], table)"
        )
    return other


@pytree
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Allows a pair if both masks do: `first & second`."""

    first: Mask
    second: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return self.first(query, key) & self.second(query, key)

    def check(self, batch: Size, num_heads: int) -> None:
        self.first.check(batch, num_heads)
        self.second.check(batch, num_heads)

    def reach(self, query: Tile, key: Tile) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        return Reach(some=a.some & b.some, every=a.every & b.every)


@pytree
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Allows a pair if either mask does: `first | second`."""

    first: Mask
    second: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return self.first(query, key) | self.second(query, key)

    def check(self, batch: Size, num_heads: int) -> None:
        self.first.check(batch, num_heads)
        self.second.check(batch, num_heads)

    def reach(self, query: Tile, key: Tile) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        return Reach(some=a.some | b.some, every=a.every | b.every)


@pytree
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Allows a pair if the mask does not: `~mask`."""

    mask: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return ~self.mask(query, key)

    def check(self, batch: Size, num_heads: int) -> None:
        self.mask.check(batch, num_heads)

    def reach(self, query: Tile, key: Tile) -> Reach:
        inner = self.mask.reach(query, key)
        return Reach(some=~inner.every, every=~inner.some)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False)
class MaskMod(Mask):
    """A mask from any function `fn(query, key, *arrays)` of scalar coordinates that returns a scalar boolean.

    The arrays are leaves of the pytree. The function is static: a new lambda in each call of a jitted function compiles
    again, so pass changing values as arrays. For arrays with one value per batch row or head, index with `query.batch`
    and `query.head`.

    Kernels evaluate the function for every pair. A subclass of `Mask` with `reach` lets them skip tiles.

    Args:
        fn: the function.
        *arrays: further arguments of the function.

    Raises:
        TypeError: in a call, if the function does not return a scalar boolean.

    Blocks of two tokens:

    >>> block = MaskMod(lambda query, key, size: query.position // size == key.position // size, jnp.array(2))
    >>> at = Coordinates.range(4)
    >>> print(block.dense(at, at).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 1]
     [0 0 1 1]]

    A window for each head:

    >>> window = MaskMod(lambda query, key, size: query.position - key.position < size[query.head], jnp.array([1, 3]))
    >>> from seqattn.masks import Causal
    >>> print((Causal() & window).dense(at, at, num_heads=2).astype(int))
    [[[1 0 0 0]
      [0 1 0 0]
      [0 0 1 0]
      [0 0 0 1]]
    <BLANKLINE>
     [[1 0 0 0]
      [1 1 0 0]
      [1 1 1 0]
      [0 1 1 1]]]
    """

    fn: Callable[..., Any]
    arrays: tuple[Any, ...]

    def __init__(self, fn: Callable[..., Any], *arrays: Any) -> None:
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "arrays", arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """Returns the arrays as leaves and the function as static data."""
        return self.arrays, self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], arrays: tuple[Any, ...]) -> "MaskMod":
        """Inverts `tree_flatten`."""
        return cls(fn, *arrays)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        result = jnp.asarray(self.fn(query, key, *self.arrays))
        if result.dtype != jnp.bool_ or result.shape != ():
            raise TypeError(
                "the function of a MaskMod must return a scalar boolean (True: may attend) for one query and one key, "
                f"got {result.dtype} of shape {result.shape}"
            )
        return result

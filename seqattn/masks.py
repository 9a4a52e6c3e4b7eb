"""Who may look at whom: predicates over the coordinates of one query and one key. True means "may attend"."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from seqattn.coordinates import Coordinates, Tile
from seqattn.static import check_integer, pytree, static

Truth = Any
"""A boolean scalar: `np.bool_` where coordinates are known at trace time, a traced boolean elsewhere."""


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a mask says of all pairs between a tile of queries and a tile of keys.

    Attributes:
        some: False proves that no pair may attend: a kernel skips the tile.
        every: True proves that every pair may attend: a kernel leaves the tile unmasked.
    """

    some: Truth
    every: Truth


class Mask:
    """A predicate over one query and one key, lifted over whole sequences with `jax.vmap`.

    Compose masks with `&`, `|` and `~`. A mask is a pytree: sizes are static, arrays are its leaves.

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
        """Whether the query at scalar coordinates `query` may attend to the key at `key`."""
        raise NotImplementedError

    def reach(self, query: Tile, key: Tile) -> Reach:
        """Whether some and whether every pair of two tiles may attend; sound, not always tight."""
        return Reach(some=np.True_, every=np.False_)

    def dense(self, query: Coordinates, key: Coordinates) -> Bool[Array, "*batch T S"]:
        """The whole matrix `[*batch, T, S]` for queries `[*batch, T]` and keys `[*batch, S]`; batches broadcast."""
        over_keys = jax.vmap(self, in_axes=(None, 0))
        over_pairs = jax.vmap(over_keys, in_axes=(0, None))

        def matrix(*leaves: Array) -> Array:
            return over_pairs(Coordinates(*leaves[:2]), Coordinates(*leaves[2:]))

        leaves = (query.position, query.segment, key.position, key.segment)
        rank = max(leaf.ndim for leaf in leaves)
        # Where jax_numpy_rank_promotion is "raise", the ranks of the two batches must be equal.
        ranked = (jnp.reshape(leaf, (1,) * (rank - leaf.ndim) + leaf.shape) for leaf in leaves)
        return jnp.vectorize(matrix, signature="(t),(t),(s),(s)->(t,s)")(*ranked)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, _checked(other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, _checked(other))

    def __invert__(self) -> "Mask":
        return Not(self)


def _checked(other: object) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(
            f"a Mask combines with another Mask, not with {type(other).__name__}; an array becomes one by "
            "MaskMod(lambda query, key, table: table[query.position, key.position], table)"
        )
    return other


def _is_known(x: object) -> bool:
    """Whether the values of an array can be looked at here."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    return isinstance(x, np.ndarray) or known


@pytree
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Both masks allow the pair: `first & second`."""

    first: Mask
    second: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return self.first(query, key) & self.second(query, key)

    def reach(self, query: Tile, key: Tile) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        return Reach(some=a.some & b.some, every=a.every & b.every)


@pytree
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Either mask allows the pair: `first | second`."""

    first: Mask
    second: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return self.first(query, key) | self.second(query, key)

    def reach(self, query: Tile, key: Tile) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        return Reach(some=a.some | b.some, every=a.every | b.every)


@pytree
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The mask forbids the pair: `~mask`."""

    mask: Mask

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return ~self.mask(query, key)

    def reach(self, query: Tile, key: Tile) -> Reach:
        inner = self.mask.reach(query, key)
        return Reach(some=~inner.every, every=~inner.some)


@pytree
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """No look into the future: the key's position is at most the query's (Vaswani 2017, section 3.2.3)."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return query.position >= key.position

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=query.position_max >= key.position_min, every=query.position_min >= key.position_max)


@pytree
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """The `size` latest keys, the query's own position included (Beltagy 2020), and `ahead` keys after it.

    >>> at = Coordinates.range(4)
    >>> print(SlidingWindow(2).dense(at, at).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [0 1 1 0]
     [0 0 1 1]]
    """

    size: int = static()
    ahead: int = static(default=0)

    def __post_init__(self) -> None:
        check_integer("the size of a sliding window", self.size, 1)
        check_integer("the number of keys ahead", self.ahead, 0)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        back = query.position - key.position
        return (back < self.size) & (back >= -self.ahead)

    def reach(self, query: Tile, key: Tile) -> Reach:
        least, most = query.position_min - key.position_max, query.position_max - key.position_min
        return Reach(
            some=(most >= -self.ahead) & (least < self.size), every=(least >= -self.ahead) & (most < self.size)
        )


@pytree
@dataclasses.dataclass(frozen=True)
class SameSegment(Mask):
    """Query and key are tokens of the same text. Padding (segment 0) belongs to no text.

    >>> packed = Coordinates.from_segments(jnp.array([1, 1, 2, 0]))
    >>> print(SameSegment().dense(packed, packed).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 0]
     [0 0 0 0]]
    """

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return (query.segment == key.segment) & (query.segment != 0)

    def reach(self, query: Tile, key: Tile) -> Reach:
        overlap = (query.segment_min <= key.segment_max) & (key.segment_min <= query.segment_max)
        one_text = (query.segment_min == query.segment_max) & (key.segment_min == key.segment_max)
        same = one_text & (query.segment_min == key.segment_min) & (query.segment_min != 0)
        return Reach(some=overlap & _holds_token(query) & _holds_token(key), every=same)


@pytree
@dataclasses.dataclass(frozen=True)
class NotPadding(Mask):
    """Neither the query nor the key is padding (segment 0)."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return (query.segment != 0) & (key.segment != 0)

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=_holds_token(query) & _holds_token(key), every=_all_tokens(query) & _all_tokens(key))


def _holds_token(tile: Tile) -> Truth:
    return (tile.segment_min != 0) | (tile.segment_max != 0)


def _all_tokens(tile: Tile) -> Truth:
    return (tile.segment_min > 0) | (tile.segment_max < 0)


@pytree
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """The first `length` keys of a text, for every query: `Causal() | Prefix(n)` is a prefix language model.

    `length` is a leaf: an integer or a scalar array. A length for each row is `jax.vmap` over the mask.
    """

    length: int | Array

    def __post_init__(self) -> None:
        if isinstance(self.length, (int, float, np.number)):
            check_integer("the length of a prefix", self.length, 0)
        elif isinstance(self.length, jax.Array | np.ndarray) and not jnp.issubdtype(self.length.dtype, jnp.integer):
            raise ValueError(f"the length of a prefix must be an integer, got {self.length.dtype}")
        elif _is_known(self.length) and (least := np.min(self.length, initial=0)) < 0:
            raise ValueError(f"the length of a prefix ({least}) must be an integer of at least 0")

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return key.position < self.length

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=key.position_min < self.length, every=key.position_max < self.length)


@pytree
@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """Every `step`-th key, counted from the query's own position (Child 2019, the strided pattern).

    >>> at = Coordinates.range(4)
    >>> print((Causal() & Dilated(2)).dense(at, at).astype(int))
    [[1 0 0 0]
     [0 1 0 0]
     [1 0 1 0]
     [0 1 0 1]]
    """

    step: int = static()

    def __post_init__(self) -> None:
        check_integer("the step of a dilated mask", self.step, 1)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return (query.position - key.position) % self.step == 0

    def reach(self, query: Tile, key: Tile) -> Reach:
        least, most = query.position_min - key.position_max, query.position_max - key.position_min
        one_distance = (least == most) & (least % self.step == 0)
        return Reach(some=most // self.step * self.step >= least, every=one_distance | np.bool_(self.step == 1))


@pytree
@dataclasses.dataclass(frozen=True)
class SameBlock(Mask):
    """Query and key are in the same run of `size` positions, counted from 0 (Liu 2018, section 4.2.4: local attention).

    >>> at = Coordinates.range(5)
    >>> print((Causal() & SameBlock(2)).dense(at, at).astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [0 0 1 0 0]
     [0 0 1 1 0]
     [0 0 0 0 1]]
    """

    size: int = static()

    def __post_init__(self) -> None:
        check_integer("the size of a block", self.size, 1)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return query.position // self.size == key.position // self.size

    def reach(self, query: Tile, key: Tile) -> Reach:
        first, last = query.position_min // self.size, query.position_max // self.size
        key_first, key_last = key.position_min // self.size, key.position_max // self.size
        one = (first == last) & (key_first == key_last) & (first == key_first)
        return Reach(some=(first <= key_last) & (key_first <= last), every=one)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False)
class MaskMod(Mask):
    """Any predicate: `fn(query, key, *arrays)` on scalar coordinates, returning a scalar boolean.

    The function is static: a new lambda at each call of a jitted function compiles anew. Give what changes as arrays.

    >>> block = MaskMod(lambda query, key, size: query.position // size == key.position // size, jnp.array(2))
    >>> at = Coordinates.range(4)
    >>> print(block.dense(at, at).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 1]
     [0 0 1 1]]
    """

    fn: Callable[..., Any]
    arrays: tuple[Any, ...]

    def __init__(self, fn: Callable[..., Any], *arrays: Any) -> None:
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "arrays", arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """The arrays are leaves, the function is static."""
        return self.arrays, self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], arrays: tuple[Any, ...]) -> "MaskMod":
        """The inverse of `tree_flatten`."""
        return cls(fn, *arrays)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        result = jnp.asarray(self.fn(query, key, *self.arrays))
        if result.dtype != jnp.bool_ or result.shape != ():
            raise TypeError(
                "the function of a MaskMod must return a scalar boolean (True: may attend) for one query and one key, "
                f"got {result.dtype} of shape {result.shape}"
            )
        return result

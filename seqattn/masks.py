"""Masks: causal, sliding window, same segment, padding, prefix, dilated, blocks and image neighborhoods. See `mask`."""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.checks import check_integer
from seqattn.coordinates import Coordinates, Tile
from seqattn.mask import Mask, Reach, Truth
from seqattn.pytrees import pytree, static
from seqattn.sizes import Size


@pytree
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Allows keys whose position is at most the query's (Vaswani 2017, section 3.2.3)."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return query.position >= key.position

    def reach(self, query: Tile, key: Tile) -> Reach:
        # The last query and the first key are the most permissive pair; the first query and the last key are the
        # strictest.
        return Reach(some=query.position_max >= key.position_min, every=query.position_min >= key.position_max)


@pytree
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """Allows the `size` latest keys, including the query's own position (Beltagy 2020), and `ahead` keys after it.

    Attributes:
        size: an integer of at least 1, static.
        ahead: an integer of at least 0, static. Defaults to 0.

    Raises:
        ValueError: `size` or `ahead` is out of range.

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
        # The distances between the two tiles range from `least` to `most`.
        least, most = query.position_min - key.position_max, query.position_max - key.position_min
        return Reach(
            some=(most >= -self.ahead) & (least < self.size), every=(least >= -self.ahead) & (most < self.size)
        )


@pytree
@dataclasses.dataclass(frozen=True)
class SameSegment(Mask):
    """Allows pairs of tokens from the same text, as in packed sequences. Padding (segment 0) belongs to no text.

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
        # Ranges that overlap need not share a segment, but ranges that do not overlap share none: `some` is sound.
        overlap = (query.segment_min <= key.segment_max) & (key.segment_min <= query.segment_max)
        one_text = (query.segment_min == query.segment_max) & (key.segment_min == key.segment_max)
        same = one_text & (query.segment_min == key.segment_min) & (query.segment_min != 0)
        return Reach(some=overlap & _holds_token(query) & _holds_token(key), every=same)


@pytree
@dataclasses.dataclass(frozen=True)
class NotPadding(Mask):
    """Allows a pair if neither the query nor the key is padding (segment 0)."""

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        return (query.segment != 0) & (key.segment != 0)

    def reach(self, query: Tile, key: Tile) -> Reach:
        return Reach(some=_holds_token(query) & _holds_token(key), every=_all_tokens(query) & _all_tokens(key))


def _holds_token(tile: Tile) -> Truth:
    """Returns False only if the tile holds nothing but padding."""
    return (tile.segment_min != 0) | (tile.segment_max != 0)


def _all_tokens(tile: Tile) -> Truth:
    """Returns True only if the tile holds no padding: a range from below to above 0 may contain it."""
    return (tile.segment_min > 0) | (tile.segment_max < 0)


@pytree
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Allows the first `length` keys of a text for every query.

    `Causal() | Prefix(n)` is the mask of a prefix language model (Raffel 2020, figure 3).

    Attributes:
        length: a leaf: an integer of at least 0, a scalar array, or an integer array `[B]` with a length for each row.

    Raises:
        ValueError: a length is not an integer or is negative; in a call, the array is not `[B]`.
    """

    length: int | np.integer | Array | np.ndarray

    def __post_init__(self) -> None:
        if isinstance(self.length, (int, float, np.number)):
            check_integer("the length of a prefix", self.length, 0)
        elif isinstance(self.length, jax.Array | np.ndarray) and not jnp.issubdtype(self.length.dtype, jnp.integer):
            raise ValueError(f"the length of a prefix must be an integer, got {self.length.dtype}")
        elif _is_known(self.length):
            check_integer("the length of a prefix", int(np.min(self.length, initial=0)), 0)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        if jnp.ndim(self.length) == 0:
            return key.position < self.length
        if query.batch is None:
            raise ValueError(f"a prefix with lengths {jnp.shape(self.length)} needs the batch row of the query")
        return key.position < jnp.asarray(self.length)[query.batch]

    def check(self, batch: Size, num_heads: int) -> None:
        """Raises ValueError unless `length` is a scalar or has one entry for each row."""
        if (shape := jnp.shape(self.length)) not in ((), (batch,)):
            raise ValueError(f"the lengths {shape} of a prefix must be one for each of the {batch} rows, or a scalar")

    def reach(self, query: Tile, key: Tile) -> Reach:
        # Broadcasts against the tiles `[B or 1, query tiles, key tiles]`.
        length: Any = self.length
        length = length if jnp.ndim(length) == 0 else length[:, None, None]
        return Reach(some=key.position_min < length, every=key.position_max < length)


@pytree
@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """Allows every `step`-th key, counted from the query's own position (Child 2019, the strided pattern).

    Attributes:
        step: an integer of at least 1, static.

    Raises:
        ValueError: `step` is out of range.

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
        # Some pair is visible if a multiple of `step` is between the smallest and the largest distance.
        return Reach(some=most // self.step * self.step >= least, every=one_distance | np.bool_(self.step == 1))


@pytree
@dataclasses.dataclass(frozen=True)
class SameBlock(Mask):
    """Allows pairs in the same run of `size` positions, counted from 0 (Liu 2018, section 4.2.4: local attention).

    Attributes:
        size: an integer of at least 1, static.

    Raises:
        ValueError: `size` is out of range.

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


@pytree
@dataclasses.dataclass(frozen=True)
class Neighborhood(Mask):
    """Allows keys within `radius` of the query along every axis of `Coordinates.axes` (Ramachandran 2019, section 3.1).

    Use it for tokens in more than one dimension, such as image patches. At an edge a query has fewer neighbors.

    Attributes:
        radius: an integer of at least 0 for all axes, or a tuple with one for each axis; static.

    Raises:
        ValueError: a radius is out of range, or, in a call, the coordinates have another number of axes.

    >>> image = Coordinates.grid(3, 3)
    >>> print(Neighborhood(1).dense(image, image)[4].reshape(3, 3).astype(int))
    [[1 1 1]
     [1 1 1]
     [1 1 1]]
    >>> print(Neighborhood((0, 1)).dense(image, image)[3].reshape(3, 3).astype(int))
    [[0 0 0]
     [1 1 0]
     [0 0 0]]
    """

    radius: int | tuple[int, ...] = static()

    def __post_init__(self) -> None:
        for radius in self.radius if isinstance(self.radius, tuple) else [self.radius]:
            check_integer("the radius of a neighborhood", radius, 0)

    def __call__(self, query: Coordinates, key: Coordinates) -> Truth:
        near = [abs(a - b) <= radius for a, b, radius in self._along(query.axes, key.axes)]
        return functools.reduce(operator.and_, near)

    def reach(self, query: Tile, key: Tile) -> Reach:
        some, every = [], []
        for (first, last), (key_first, key_last), radius in self._along(
            tuple(zip(query.axes_min, query.axes_max, strict=True)), tuple(zip(key.axes_min, key.axes_max, strict=True))
        ):
            some.append((first - key_last <= radius) & (key_first - last <= radius))
            every.append((last - key_first <= radius) & (key_last - first <= radius))
        return Reach(some=functools.reduce(operator.and_, some), every=functools.reduce(operator.and_, every))

    def _along(self, query: tuple[Any, ...], key: tuple[Any, ...]) -> Iterator[tuple[Any, Any, int]]:
        """Yields the coordinates of query and key along each axis, and the radius there."""
        radii = self.radius if isinstance(self.radius, tuple) else (self.radius,) * max(1, len(query))
        if not len(query) == len(key) == len(radii) > 0:
            raise ValueError(
                f"a neighborhood of radius {self.radius} needs coordinates with as many axes, such as those of "
                f"Coordinates.grid, got {len(query)} of the queries and {len(key)} of the keys"
            )
        return zip(query, key, radii, strict=True)


def _is_known(x: object) -> bool:
    """Returns whether the values of an array can be read here."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    return isinstance(x, np.ndarray) or known

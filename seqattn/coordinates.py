"""Where every token is: its position inside a text, and which text it belongs to."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from seqattn.pytrees import pytree
from seqattn.sizes import Size


@pytree
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Position and segment of each token, as data of the batch.

    Causal offsets, left padding, the length of a cache and packed documents are not features of an attention
    function: each is another set of coordinates.

    Attributes:
        position: signed integers `[*batch, length]`, counting from 0 inside the segment.
        segment: signed integers `[*batch, length]`, which text the token belongs to; 0 is padding.

        axes: further positions of tokens that lie in more than one dimension, such as the row and the column of an
            image patch: a tuple of signed integers `[*batch, length]`; see `grid`.
        batch: inside a mask or a score modification, and there of the query alone: the index of its batch row. Leading
            dims count as one, and each call under `jax.vmap` or on a device of a `jax.shard_map` counts from 0.
        head: likewise the index of its head, of the N query heads. Calls give neither.

    All are JAX arrays, or NumPy arrays where they are known at trace time: then `Mask.reach` is known there, too.
    A `Mask` is written for one query and one key; there all fields are scalars.
    """

    position: Array | np.ndarray
    segment: Array | np.ndarray
    axes: tuple[Any, ...] = ()
    batch: Array | np.integer | int | None = None
    head: Array | np.integer | int | None = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """`(*batch, length)`."""
        return self.position.shape

    @staticmethod
    def range(length: Size, *, start: int | Int[Array, ""] = 0) -> "Coordinates":
        """One text of `length` tokens without padding, its first token at position `start`; shape `[length]`.

        NumPy arrays where `start` is a number: then kernels know at trace time which tiles a mask reaches.

        Three queries at the end of five keys ("bottom-right" alignment) are `Coordinates.range(3, start=2)`:

        >>> Coordinates.range(3, start=2).position
        array([2, 3, 4], dtype=int32)
        """
        if length < 0:
            raise ValueError(f"length ({length}) must not be negative")
        # The length of a program that `jax.export` compiles for any length is no number.
        if isinstance(length, (int, np.integer)) and isinstance(start, (int, np.integer)):
            known = np.arange(length, dtype=np.int32)
            return Coordinates(known + np.int32(start), np.ones_like(known))
        position = jnp.arange(length, dtype=jnp.int32)
        return Coordinates(position + jnp.asarray(start, jnp.int32), jnp.ones_like(position))

    @staticmethod
    def grid(*sizes: int) -> "Coordinates":
        """The cells of a grid, the last axis fastest: patches of an image of `height` times `width`; shape `[length]`.

        Positions count the cells, and `axes` holds the index along each axis, for masks such as `Neighborhood`.

        >>> Coordinates.grid(2, 3).axes
        (array([0, 0, 0, 1, 1, 1], dtype=int32), array([0, 1, 2, 0, 1, 2], dtype=int32))
        """
        if not sizes or any(size < 0 for size in sizes):
            raise ValueError(f"a grid needs the size of each axis, none negative, got {sizes}")
        position = np.arange(math.prod(sizes), dtype=np.int32)
        axes = tuple(x.reshape(-1).astype(np.int32) for x in np.indices(sizes))
        return Coordinates(position, np.ones_like(position), axes)

    @staticmethod
    def from_lengths(
        lengths: Int[Array, "*batch"] | Int[np.ndarray, "*batch"] | Sequence[int], max_length: int
    ) -> "Coordinates":
        """Texts padded on the right: row i holds `lengths[i]` tokens and then padding; shape `[*batch, max_length]`.

        A length above `max_length` raises outside `jit`; inside it the row counts as full.

        >>> Coordinates.from_lengths([1, 3], 3).segment
        Array([[1, 0, 0],
               [1, 1, 1]], dtype=int32)
        """
        if not isinstance(lengths, jax.core.Tracer):
            _check_lengths(np.asarray(lengths), max_length)
        lengths = jnp.asarray(lengths, jnp.int32)
        index = jnp.broadcast_to(jnp.arange(max_length, dtype=jnp.int32), (*lengths.shape, max_length))
        return Coordinates(index, (index < lengths[..., None]).astype(jnp.int32))

    @staticmethod
    def from_present(present: Bool[Array, "*batch length"]) -> "Coordinates":
        """One text a row with padding anywhere (left, right, between): True where there is a token.

        >>> Coordinates.from_present(jnp.array([False, False, True, True])).position
        Array([0, 0, 0, 1], dtype=int32)
        """
        count = jnp.cumsum(present, axis=-1, dtype=jnp.int32)
        return Coordinates(jnp.maximum(count - 1, 0), present.astype(jnp.int32))

    @staticmethod
    def from_segments(segment: Int[Array, "*batch length"]) -> "Coordinates":
        """Packed texts: positions count the earlier tokens of the same segment, contiguous or not.

        >>> Coordinates.from_segments(jnp.array([1, 1, 2, 2, 2, 0])).position
        Array([0, 1, 0, 1, 2, 0], dtype=int32)
        """
        segment = jnp.asarray(segment, jnp.int32)
        order = jnp.argsort(segment, axis=-1, stable=True)
        grouped = jnp.take_along_axis(segment, order, axis=-1)
        index = jnp.broadcast_to(jnp.arange(segment.shape[-1], dtype=jnp.int32), segment.shape)
        first = jnp.concatenate([jnp.ones_like(grouped[..., :1], bool), grouped[..., 1:] != grouped[..., :-1]], axis=-1)
        start = jax.lax.cummax(jnp.where(first, index, 0), axis=segment.ndim - 1)
        inverse = jnp.argsort(order, axis=-1)
        return Coordinates(jnp.take_along_axis(index - start, inverse, axis=-1), segment)

    def rows(self) -> "Coordinates":
        """These with as many rows in each field as in any: fields `[1, length]` and `[B, length]` become `[B, length]`.

        Where all fields have one row, that is shared by the batch, they keep it.
        """
        batch = jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves(self)))
        return jax.tree.map(lambda x: x if x.shape == batch else jnp.broadcast_to(x, batch), self)

    def next(self) -> "Coordinates":
        """The token that would follow the last real token of each row; shape `[*batch, 1]`.

        A row without tokens continues at position 0 of segment 1.

        Raises:
            ValueError: the tokens have `axes`, along which nothing says where the next one lies.
        """
        if self.axes:
            raise ValueError(f"the token after tokens with {len(self.axes)} axes has no known place: give its own")
        real = self.segment != 0
        index = jnp.broadcast_to(jnp.arange(self.shape[-1], dtype=jnp.int32), self.shape)
        last = jnp.max(jnp.where(real, index, 0), axis=-1, keepdims=True, initial=0)
        empty = ~jnp.any(real, axis=-1, keepdims=True)
        if self.shape[-1] == 0:
            zero = jnp.zeros_like(last)
            return Coordinates(zero, zero + 1)
        position = jnp.take_along_axis(self.position, last, axis=-1) + 1
        segment = jnp.take_along_axis(self.segment, last, axis=-1)
        return Coordinates(jnp.where(empty, 0, position), jnp.where(empty, 1, segment))


def _check_lengths(lengths: np.ndarray, max_length: int) -> None:
    # In NumPy, since inside `jit` even the minimum of an array from outside would be traced.
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.min(initial=0) < 0:
        raise ValueError(f"lengths must not be negative, got {lengths.min()}")
    if lengths.max(initial=0) > max_length:
        raise ValueError(f"a length ({lengths.max()}) exceeds max_length ({max_length})")


@pytree
@dataclasses.dataclass(frozen=True)
class Tile:
    """The smallest and largest coordinates in a run of tokens: what a mask must know to skip a whole tile.

    The fields are scalars: NumPy integers where coordinates are known at trace time, traced integers elsewhere.
    """

    position_min: Array | np.ndarray | np.integer
    position_max: Array | np.ndarray | np.integer
    segment_min: Array | np.ndarray | np.integer
    segment_max: Array | np.ndarray | np.integer
    axes_min: tuple[Any, ...] = ()
    axes_max: tuple[Any, ...] = ()

    @staticmethod
    def of(at: Coordinates) -> "Tile":
        """The tile of each row of coordinates `[*batch, length]`; fields `[*batch]`. The length must not be 0."""
        return Tile(
            at.position.min(axis=-1),
            at.position.max(axis=-1),
            at.segment.min(axis=-1),
            at.segment.max(axis=-1),
            tuple(x.min(axis=-1) for x in at.axes),
            tuple(x.max(axis=-1) for x in at.axes),
        )

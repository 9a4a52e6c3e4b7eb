"""Coordinates: the position of each token and the segment that it belongs to."""

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
    """The position and the segment of each token, as data of the batch.

    Causal offsets, left padding, cache lengths and packed documents are no options of the attention function. Each of
    them is another set of coordinates.

    All fields are JAX arrays, or NumPy arrays if they are known at trace time; `Mask.reach` is then known at trace
    time, too. A `Mask` or a `ScoreMod` is written for one query and one key: there all fields are scalars.

    Attributes:
        position: signed integers `[*batch, length]`, counting from 0 inside the segment.
        segment: signed integers `[*batch, length]`, the index of the text that the token belongs to. 0 is padding.
        axes: a tuple of signed integers `[*batch, length]`: positions of tokens in more than one dimension, such as the
            row and the column of an image patch. See `grid`.
        batch: the index of the batch row. Set only inside a mask or a score modification, and there only for the query.
            All leading batch dimensions are counted as one. Under `jax.vmap` and on each device of a `jax.shard_map` it
            counts from 0. Callers leave it None.
        head: the index of the query head, from 0 to N - 1. Set in the same places as `batch`. Callers leave it None.
    """

    position: Array | np.ndarray
    segment: Array | np.ndarray
    axes: tuple[Any, ...] = ()
    batch: Array | np.integer | int | None = None
    head: Array | np.integer | int | None = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """The shape `(*batch, length)`."""
        return self.position.shape

    @staticmethod
    def range(length: Size, *, start: int | Int[Array, ""] = 0) -> "Coordinates":
        """Returns the coordinates of one unpadded text of `length` tokens, starting at position `start`.

        If `start` is a number, the fields are NumPy arrays, and kernels know at trace time which tiles a mask reaches.

        Args:
            length: the number of tokens, at least 0; may be a symbolic dimension of `jax.export`.
            start: the position of the first token, a number or a scalar array.

        Returns:
            Coordinates of shape `[length]`, all in segment 1.

        Raises:
            ValueError: `length` is negative.

        The last three of five positions ("bottom-right" alignment):

        >>> Coordinates.range(3, start=2).position
        array([2, 3, 4], dtype=int32)
        """
        if length < 0:
            raise ValueError(f"length ({length}) must not be negative")
        # A symbolic dimension of `jax.export` is not a number, so the arrays cannot be NumPy's.
        if isinstance(length, (int, np.integer)) and isinstance(start, (int, np.integer)):
            known = np.arange(length, dtype=np.int32)
            return Coordinates(known + np.int32(start), np.ones_like(known))
        position = jnp.arange(length, dtype=jnp.int32)
        return Coordinates(position + jnp.asarray(start, jnp.int32), jnp.ones_like(position))

    @staticmethod
    def grid(*sizes: int) -> "Coordinates":
        """Returns the coordinates of the cells of a grid, such as image patches, with the last axis fastest.

        `position` counts the cells, and `axes` holds the index along each axis, for masks such as `Neighborhood`.

        Args:
            *sizes: the number of cells along each axis, for example height and width.

        Returns:
            Coordinates of shape `[length]`, where length is the product of the sizes, all in segment 1.

        Raises:
            ValueError: there is no size, or one is negative.

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
        """Returns the coordinates of texts with padding on the right.

        Args:
            lengths: integers `[*batch]`. Row i holds `lengths[i]` tokens, followed by padding.
            max_length: the length of the padded rows.

        Returns:
            Coordinates of shape `[*batch, max_length]`.

        Raises:
            TypeError: the lengths are not integers.
            ValueError: a length is negative or above `max_length`. Inside `jit` such a row counts as empty or full.

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
        """Returns the coordinates of one text in each row, with padding anywhere (left, right or between tokens).

        Args:
            present: booleans `[*batch, length]`, True for a token and False for padding.

        Returns:
            Coordinates of shape `[*batch, length]`.

        >>> Coordinates.from_present(jnp.array([False, False, True, True])).position
        Array([0, 0, 0, 1], dtype=int32)
        """
        count = jnp.cumsum(present, axis=-1, dtype=jnp.int32)
        return Coordinates(jnp.maximum(count - 1, 0), present.astype(jnp.int32))

    @staticmethod
    def from_segments(segment: Int[Array, "*batch length"]) -> "Coordinates":
        """Returns the coordinates of packed documents.

        A position is the number of earlier tokens of the same segment, which need not be contiguous.

        Args:
            segment: integers `[*batch, length]`, the index of each token's document. 0 is padding.

        Returns:
            Coordinates of shape `[*batch, length]`.

        >>> Coordinates.from_segments(jnp.array([1, 1, 2, 2, 2, 0])).position
        Array([0, 1, 0, 1, 2, 0], dtype=int32)
        """
        segment = jnp.asarray(segment, jnp.int32)
        # A stable sort groups the tokens of a segment in their order. Inside a group the position is the index minus
        # the group's start, and the inverse permutation brings it back.
        order = jnp.argsort(segment, axis=-1, stable=True)
        grouped = jnp.take_along_axis(segment, order, axis=-1)
        index = jnp.broadcast_to(jnp.arange(segment.shape[-1], dtype=jnp.int32), segment.shape)
        first = jnp.concatenate([jnp.ones_like(grouped[..., :1], bool), grouped[..., 1:] != grouped[..., :-1]], axis=-1)
        start = jax.lax.cummax(jnp.where(first, index, 0), axis=segment.ndim - 1)
        inverse = jnp.argsort(order, axis=-1)
        return Coordinates(jnp.take_along_axis(index - start, inverse, axis=-1), segment)

    def rows(self) -> "Coordinates":
        """Returns coordinates in which all fields have the same number of rows: `[1, length]` becomes `[B, length]`.

        If every field has one row, shared by the batch, the fields stay as they are.
        """
        batch = jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves(self)))
        return jax.tree.map(lambda x: x if x.shape == batch else jnp.broadcast_to(x, batch), self)

    def next(self) -> "Coordinates":
        """Returns the coordinates of the token that follows the last token of each row; shape `[*batch, 1]`.

        A row without tokens continues at position 0 of segment 1.

        Raises:
            ValueError: the tokens have `axes`, along which the next position is unknown.
        """
        if self.axes:
            raise ValueError(f"the position after tokens with {len(self.axes)} axes is unknown: give its coordinates")
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
    # In NumPy, because inside `jit` jax.numpy would trace even the minimum of a concrete array.
    """Raises TypeError or ValueError unless the lengths are integers from 0 to `max_length`."""
    if lengths.size and not np.issubdtype(lengths.dtype, np.integer):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.min(initial=0) < 0:
        raise ValueError(f"lengths must not be negative, got {lengths.min()}")
    if lengths.max(initial=0) > max_length:
        raise ValueError(f"a length ({lengths.max()}) exceeds max_length ({max_length})")


@pytree
@dataclasses.dataclass(frozen=True)
class Tile:
    """The smallest and largest coordinates in a run of tokens. A mask needs no more to skip a whole tile.

    Inside `Mask.reach` the fields broadcast against each other. They are NumPy arrays or integers if coordinates are
    known at trace time, and traced arrays otherwise.

    Attributes:
        position_min: the smallest position.
        position_max: the largest position.
        segment_min: the smallest segment.
        segment_max: the largest segment.
        axes_min: the smallest position along each of the axes.
        axes_max: the largest position along each of the axes.
    """

    position_min: Array | np.ndarray | np.integer
    position_max: Array | np.ndarray | np.integer
    segment_min: Array | np.ndarray | np.integer
    segment_max: Array | np.ndarray | np.integer
    axes_min: tuple[Any, ...] = ()
    axes_max: tuple[Any, ...] = ()

    @staticmethod
    def of(at: Coordinates) -> "Tile":
        """Returns the tile of each row of coordinates `[*batch, length]`, with fields `[*batch]`.

        The length must be at least 1.
        """
        return Tile(
            at.position.min(axis=-1),
            at.position.max(axis=-1),
            at.segment.min(axis=-1),
            at.segment.max(axis=-1),
            tuple(x.min(axis=-1) for x in at.axes),
            tuple(x.max(axis=-1) for x in at.axes),
        )

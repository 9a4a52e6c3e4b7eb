"""Masks in the form that vendors' kernels support: a band along the diagonal, and lengths.

`xla` takes any mask, because it stores every score anyway. `cudnn`, `splash` and `tokamax` take a `Native` mask and
refuse all others: a dense mask would cost the time and memory that these kernels save.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from seqattn.coordinates import Coordinates
from seqattn.kernels import reference
from seqattn.kernels.call import Call, refuse_unknown
from seqattn.mask import And, Mask
from seqattn.masks import Causal, NotPadding, SameSegment, SlidingWindow
from seqattn.sizes import Size


@dataclasses.dataclass(frozen=True)
class Native:
    """A mask as a band and lengths: query i sees key j if `-right <= i - j <= left` and neither is padding.

    Attributes:
        left: how many keys before its own index a query sees; None for all.
        right: how many keys after its own index a query sees; None for all.
        query_lengths: `[B or 1]`. Queries from this index on are padding. None if there is no padding.
        key_lengths: `[B or 1]`. Keys from this index on are padding. None if there is no padding.
    """

    left: int | None = None
    right: int | None = None
    query_lengths: Int[np.ndarray, " rows"] | None = None
    key_lengths: Int[np.ndarray, " rows"] | None = None

    @staticmethod
    def of(mask: Mask | None, q_at: Coordinates, kv_at: Coordinates) -> "Native":
        """Converts a mask. Raises NotImplementedError, which names the part of the mask without such a form.

        >>> at = Coordinates(np.arange(5)[None], np.ones((1, 5), int))
        >>> Native.of(Causal() & SlidingWindow(3), at, at)
        Native(left=2, right=0, query_lengths=None, key_lengths=None)
        """
        if mask is None:
            return Native()
        length, size = q_at.shape[-1], kv_at.shape[-1]
        refuse_unknown("a window", (length, size))
        # Start with a band that hides nothing and let each part of the conjunction narrow it.
        left, right, native = length, size, Native()
        for part in _parts(mask):
            if isinstance(part, Causal | SlidingWindow):
                # Masks compare positions, vendors compare indices. For consecutive positions the two differ by a
                # constant.
                behind = _behind(part, q_at, kv_at)
                if isinstance(part, SlidingWindow):
                    left, right = min(left, part.size - 1 - behind), min(right, part.ahead + behind)
                else:
                    right = min(right, behind)
            elif isinstance(part, NotPadding | SameSegment):
                lengths = _lengths(part, q_at, kv_at)
                native = dataclasses.replace(native, query_lengths=lengths[0], key_lengths=lengths[1])
            else:
                raise NotImplementedError(f"{type(part).__name__} is no causal mask, window or padding mask")
        # Vendors' windows include the diagonal.
        if left < 0 or right < 0:
            raise NotImplementedError("the window ends before the diagonal: queries and keys do not start together")
        # A side that reaches every key becomes None, so that kernels take their faster path without a window.
        return dataclasses.replace(
            native, left=None if left >= length - 1 else left, right=None if right >= size - 1 else right
        )

    def is_whole(self, length: Size, size: Size) -> bool:
        """Returns whether every query sees every key. Without a window and lengths the sizes may be symbolic."""
        if all(x is None for x in (self.left, self.right, self.query_lengths, self.key_lengths)):
            return True
        first, last = self.ends(length, size)
        return not first.any() and bool((last == size).all())

    def ends(self, length: int, size: int) -> tuple[Int[np.ndarray, "rows T"], Int[np.ndarray, "rows T"]]:
        """Returns, for each query, the first visible key and the one after the last; equal if it sees none."""
        query = np.arange(length)[None]
        key_lengths = np.asarray([size]) if self.key_lengths is None else self.key_lengths
        last = key_lengths[:, None] if self.right is None else np.minimum(query + self.right + 1, key_lengths[:, None])
        if self.query_lengths is not None:
            last = np.where(query < self.query_lengths[:, None], last, 0)
        last = np.broadcast_to(last, (last.shape[0], length))
        return np.minimum(0 if self.left is None else np.maximum(query - self.left, 0), last), last

    def for_jax_nn(self, batch: Size, length: Size, size: Size) -> dict[str, Any]:
        """Returns the keyword arguments of `jax.nn.dot_product_attention` for this mask and a call of these sizes."""
        return self._window(length, size) | self.lengths_for_jax_nn(batch)

    def lengths_for_jax_nn(self, batch: Size) -> dict[str, Any]:
        """Returns the keyword arguments for the lengths of the rows."""
        lengths = {"query_seq_lengths": self.query_lengths, "key_value_seq_lengths": self.key_lengths}
        return {name: jnp.broadcast_to(x.astype(np.int32), (batch,)) for name, x in lengths.items() if x is not None}

    def _window(self, length: Size, size: Size) -> dict[str, Any]:
        if self.left is None and self.right is None:
            return {}
        if self.left is None and self.right == 0:
            return {"is_causal": True}
        left, right = (whole if n is None else n for n, whole in ((self.left, length), (self.right, size)))
        return {"local_window_size": (left, right)}


def native_of(call: Call) -> Native:
    """Returns the mask of a call. Raises NotImplementedError if it has no such form."""
    if call.mask is not None and not isinstance(call.mask, Mask):
        raise NotImplementedError("a boolean array would become a dense bias, and no tile would be skipped")
    return Native.of(call.mask, call.q_at, call.kv_at)


def pairs_of(call: Call) -> Native | Bool[Array, "..."]:
    """Returns the visible pairs: as a `Native` if possible, else as an array `[B or 1, N or 1, T or 1, S or 1]`."""
    if call.bias is None:  # an entry of -inf would mask single pairs
        with contextlib.suppress(NotImplementedError):
            return native_of(call)
    visible = reference.visibility(call.query.shape, call.mask, call.bias, call.q_at, call.kv_at)
    assert visible is not None
    return visible


def _parts(mask: Mask) -> list[Mask]:
    """Returns the masks whose conjunction is `mask`."""
    return [*_parts(mask.first), *_parts(mask.second)] if isinstance(mask, And) else [mask]


def _known(part: Mask, *fields: Array | np.ndarray) -> None:
    """Raises NotImplementedError unless the coordinates are NumPy arrays, whose values are known at trace time."""
    if not all(isinstance(x, np.ndarray) for x in fields):
        raise NotImplementedError(f"the coordinates that {type(part).__name__} reads are not known at trace time")


def _behind(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> int:
    """Returns the distance from the first key to the first query, if both have consecutive positions."""
    query, key = q_at.position, kv_at.position
    _known(part, query, key)
    # A band in positions is a band in indices only if positions count up by one, from the same offset in all rows.
    runs = all(np.array_equal(x, x[:, :1] + np.arange(x.shape[1])) for x in (query, key))
    behind = np.unique(query[:, :1] - key[:, :1]) if query.size and key.size else np.zeros(1, int)
    if not runs or behind.size != 1:
        raise NotImplementedError(f"{type(part).__name__} over positions that do not count up alike in every row")
    return int(behind[0])


def _lengths(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns how many tokens each row starts with, for queries and keys; None if no row is padded."""
    _known(part, q_at.segment, kv_at.segment)
    query, key = np.asarray(q_at.segment), np.asarray(kv_at.segment)
    if isinstance(part, SameSegment):
        # With one document in a row, `SameSegment` hides padding and nothing more, so it is a padding mask.
        texts = (np.unique(np.concatenate([q, k])) for q, k in _rows(query, key))
        if any((text != 0).sum() > 1 for text in texts):
            raise NotImplementedError("SameSegment with more than one text in a row")
    lengths = []
    for present in (query != 0, key != 0):
        # Lengths describe padding on the right only.
        count = present.sum(axis=1)
        if not np.array_equal(present, np.arange(present.shape[1])[None] < count[:, None]):
            raise NotImplementedError(f"{type(part).__name__} with padding before a token")
        lengths.append(None if present.all() else count.astype(np.int32))
    return lengths[0], lengths[1]


def _rows(query: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the segments of each row, with single rows broadcast."""
    count = max(query.shape[0], key.shape[0]) if query.shape[0] and key.shape[0] else 0
    return zip(*(np.broadcast_to(x, (count, x.shape[1])) for x in (query, key)), strict=True)

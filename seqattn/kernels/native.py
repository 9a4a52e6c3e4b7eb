"""A mask in the words that vendors' kernels know: a band along the diagonal, and lengths.

`xla` takes any mask, as it keeps every score anyway. `cudnn` and `splash` take what is `Native` and refuse the rest: a
dense mask would cost them what they are there for.
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
    """A mask in the words that vendors know: query i sees key j where `-right <= i - j <= left` and both are tokens.

    Attributes:
        left: how many keys before its own index a query sees; None for all.
        right: how many keys after its own index a query sees; None for all.
        query_lengths: `[B or 1]`, queries from this index on are padding; None where there is none.
        key_lengths: `[B or 1]`, likewise for keys.
    """

    left: int | None = None
    right: int | None = None
    query_lengths: Int[np.ndarray, " rows"] | None = None
    key_lengths: Int[np.ndarray, " rows"] | None = None

    @staticmethod
    def of(mask: Mask | None, q_at: Coordinates, kv_at: Coordinates) -> "Native":
        """The same pairs as `mask` allows; NotImplementedError names the part that has no such form.

        >>> at = Coordinates(np.arange(5)[None], np.ones((1, 5), int))
        >>> Native.of(Causal() & SlidingWindow(3), at, at)
        Native(left=2, right=0, query_lengths=None, key_lengths=None)
        """
        if mask is None:
            return Native()
        length, size = q_at.shape[-1], kv_at.shape[-1]
        refuse_unknown("a window", (length, size))
        left, right, native = length, size, Native()
        for part in _parts(mask):
            if isinstance(part, Causal | SlidingWindow):
                behind = _behind(part, q_at, kv_at)
                if isinstance(part, SlidingWindow):
                    left, right = min(left, part.size - 1 - behind), min(right, part.ahead + behind)
                else:
                    right = min(right, behind)
            elif isinstance(part, NotPadding | SameSegment):
                lengths = _lengths(part, q_at, kv_at)
                native = dataclasses.replace(native, query_lengths=lengths[0], key_lengths=lengths[1])
            else:
                raise NotImplementedError(f"{type(part).__name__} is no causal mask, left window or length")
        if left < 0 or right < 0:
            raise NotImplementedError("the window ends before the diagonal: queries and keys do not start together")
        return dataclasses.replace(
            native, left=None if left >= length - 1 else left, right=None if right >= size - 1 else right
        )

    def is_whole(self, length: Size, size: Size) -> bool:
        """Whether every query sees every key; without a window and lengths the numbers of both may be unknown."""
        if all(x is None for x in (self.left, self.right, self.query_lengths, self.key_lengths)):
            return True
        first, last = self.ends(length, size)
        return not first.any() and bool((last == size).all())

    def ends(self, length: int, size: int) -> tuple[Int[np.ndarray, "rows T"], Int[np.ndarray, "rows T"]]:
        """The first key that each query sees, and the one after the last; equal where it sees none."""
        query = np.arange(length)[None]
        key_lengths = np.asarray([size]) if self.key_lengths is None else self.key_lengths
        last = key_lengths[:, None] if self.right is None else np.minimum(query + self.right + 1, key_lengths[:, None])
        if self.query_lengths is not None:
            last = np.where(query < self.query_lengths[:, None], last, 0)
        last = np.broadcast_to(last, (last.shape[0], length))
        return np.minimum(0 if self.left is None else np.maximum(query - self.left, 0), last), last

    def for_jax_nn(self, batch: Size, length: Size, size: Size) -> dict[str, Any]:
        """The arguments of `jax.nn.dot_product_attention` that say the same of a call of this batch, T and S."""
        return self._window(length, size) | self.lengths_for_jax_nn(batch)

    def lengths_for_jax_nn(self, batch: Size) -> dict[str, Any]:
        """Those of them that tell how many tokens each row has."""
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
    """The mask of a call; NotImplementedError where it has no such form."""
    if call.mask is not None and not isinstance(call.mask, Mask):
        raise NotImplementedError("a boolean array would become a dense bias: nothing would be skipped")
    return Native.of(call.mask, call.q_at, call.kv_at)


def pairs_of(call: Call) -> Native | Bool[Array, "..."]:
    """Who may attend: natively where that is possible, else a dense array `[B or 1, N or 1, T or 1, S or 1]`."""
    if call.bias is None:  # one of -inf would mask
        with contextlib.suppress(NotImplementedError):
            return native_of(call)
    visible = reference.visibility(call.query.shape, call.mask, call.bias, call.q_at, call.kv_at)
    assert visible is not None
    return visible


def _parts(mask: Mask) -> list[Mask]:
    """The masks that must all allow a pair."""
    return [*_parts(mask.first), *_parts(mask.second)] if isinstance(mask, And) else [mask]


def _known(part: Mask, *fields: Array | np.ndarray) -> None:
    if not all(isinstance(x, np.ndarray) for x in fields):
        raise NotImplementedError(f"the coordinates that {type(part).__name__} reads are not known at trace time")


def _behind(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> int:
    """How far the first key is behind the first query, where both are runs of consecutive positions."""
    query, key = q_at.position, kv_at.position
    _known(part, query, key)
    runs = all(np.array_equal(x, x[:, :1] + np.arange(x.shape[1])) for x in (query, key))
    behind = np.unique(query[:, :1] - key[:, :1]) if query.size and key.size else np.zeros(1, int)
    if not runs or behind.size != 1:
        raise NotImplementedError(f"{type(part).__name__} over positions that do not count up alike in every row")
    return int(behind[0])


def _lengths(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> tuple[np.ndarray | None, np.ndarray | None]:
    """How many tokens each row starts with, queries and keys; None where no row is padded."""
    _known(part, q_at.segment, kv_at.segment)
    query, key = np.asarray(q_at.segment), np.asarray(kv_at.segment)
    if isinstance(part, SameSegment):
        texts = (np.unique(np.concatenate([q, k])) for q, k in _rows(query, key))
        if any((text != 0).sum() > 1 for text in texts):
            raise NotImplementedError("SameSegment with more than one text in a row")
    lengths = []
    for present in (query != 0, key != 0):
        count = present.sum(axis=1)
        if not np.array_equal(present, np.arange(present.shape[1])[None] < count[:, None]):
            raise NotImplementedError(f"{type(part).__name__} with padding before a token")
        lengths.append(None if present.all() else count.astype(np.int32))
    return lengths[0], lengths[1]


def _rows(query: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    count = max(query.shape[0], key.shape[0]) if query.shape[0] and key.shape[0] else 0
    return zip(*(np.broadcast_to(x, (count, x.shape[1])) for x in (query, key)), strict=True)

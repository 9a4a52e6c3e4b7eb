"""Key/value caches for step-by-step decoding.

`append(new)` returns the next cache and the `KeyColumns` that the queries of the new tokens attend to; these include
the new tokens.

All rows of a batch write at the same slot, so each write is one in-place slice update. If rows have unequal lengths,
padding separates a prompt from its continuation, and the coordinates mask it. Nothing is padded on the left. Each row
holds one text: caches do not support packed documents.

Writing past the end raises `ValueError`. Inside `jit`, where the length may be traced, nothing can be raised:
`overflowed` is set and the outputs of that row are NaN.

Shapes use B for batch rows, T for new tokens, S for slots, K for key heads and H for the size of a head.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from seqattn.checks import check_sizes
from seqattn.hypotheses import Branching
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.pytrees import pytree
from seqattn.sizes import known_size


class Cache(Branching):
    """Interface of the caches. Every cache is a pytree.

    `branch` and `select` implement `seqattn.decoding.Branching`, so that beam search can copy and reorder hypotheses.
    """

    overflowed: Bool[Array, "B"]
    """`[B]`, True for a row that received more tokens than it has room for."""

    @property
    def beams(self) -> int:
        """Number of hypotheses per row. If greater than 1, `append` takes one token per hypothesis."""
        return 1

    @abc.abstractmethod
    def append(self, new: KeyValue) -> tuple["Cache", KeyColumns]:
        """Appends tokens to the cache.

        Args:
            new: keys and values `[B, T, K, H]` of the new tokens.

        Returns:
            The next cache, and the keys and values that the queries of the new tokens attend to.
        """


@pytree
@dataclasses.dataclass(frozen=True)
class StaticCache(Cache):
    """Cache with a fixed number of slots per row, filled from the first slot on.

    Attributes:
        columns: S slots. A slot that was never written is padding.
        length: number of slots in use; a NumPy integer if it is known at trace time.
        overflowed: `[B]`, True if tokens of the row were lost.

    >>> from seqattn.coordinates import Coordinates
    >>> cache = StaticCache.empty(2, 5, num_kv_heads=1, head_dim=3)
    >>> prompt = KeyValue(jnp.ones((2, 2, 1, 3)), jnp.ones((2, 2, 1, 3)), Coordinates.from_lengths([2, 1], 2))
    >>> cache, seen = cache.append(prompt)
    >>> token = KeyValue(jnp.ones((2, 1, 1, 3)), jnp.ones((2, 1, 1, 3)), prompt.at.next())
    >>> cache, seen = cache.append(token)
    >>> print(seen.at.segment, seen.at.position[:, 2])
    [[1 1 1 0 0]
     [1 0 1 0 0]] [2 1]
    """

    columns: KeyColumns
    length: Int[Array, ""] | np.int32
    overflowed: Bool[Array, "B"]

    @staticmethod
    def empty(
        batch: int,
        size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> "StaticCache":
        """Creates an empty cache.

        Args:
            batch: B, the number of rows.
            size: S, the number of slots per row.
            num_kv_heads: K, the number of key heads.
            head_dim: H, the size of a key head.
            value_dim: size of a value head. Defaults to `head_dim`.
            dtype: dtype in which keys and values are stored.

        Raises:
            ValueError: `size` is negative.
        """
        value_dim = head_dim if value_dim is None else value_dim
        columns = KeyColumns.empty(batch, size, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype)
        return StaticCache(columns, np.int32(0), jnp.zeros(batch, bool))

    def append(self, new: KeyValue) -> tuple["StaticCache", KeyColumns]:
        """Appends tokens and returns all slots.

        Args:
            new: keys and values `[B, T, K, H]`. All rows advance by T slots.

        Returns:
            The next cache, and its S slots.

        Raises:
            ValueError: the tokens do not fit, or their shapes differ from the cache's. Inside `jit`, tokens that do not
                fit give NaN outputs if the length is traced.
        """
        # Non-finite entries are replaced here, once per token. Later steps read the cache without checking it again.
        fresh = KeyColumns.of(new, self.columns.key.dtype)
        columns, length = self.columns.write(fresh, self.length), self.length + fresh.size
        # A traced length cannot raise. The flag persists, so every later output of the row is NaN as well.
        overflowed = self.overflowed | (jnp.asarray(length) > columns.size)
        return StaticCache(columns, length, overflowed), _lost(columns, overflowed)

    def branch(self, beam_size: int) -> "PagedCache":
        """Returns a `PagedCache` with `beam_size` hypotheses per row, which share the tokens of this cache."""
        return PagedCache.of(self, beam_size)

    def select(self, parent: Int[Array, "B beams"]) -> "StaticCache":
        """Returns the cache unchanged: with one hypothesis per row, every parent is that hypothesis.

        Raises:
            ValueError: `parent` is not `[B, 1]`.
        """
        _check_beams(parent.shape[1], 1)
        return self


@pytree
@dataclasses.dataclass(frozen=True)
class RingCache(Cache):
    """Cache of the latest tokens of each row, for sliding-window attention.

    This is the rolling buffer of Jiang 2023 (section 2): memory does not grow with the length of the text. The token at
    position p is stored in slot `p % window`. The queries need a mask that includes `SlidingWindow(window)` or a
    smaller window.

    Attributes:
        columns: `beam_size * window` slots, one hypothesis after another.
        overflowed: `[B]`, always False: a token that leaves the window is not lost data.
        beam_size: number of hypotheses per row. If greater than 1, `append` takes one token per hypothesis.

    >>> from seqattn.coordinates import Coordinates
    >>> cache = RingCache.empty(1, 3, num_kv_heads=1, head_dim=2)
    >>> text = KeyValue(jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1, 2)), Coordinates.from_lengths([4], 4))
    >>> cache, seen = cache.append(text)
    >>> print(cache.columns.at.position, seen.at.segment)
    [[3 1 2]] [[0 0 0 1 1 1 1]]
    """

    columns: KeyColumns
    overflowed: Bool[Array, "B"]
    beam_size: int = dataclasses.field(default=1, metadata={"static": True})

    @staticmethod
    def empty(
        batch: int,
        window: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> "RingCache":
        """Creates an empty cache for the `window` latest tokens.

        Args:
            batch: B, the number of rows.
            window: number of tokens to keep per hypothesis.
            num_kv_heads: K, the number of key heads.
            head_dim: H, the size of a key head.
            value_dim: size of a value head. Defaults to `head_dim`.
            dtype: dtype in which keys and values are stored.

        Raises:
            ValueError: `window` is below 1.
        """
        check_sizes(window=window)
        value_dim = head_dim if value_dim is None else value_dim
        columns = KeyColumns.empty(batch, window, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype)
        return RingCache(columns, jnp.zeros(batch, bool))

    @property
    def beams(self) -> int:
        """Number of hypotheses per row."""
        return self.beam_size

    @property
    def window(self) -> int:
        """Number of tokens kept per hypothesis."""
        return self.columns.size // self.beam_size

    def append(self, new: KeyValue) -> tuple["RingCache", KeyColumns]:
        """Appends tokens and returns the keys that their queries may need.

        Args:
            new: keys and values `[B, T, K, H]`. If there are several hypotheses, T must equal their number: one token
                per hypothesis.

        Returns:
            The next cache, and the keys to attend to. For one new token per hypothesis these are the slots of the ring.
            For several tokens of one hypothesis they are the old ring followed by the new tokens.

        Raises:
            ValueError: there are several hypotheses and T is not their number, or the shapes differ from the cache's.
        """
        fresh, several = KeyColumns.of(new, self.columns.key.dtype), self.beam_size > 1
        self.columns.check_like(fresh)
        position, kept = fresh.at.position, fresh.at.segment != 0
        # First slot of the ring that each new token belongs to.
        first = jnp.zeros((1, 1), jnp.int32)
        if several:
            _check_beams(fresh.size, self.beam_size)
            # Each hypothesis owns a contiguous ring, so a step reads the slots as they are, without a gather.
            first = self.window * jnp.arange(self.beam_size, dtype=jnp.int32)[None]
        else:
            # A long prompt wraps around the ring. Two tokens in one slot would make the scatter's result undefined, so
            # only the last `window` tokens are written.
            last = jnp.max(jnp.where(kept, position, -1), axis=-1, keepdims=True, initial=-1)
            kept = kept & (position > last - self.window)
        # Modulo the window, a new token overwrites the one that has just left the window. Padding gets an index past
        # the end, which the scatter drops.
        slot = jnp.where(kept, first + position % self.window, self.columns.size)
        columns = self.columns.scatter(slot, fresh)
        cache = dataclasses.replace(self, columns=columns)
        if several:
            # A hypothesis sees only its own ring. Coordinates cannot express this, since hypotheses share them.
            own = jnp.repeat(jnp.eye(self.beam_size, dtype=bool), self.window, axis=1)
            return cache, dataclasses.replace(columns, visible=jnp.broadcast_to(own, (slot.shape[0], *own.shape)))
        # One token overwrites only a key outside its own window, so the ring is enough. Among several tokens, earlier
        # queries still need keys that later tokens have overwritten: they read the old ring and the new tokens.
        return cache, columns if fresh.size == 1 else self.columns.then(fresh)

    def branch(self, beam_size: int) -> "RingCache":
        """Returns a cache with `beam_size` hypotheses per row, each a copy of this window.

        Raises:
            ValueError: the cache already has several hypotheses per row.
        """
        _check_beams(self.beam_size, 1)
        return RingCache(self.columns.repeat(beam_size), self.overflowed, beam_size)

    def select(self, parent: Int[Array, "B beams"]) -> "RingCache":
        """Makes hypothesis j of a row continue from hypothesis `parent[:, j]`, by copying its window.

        Raises:
            ValueError: `parent` does not have one entry per hypothesis.
        """
        _check_beams(parent.shape[1], self.beam_size)
        # A ring is overwritten in place, so two children of one parent need a copy each.
        return dataclasses.replace(self, columns=self.columns.select(parent))


@pytree
@dataclasses.dataclass(frozen=True)
class PagedCache(Cache):
    """Pool of pages shared by the hypotheses of a row, and a table that says which hypothesis owns which page.

    A page holds one token, so no page is half full when hypotheses diverge. Continuing from another hypothesis copies
    one row of the table and no keys. This is the block table of vLLM (Kwon 2023, section 4.4) without copy-on-write.
    The pages of the prompt come first and every hypothesis sees them. Each step then adds one page per hypothesis.

    Attributes:
        columns: the pool of `prompt + steps * beam_size` pages.
        table: `[B, beam_size, steps]`, the page of each step of each hypothesis; -1 for a step not yet taken.
        length: number of steps taken.
        overflowed: `[B]`, True if tokens of the row were lost.
        prompt: number of pages that all hypotheses share.
    """

    columns: KeyColumns
    table: Int[Array, "B beams steps"]
    length: Int[Array, ""] | np.int32
    overflowed: Bool[Array, "B"]
    prompt: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(cache: StaticCache, beam_size: int) -> "PagedCache":
        """Converts a `StaticCache` to pages shared by `beam_size` hypotheses per row.

        The result has room for as many steps as `cache` has free slots. If the length of `cache` is traced, the result
        keeps all its slots as the prompt and adds as many steps.
        """
        size = cache.columns.size
        # A traced length cannot size an array. Keeping every slot is safe: those never written are padding.
        known = not isinstance(cache.length, jax.core.Tracer)
        prompt = min(known_size(cache.length), size) if known else size
        steps = size - prompt if known else size

        def pool(x: Array, axis: int) -> Array:
            # The free slots after the prompt would lie between it and the steps. Drop them, then add a page for every
            # hypothesis and step.
            taken = lax.slice_in_dim(x, 0, prompt, axis=axis)
            room = [(0, steps * beam_size if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(taken, room)

        # No page has number -1, so a step that was not taken makes no page visible.
        table = jnp.full((*cache.overflowed.shape, beam_size, steps), -1, jnp.int32)
        return PagedCache(cache.columns.over_slots(pool), table, np.int32(0), cache.overflowed, prompt)

    @property
    def beams(self) -> int:
        """Number of hypotheses per row."""
        return self.table.shape[1]

    def append(self, new: KeyValue) -> tuple["PagedCache", KeyColumns]:
        """Appends one token per hypothesis.

        Args:
            new: keys and values `[B, beam_size, K, H]`, one token per hypothesis.

        Returns:
            The next cache, and the whole pool with `visible` set to each hypothesis's own pages.

        Raises:
            ValueError: the tokens do not fit, their number is not `beam_size`, or the shapes differ from the cache's.
                Inside `jit`, tokens that do not fit give NaN outputs if the length is traced.
        """
        batch, beams, steps = self.table.shape
        fresh = KeyColumns.of(new, self.columns.key.dtype)
        _check_beams(fresh.size, beams)
        # The pages of one step are contiguous, so one slice update writes the tokens of all hypotheses.
        first = self.prompt + self.length * beams
        columns = self.columns.write(fresh, first)
        # Only this step's entry is new. `select` may have pointed earlier entries at pages that other hypotheses wrote.
        pages = jnp.broadcast_to((first + jnp.arange(beams, dtype=jnp.int32))[:, None], (batch, beams, 1))
        table = jax.lax.dynamic_update_slice_in_dim(self.table, pages, self.length, axis=2)
        # With a traced length the slice updates clamp to the last step, so the loss must show in the output.
        overflowed = self.overflowed | (jnp.asarray(self.length) >= steps)
        cache = PagedCache(columns, table, self.length + 1, overflowed, self.prompt)
        return cache, dataclasses.replace(_lost(columns, overflowed), visible=cache.visible())

    def visible(self) -> Bool[Array, "B beams pages"]:
        """Which hypothesis owns which page: `[B, beam_size, pages]`, True for the pages a hypothesis may attend to."""
        batch, beams, steps = self.table.shape
        # A table entry of step t can only name one of the `beams` pages of step t. Comparing within a step costs
        # `beams` comparisons per entry, instead of one per page of the pool.
        pages = self.prompt + jnp.arange(steps * beams, dtype=jnp.int32).reshape(steps, beams)
        own = (self.table[..., None] == pages[None, None]).reshape(batch, beams, steps * beams)
        # Every hypothesis continues the same prompt, so the table does not list its pages.
        return jnp.concatenate([jnp.ones((batch, beams, self.prompt), bool), own], axis=-1)

    def branch(self, beam_size: int) -> "PagedCache":
        """Not supported: a cache branches once.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a PagedCache already has {self.table.shape[1]} beams, got {beam_size} more")

    def select(self, parent: Int[Array, "B beams"]) -> "PagedCache":
        """Makes hypothesis j of a row continue from hypothesis `parent[:, j]`, by moving rows of the table.

        Raises:
            ValueError: `parent` does not have one entry per hypothesis.
        """
        _check_beams(parent.shape[1], self.table.shape[1])
        # Pages are never overwritten, so several children can share the pages of one parent.
        return dataclasses.replace(self, table=jnp.take_along_axis(self.table, parent[:, :, None], axis=1))


def _check_beams(given: int, beam_size: int) -> None:
    if given != beam_size:
        raise ValueError(f"the cache has {beam_size} hypotheses per row, got tokens or parents for {given}")


def _lost(columns: KeyColumns, overflowed: Bool[Array, "B"]) -> KeyColumns:
    """Marks all columns of an overflowed row as non-finite, so that every output of the row is NaN."""
    return dataclasses.replace(columns, finite=columns.finite & ~overflowed[:, None])

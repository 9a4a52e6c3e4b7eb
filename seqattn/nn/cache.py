"""Keys and values that grow: a cache takes new tokens and gives what queries attend to.

All rows of a batch write to one slot at a time, so that a write is one slice in place. Rows of unequal length have
padding between prompt and continuation, which coordinates hide: nothing is ever padded on the left. A row holds one
text; packed texts have no cache.

Every `append(new)` gives the next cache and the `KeyColumns` to attend to, with the new tokens in them. To write past
the end raises; inside `jit`, where that cannot be, `overflowed` is set and the outputs of the row are NaN.
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
    """What models need of a cache; a pytree. `branch` and `select` are those of `seqattn.decoding.Branching`."""

    overflowed: Bool[Array, "B"]
    """Whether a row was given more tokens than it has room for."""

    @property
    def beams(self) -> int:
        """Hypotheses of a row; where there are several, `append` takes one token of each."""
        return 1

    @abc.abstractmethod
    def append(self, new: KeyValue) -> tuple["Cache", KeyColumns]:
        """The cache with `new` `[B, T, K, H]`, and what the queries of these tokens attend to."""


@pytree
@dataclasses.dataclass(frozen=True)
class StaticCache(Cache):
    """Room for a number of tokens a row, filled from the first slot on.

    Attributes:
        columns: S slots; one that was never written is padding.
        length: slots that are taken; a NumPy number where it is known at trace time.
        overflowed: `[B]`, whether tokens were lost.

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
        """A cache of `size` slots; `value_dim` is `head_dim` where not given."""
        value_dim = head_dim if value_dim is None else value_dim
        columns = KeyColumns.empty(batch, size, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype)
        return StaticCache(columns, np.int32(0), jnp.zeros(batch, bool))

    def append(self, new: KeyValue) -> tuple["StaticCache", KeyColumns]:
        """The cache with `new` `[B, T, K, H]` behind what it holds, and all of it.

        Raises:
            ValueError: the tokens do not fit, or shapes differ.
        """
        fresh = KeyColumns.of(new, self.columns.key.dtype)
        columns, length = self.columns.write(fresh, self.length), self.length + fresh.size
        overflowed = self.overflowed | (jnp.asarray(length) > columns.size)
        return StaticCache(columns, length, overflowed), _lost(columns, overflowed)

    def branch(self, beam_size: int) -> "PagedCache":
        """A `PagedCache`, whose beams share what this cache holds."""
        return PagedCache.of(self, beam_size)

    def select(self, parent: Int[Array, "B beams"]) -> "StaticCache":
        """A cache of one hypothesis a row has nothing to choose from."""
        _check_beams(parent.shape[1], 1)
        return self


@pytree
@dataclasses.dataclass(frozen=True)
class RingCache(Cache):
    """The latest tokens of each row: all that a sliding window ever looks at, whatever the length of the text.

    A token lies in slot `position % window`. Its queries need a mask with `SlidingWindow(window)` or a smaller one.

    Attributes:
        columns: beam_size * window slots, one hypothesis after the other.
        overflowed: `[B]`, never: what leaves the window is not lost.
        beam_size: hypotheses of a row. Where there are several, `append` takes one token of each.

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
        """A cache of the `window` latest tokens; `value_dim` is `head_dim` where not given.

        Raises:
            ValueError: the window is empty.
        """
        check_sizes(window=window)
        value_dim = head_dim if value_dim is None else value_dim
        columns = KeyColumns.empty(batch, window, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype)
        return RingCache(columns, jnp.zeros(batch, bool))

    @property
    def beams(self) -> int:
        """Hypotheses of a row."""
        return self.beam_size

    @property
    def window(self) -> int:
        """How many tokens of a hypothesis are kept."""
        return self.columns.size // self.beam_size

    def append(self, new: KeyValue) -> tuple["RingCache", KeyColumns]:
        """The cache with the latest tokens of itself and `new` `[B, T, K, H]`, and both side by side.

        Raises:
            ValueError: there are several hypotheses and T is not their number, or shapes differ.
        """
        fresh, several = KeyColumns.of(new, self.columns.key.dtype), self.beam_size > 1
        self.columns.check_like(fresh)
        position, kept = fresh.at.position, fresh.at.segment != 0
        first = jnp.zeros((1, 1), jnp.int32)
        if several:
            _check_beams(fresh.size, self.beam_size)
            first = self.window * jnp.arange(self.beam_size, dtype=jnp.int32)[None]
        else:
            last = jnp.max(jnp.where(kept, position, -1), axis=-1, keepdims=True, initial=-1)
            kept = kept & (position > last - self.window)
        slot = jnp.where(kept, first + position % self.window, self.columns.size)
        columns = self.columns.scatter(slot, fresh)
        cache = dataclasses.replace(self, columns=columns)
        if several:
            own = jnp.repeat(jnp.eye(self.beam_size, dtype=bool), self.window, axis=1)
            return cache, dataclasses.replace(columns, visible=jnp.broadcast_to(own, (slot.shape[0], *own.shape)))
        return cache, columns if fresh.size == 1 else self.columns.then(fresh)

    def branch(self, beam_size: int) -> "RingCache":
        """A cache of `beam_size` hypotheses a row, all as this one."""
        _check_beams(self.beam_size, 1)
        return RingCache(self.columns.repeat(beam_size), self.overflowed, beam_size)

    def select(self, parent: Int[Array, "B beams"]) -> "RingCache":
        """Hypothesis j of a row goes on from hypothesis `parent[:, j]`: a copy of its window."""
        _check_beams(parent.shape[1], self.beam_size)
        return dataclasses.replace(self, columns=self.columns.select(parent))


@pytree
@dataclasses.dataclass(frozen=True)
class PagedCache(Cache):
    """One pool of pages a row, which its hypotheses share, and a table that says whose pages are whose.

    A page holds one token, so that no page is ever half full when hypotheses part: to go on from another hypothesis
    copies a line of the table and no key (as vLLM's blocks, Kwon 2023, with copy-on-write left out). First come the
    pages of the prompt, which all hypotheses see; then each step adds a page for every hypothesis.

    Attributes:
        columns: the pool of prompt + steps * beam_size pages.
        table: `[B, beam_size, steps]`, the page of each step of each hypothesis; -1 where there is none yet.
        length: steps that are taken.
        overflowed: `[B]`, whether tokens were lost.
        prompt: pages that all hypotheses share.
    """

    columns: KeyColumns
    table: Int[Array, "B beams steps"]
    length: Int[Array, ""] | np.int32
    overflowed: Bool[Array, "B"]
    prompt: int = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(cache: StaticCache, beam_size: int) -> "PagedCache":
        """The pages of `cache`, shared by `beam_size` hypotheses a row, with room for as many steps as it has left.

        Where it is not known at trace time how much of it is taken, all its slots are kept and as many steps added.
        """
        size = cache.columns.size
        known = not isinstance(cache.length, jax.core.Tracer)
        prompt = min(known_size(cache.length), size) if known else size
        steps = size - prompt if known else size

        def pool(x: Array, axis: int) -> Array:
            taken = lax.slice_in_dim(x, 0, prompt, axis=axis)
            room = [(0, steps * beam_size if i == axis else 0) for i in range(x.ndim)]
            return jnp.pad(taken, room)

        table = jnp.full((*cache.overflowed.shape, beam_size, steps), -1, jnp.int32)
        return PagedCache(cache.columns.over_slots(pool), table, np.int32(0), cache.overflowed, prompt)

    @property
    def beams(self) -> int:
        """Hypotheses of a row."""
        return self.table.shape[1]

    def append(self, new: KeyValue) -> tuple["PagedCache", KeyColumns]:
        """The cache with one new token `[B, beam_size, K, H]` of each hypothesis, and the pool with who sees what.

        Raises:
            ValueError: the tokens do not fit or are not one a hypothesis, or shapes differ.
        """
        batch, beams, steps = self.table.shape
        fresh = KeyColumns.of(new, self.columns.key.dtype)
        _check_beams(fresh.size, beams)
        first = self.prompt + self.length * beams
        columns = self.columns.write(fresh, first)
        pages = jnp.broadcast_to((first + jnp.arange(beams, dtype=jnp.int32))[:, None], (batch, beams, 1))
        table = jax.lax.dynamic_update_slice_in_dim(self.table, pages, self.length, axis=2)
        overflowed = self.overflowed | (jnp.asarray(self.length) >= steps)
        cache = PagedCache(columns, table, self.length + 1, overflowed, self.prompt)
        return cache, dataclasses.replace(_lost(columns, overflowed), visible=cache.visible())

    def visible(self) -> Bool[Array, "B beams pages"]:
        """Whose pages are whose: `[B, beam_size, pages]`."""
        batch, beams, steps = self.table.shape
        pages = self.prompt + jnp.arange(steps * beams, dtype=jnp.int32).reshape(steps, beams)
        own = (self.table[..., None] == pages[None, None]).reshape(batch, beams, steps * beams)
        return jnp.concatenate([jnp.ones((batch, beams, self.prompt), bool), own], axis=-1)

    def branch(self, beam_size: int) -> "PagedCache":
        """Refused: a cache branches once.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"a PagedCache has its {self.table.shape[1]} beams already, got {beam_size} more")

    def select(self, parent: Int[Array, "B beams"]) -> "PagedCache":
        """Hypothesis j of a row goes on from hypothesis `parent[:, j]`: lines of the table move, pages stay."""
        _check_beams(parent.shape[1], self.table.shape[1])
        return dataclasses.replace(self, table=jnp.take_along_axis(self.table, parent[:, :, None], axis=1))


def _check_beams(given: int, beam_size: int) -> None:
    if given != beam_size:
        raise ValueError(f"the cache has {beam_size} hypotheses a row, got one token or parent for each of {given}")


def _lost(columns: KeyColumns, overflowed: Bool[Array, "B"]) -> KeyColumns:
    """Nothing of a row that has lost tokens is finite, so that the loss shows in all that it looks at."""
    return dataclasses.replace(columns, finite=columns.finite & ~overflowed[:, None])

"""Memory-compressed attention: a strided convolution merges the keys and values of several tokens (Liu 2018)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_sizes
from seqattn.coordinates import Coordinates
from seqattn.nn.cache import Cache, RingCache
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.nn.multi_head_attention import MultiHeadAttention
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.precision import accumulator
from seqattn.pytrees import pytree
from seqattn.sizes import may_exceed

RULES = (ParameterRule("*_filter", Kind.MATRIX),)
"""The filters are `[stride, heads, in, out]`: too small to split over devices."""


class MemoryCompressedAttention(MultiHeadAttention):
    """Causal attention to a strided convolution of keys and values (Liu 2018, section 4.2.4).

    S tokens give S / stride keys. The kernel is as wide as the stride (Liu 2018 uses 3). Blocks are counted from the
    start of each text. The key of a block has the position of the block's last token. With the mask `Causal() &
    SameSegment()` a token therefore sees exactly the blocks that are complete at its position, including one that it
    completes itself. No information from the future leaks, with or without packed documents.

    In this layer, later tokens do not see the tokens of an incomplete block; layers with local attention see them. A
    token before the end of its text's first block sees nothing, and its output is zeros.

    Args:
        model_dim: D, the size of input and output.
        num_heads: N, the number of query heads.
        stride: number of tokens per block.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept. The convolution starts as the mean of its block.
        **options: other arguments of `MultiHeadAttention`. The mask should be causal.

    Raises:
        ValueError: `stride` is below 1, or `MultiHeadAttention` rejects the other sizes.

    >>> from seqattn.masks import Causal, SameSegment
    >>> mask = Causal() & SameSegment()
    >>> attention = MemoryCompressedAttention(8, num_heads=2, stride=3, mask=mask, rngs=nnx.Rngs(0))
    >>> x, at = jnp.ones((2, 7, 8)), Coordinates.from_lengths([7, 4], 7)
    >>> memory = attention.project(x, at)
    >>> print(memory.key.shape, memory.at.position[0], memory.at.segment[1])
    (2, 2, 2, 4) [2 5] [1 0]
    """

    keys_are_tokens = False
    """Keys are blocks, which each call finds."""

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        stride: int,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_sizes(stride=stride)
        super().__init__(model_dim, num_heads, param_dtype=param_dtype, rngs=rngs, **options)
        self.stride = stride
        # Two separate arrays: JAX cannot donate one buffer that two parameters share.
        self.key_filter = nnx.Param(_mean_of_block(stride, self.num_kv_heads, self.head_dim, param_dtype))
        self.value_filter = nnx.Param(_mean_of_block(stride, self.num_kv_heads, self.head_dim, param_dtype))

    def project(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Computes one key and one value per complete block.

        Args:
            x: tokens `[*batch, S, D]`.
            at: their coordinates.

        Returns:
            Keys and values `[*batch, S // stride, K, H]`. Entries without a complete block are padding.
        """
        kv = self._unrotated(x, at)
        batch = x.shape[:-2]
        rows = math.prod(batch)  # -1 would be ambiguous for an array without elements
        flat = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(rows, *leaf.shape[len(batch) :]), kv)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), self.compress(flat))

    def compress(self, kv: KeyValue) -> KeyValue:
        """Merges complete blocks of tokens.

        Args:
            kv: unrotated keys and values `[B, S, K, H]`, in any order.

        Returns:
            Keys and values `[B, S // stride, K, H]`, rotated. Entries without a complete block are padding.
        """
        tokens, complete = _blocks(kv.at, self.stride)
        # At the position of its last token, a causal mask hides the block from every query before its end.
        ends = jax.tree.map(lambda field: jnp.take_along_axis(field, tokens[..., -1], axis=1), kv.at)
        at = Coordinates(ends.position, jnp.where(complete, ends.segment, jnp.zeros_like(ends.segment)))
        key = _convolve(kv.key, tokens, complete, self.key_filter[...])
        value = _convolve(kv.value, tokens, complete, self.value_filter[...])
        # Rotate after the convolution. The two do not commute, and scores should depend on distances only.
        return KeyValue(self._rotated(key, at), value, at)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """Appends the tokens `x` `[B, T, D]` to the cache and returns it with all complete blocks.

        Raises:
            TypeError: the cache is not a `CompressedCache`.
            ValueError: the cache has no room for a new block.
        """
        if not isinstance(cache, CompressedCache):
            raise TypeError(f"memory-compressed attention needs a CompressedCache, got {type(cache).__name__}")
        return cache.add(self._unrotated(x, at), self.compress)


@pytree
@dataclasses.dataclass(frozen=True)
class CompressedCache(Cache):
    """Cache of the complete blocks of each row, and of the latest tokens, from which the next block is made.

    Attributes:
        recent: the `stride` latest tokens, with unrotated keys.
        columns: the blocks; block b of hypothesis j is in slot `j * blocks + b`.
        overflowed: `[B]`, True if blocks of the row were lost.
    """

    recent: RingCache
    columns: KeyColumns
    overflowed: Bool[Array, "B"]

    @staticmethod
    def empty(
        batch: int, size: int, num_kv_heads: int, head_dim: int, *, stride: int, dtype: DTypeLike = jnp.float32
    ) -> "CompressedCache":
        """Creates an empty cache with room for `size` tokens per row.

        Args:
            batch: B, the number of rows.
            size: number of tokens per row. The cache has `size // stride` block slots, at least 1.
            num_kv_heads: K, the number of key heads.
            head_dim: H, the size of a head.
            stride: number of tokens per block.
            dtype: dtype in which keys and values are stored.
        """
        heads: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
        blocks = size // stride
        # Keep at least one slot, also for a symbolic size: overflow shows as NaN only if there is a key to attend to.
        columns = KeyColumns.empty(batch, blocks + may_exceed(1, blocks), value_dim=head_dim, **heads)
        return CompressedCache(RingCache.empty(batch, stride, **heads), columns, jnp.zeros(batch, bool))

    @property
    def beams(self) -> int:
        """Number of hypotheses per row."""
        return self.recent.beams

    @property
    def blocks(self) -> int:
        """Number of blocks that a hypothesis has room for."""
        return self.columns.size // self.beams

    def append(self, new: KeyValue) -> tuple[Cache, KeyColumns]:
        """Not supported: only `MemoryCompressedAttention` knows how to make blocks, and it calls `add`.

        Raises:
            TypeError: always.
        """
        raise TypeError("a CompressedCache grows by MemoryCompressedAttention.extend, not by append")

    def add(self, new: KeyValue, compress: Callable[[KeyValue], KeyValue]) -> tuple["CompressedCache", KeyColumns]:
        """Appends tokens and makes the blocks that they complete.

        Args:
            new: unrotated keys and values `[B, T, K, H]`. If there are several hypotheses, one token per hypothesis.
            compress: merges tokens into blocks, as `MemoryCompressedAttention.compress`.

        Returns:
            The next cache, and all blocks.

        Raises:
            ValueError: there is no room for a block. Inside `jit` nothing can be raised: the outputs of the row are
                NaN.
        """
        # A block may begin before the new tokens. The ring holds the `stride` latest tokens, so it holds its beginning.
        recent, seen = self.recent.append(new)
        batch, beams = self.overflowed.shape[0], self.beams

        def apart(x: Array) -> Array:
            return x.reshape(batch * beams, x.shape[1] // beams, *x.shape[2:])

        def together(x: Array) -> Array:
            return x.reshape(batch, x.shape[1] * beams, *x.shape[2:])

        # `compress` knows rows only. As rows of their own, hypotheses cannot contribute tokens to each other's blocks.
        made = jax.tree.map(together, compress(jax.tree.map(apart, seen.rows())))
        fresh = KeyColumns.of(made, self.columns.key.dtype)
        # The position of a block's last token gives its number, so a block that is already stored is rewritten in
        # place.
        index, real = fresh.at.position // self.recent.window, fresh.at.segment != 0
        lost = (real & (index >= self.blocks)).any(axis=-1)
        if not isinstance(lost, jax.core.Tracer) and lost.any():
            raise ValueError(f"the tokens make more blocks than the {self.blocks} that the cache has room for")
        # Incomplete blocks and blocks past the end get an index that the scatter drops.
        first = jnp.repeat(self.blocks * jnp.arange(beams, dtype=jnp.int32), fresh.size // beams)
        slot = jnp.where(real & (index < self.blocks), first[None] + index, self.columns.size)
        overflowed = self.overflowed | lost
        columns = self.columns.scatter(slot, fresh)
        cache = CompressedCache(recent, columns, overflowed)
        # Hypotheses share coordinates, so the mask cannot separate their blocks.
        own = jnp.repeat(jnp.eye(beams, dtype=bool), self.blocks, axis=1)
        visible = None if beams == 1 else jnp.broadcast_to(own, (batch, *own.shape))
        # Inside `jit` the loss of a block cannot raise. NaN outputs make it visible.
        finite = columns.finite & ~overflowed[:, None]
        return cache, dataclasses.replace(columns, finite=finite, visible=visible)

    def branch(self, beam_size: int) -> "CompressedCache":
        """Returns a cache with `beam_size` hypotheses per row, each a copy of this one."""
        return CompressedCache(self.recent.branch(beam_size), self.columns.repeat(beam_size), self.overflowed)

    def select(self, parent: Int[Array, "B beams"]) -> "CompressedCache":
        """Makes hypothesis j of a row continue from hypothesis `parent[:, j]`, by copying its blocks."""
        return CompressedCache(self.recent.select(parent), self.columns.select(parent), self.overflowed)


def _mean_of_block(stride: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> Float[Array, "stride K H H"]:
    return jnp.tile((jnp.eye(head_dim) / stride).astype(dtype), (stride, num_kv_heads, 1, 1))


def _blocks(at: Coordinates, stride: int) -> tuple[Int[Array, "B blocks stride"], Bool[Array, "B blocks"]]:
    """Finds the tokens of each complete block.

    Returns:
        Indices `[B, S // stride, stride]` of the tokens of each block, and `[B, S // stride]`, whether the block
        exists.
    """
    position, segment = jnp.asarray(at.position), jnp.asarray(at.segment)
    # Sort the tokens of each text by position, since padding or other texts may lie between them.
    order = jnp.lexsort((position, segment), axis=-1).astype(jnp.int32)
    position, segment = (jnp.take_along_axis(x, order, axis=-1) for x in (position, segment))
    # A token ends a block if its position is the last of a block and the token `stride - 1` places before it has the
    # matching position and segment: then no token of the block is missing.
    first = jnp.arange(position.shape[-1], dtype=jnp.int32) - (stride - 1)
    inside = jnp.maximum(first, 0)
    whole = (position - position[:, inside] == stride - 1) & (segment == segment[:, inside]) & (segment != 0)
    ends = whole & (first >= 0)[None] & (position % stride == stride - 1)
    # The number of blocks depends on the data, but shapes may not. A stable sort puts the block ends first, in order.
    last = jnp.argsort(~ends, axis=-1, stable=True).astype(jnp.int32)[:, : position.shape[-1] // stride]
    tokens = jnp.maximum(last[..., None] + jnp.arange(1 - stride, 1, dtype=jnp.int32)[None, None], 0)
    rows = jnp.arange(order.shape[0])[:, None, None]
    return order[rows, tokens], jnp.take_along_axis(ends, last, axis=-1)


def _convolve(
    x: Float[Array, "B S K H"],
    tokens: Int[Array, "B blocks stride"],
    complete: Bool[Array, "B blocks"],
    weight: Float[Array, "stride K H H"],
) -> Float[Array, "B blocks K H"]:
    windows = x[jnp.arange(x.shape[0])[:, None, None], tokens]
    # Missing blocks gather arbitrary tokens, maybe NaN, which must not reach the gradient of the filter.
    windows = jnp.where(complete[..., None, None, None], windows, jnp.zeros_like(windows))
    weight = weight.astype(x.dtype)
    made = jnp.einsum("bnjkh,jkhv->bnkv", windows, weight, preferred_element_type=accumulator(x.dtype))
    return made.astype(x.dtype)

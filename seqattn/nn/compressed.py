"""Memory-compressed attention: keys and values of several tokens become one (Liu 2018, section 4.2.4)."""

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
"""`[stride, heads, in, out]`, small."""


class MemoryCompressedAttention(MultiHeadAttention):
    """Causal attention to a strided convolution of keys and values: S tokens are S / stride keys.

    The kernel is as wide as the stride (Liu 2018: 3). Blocks are counted from the start of each text, and the key of a
    block lies at the position of its last token: so with a mask of `Causal() & SameSegment()` a token sees exactly
    the blocks that are complete where it stands, itself included, and no future leaks, packed or not. The tokens of a
    block that is not complete yet are seen by no later token here: other layers, of local attention, see them. A
    token before the end of its text's first block sees nothing and gets zeros.

    Args:
        model_dim, num_heads, **options: as of `MultiHeadAttention`; the mask should be causal.
        stride: tokens of a block.
        rngs: initialises the parameters; not kept. A fresh convolution is the mean of its block.

    >>> from seqattn.masks import Causal, SameSegment
    >>> mask = Causal() & SameSegment()
    >>> attention = MemoryCompressedAttention(8, num_heads=2, stride=3, mask=mask, rngs=nnx.Rngs(0))
    >>> x, at = jnp.ones((2, 7, 8)), Coordinates.from_lengths([7, 4], 7)
    >>> memory = attention.project(x, at)
    >>> print(memory.key.shape, memory.at.position[0], memory.at.segment[1])
    (2, 2, 2, 4) [2 5] [1 0]
    """

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
        # Two arrays: one under two parameters could not be donated.
        self.key_filter = nnx.Param(_mean_of_block(stride, self.num_kv_heads, self.head_dim, param_dtype))
        self.value_filter = nnx.Param(_mean_of_block(stride, self.num_kv_heads, self.head_dim, param_dtype))

    def project(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """A key and a value `[*batch, S // stride, K, H]` for each complete block of tokens `x` `[*batch, S, D]`."""
        kv = self._unrotated(x, at)
        batch = x.shape[:-2]
        rows = math.prod(batch)  # not -1, which is unknown where there are no tokens
        flat = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(rows, *leaf.shape[len(batch) :]), kv)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), self.compress(flat))

    def compress(self, kv: KeyValue) -> KeyValue:
        """The complete blocks of tokens `[B, S, K, H]` in any order, as keys and values `[B, S // stride, K, H]`.

        The tokens' keys are not rotated yet. Fewer blocks than there is room for leave padding.
        """
        tokens, complete = _blocks(kv.at, self.stride)
        ends = jax.tree.map(lambda field: jnp.take_along_axis(field, tokens[..., -1], axis=1), kv.at)
        at = Coordinates(ends.position, jnp.where(complete, ends.segment, jnp.zeros_like(ends.segment)))
        key = _convolve(kv.key, tokens, complete, self.key_filter[...])
        value = _convolve(kv.value, tokens, complete, self.value_filter[...])
        # Rotated after the convolution: it does not commute with rotations, and scores should know distances alone.
        return KeyValue(self._rotated(key, at), value, at)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """The cache with the tokens `x`, and the blocks that are complete with them."""
        if not isinstance(cache, CompressedCache):
            raise TypeError(f"memory-compressed attention needs a CompressedCache, got {type(cache).__name__}")
        return cache.add(self._unrotated(x, at), self.compress)


@pytree
@dataclasses.dataclass(frozen=True)
class CompressedCache(Cache):
    """The complete blocks of each row, and the latest tokens, of which the next block will be made.

    Attributes:
        recent: the `stride` latest tokens.
        columns: block b of hypothesis j in slot `j * blocks + b`.
        overflowed: `[B]`, whether blocks were lost.
    """

    recent: RingCache
    columns: KeyColumns
    overflowed: Bool[Array, "B"]

    @staticmethod
    def empty(
        batch: int, size: int, num_kv_heads: int, head_dim: int, *, stride: int, dtype: DTypeLike = jnp.float32
    ) -> "CompressedCache":
        """Room for `size` tokens a row, of which every `stride` take one slot."""
        heads: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
        blocks = size // stride
        # One slot at least, also of a symbolic size: what is lost shows in nothing where there is nothing to look at.
        columns = KeyColumns.empty(batch, blocks + may_exceed(1, blocks), value_dim=head_dim, **heads)
        return CompressedCache(RingCache.empty(batch, stride, **heads), columns, jnp.zeros(batch, bool))

    @property
    def beams(self) -> int:
        """Hypotheses of a row."""
        return self.recent.beams

    @property
    def blocks(self) -> int:
        """How many blocks a hypothesis has room for."""
        return self.columns.size // self.beams

    def append(self, new: KeyValue) -> tuple[Cache, KeyColumns]:
        """Refused: how blocks are made is known to `MemoryCompressedAttention`, which calls `add`.

        Raises:
            TypeError: always.
        """
        raise TypeError("a CompressedCache grows by MemoryCompressedAttention.extend, not by append")

    def add(self, new: KeyValue, compress: Callable[[KeyValue], KeyValue]) -> tuple["CompressedCache", KeyColumns]:
        """The cache with the tokens `new` `[B, T, K, H]`, one a hypothesis where there are several, and all blocks.

        Raises:
            ValueError: there is no room for a block. Inside `jit`, where that cannot be raised, the row is NaN.
        """
        recent, seen = self.recent.append(new)
        batch, beams = self.overflowed.shape[0], self.beams

        def apart(x: Array) -> Array:
            return x.reshape(batch * beams, x.shape[1] // beams, *x.shape[2:])

        def together(x: Array) -> Array:
            return x.reshape(batch, x.shape[1] * beams, *x.shape[2:])

        made = jax.tree.map(together, compress(jax.tree.map(apart, seen.rows())))
        fresh = KeyColumns.of(made, self.columns.key.dtype)
        index, real = fresh.at.position // self.recent.window, fresh.at.segment != 0
        lost = (real & (index >= self.blocks)).any(axis=-1)
        if not isinstance(lost, jax.core.Tracer) and lost.any():
            raise ValueError(f"the tokens make more blocks than the {self.blocks} that the cache has room for")
        first = jnp.repeat(self.blocks * jnp.arange(beams, dtype=jnp.int32), fresh.size // beams)
        slot = jnp.where(real & (index < self.blocks), first[None] + index, self.columns.size)
        overflowed = self.overflowed | lost
        columns = self.columns.scatter(slot, fresh)
        cache = CompressedCache(recent, columns, overflowed)
        own = jnp.repeat(jnp.eye(beams, dtype=bool), self.blocks, axis=1)
        visible = None if beams == 1 else jnp.broadcast_to(own, (batch, *own.shape))
        finite = columns.finite & ~overflowed[:, None]
        return cache, dataclasses.replace(columns, finite=finite, visible=visible)

    def branch(self, beam_size: int) -> "CompressedCache":
        """A cache of `beam_size` hypotheses a row, all as this one."""
        return CompressedCache(self.recent.branch(beam_size), self.columns.repeat(beam_size), self.overflowed)

    def select(self, parent: Int[Array, "B beams"]) -> "CompressedCache":
        """Hypothesis j of a row goes on from hypothesis `parent[:, j]`: a copy of its blocks."""
        return CompressedCache(self.recent.select(parent), self.columns.select(parent), self.overflowed)


def _mean_of_block(stride: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> Float[Array, "stride K H H"]:
    return jnp.tile((jnp.eye(head_dim) / stride).astype(dtype), (stride, num_kv_heads, 1, 1))


def _blocks(at: Coordinates, stride: int) -> tuple[Int[Array, "B blocks stride"], Bool[Array, "B blocks"]]:
    """Which tokens `[B, S // stride, stride]` each block is made of, and whether there is such a block."""
    position, segment = jnp.asarray(at.position), jnp.asarray(at.segment)
    # Tokens of a text side by side, in its order; padding may stand anywhere between them.
    order = jnp.lexsort((position, segment), axis=-1).astype(jnp.int32)
    position, segment = (jnp.take_along_axis(x, order, axis=-1) for x in (position, segment))
    first = jnp.arange(position.shape[-1], dtype=jnp.int32) - (stride - 1)
    inside = jnp.maximum(first, 0)
    whole = (position - position[:, inside] == stride - 1) & (segment == segment[:, inside]) & (segment != 0)
    ends = whole & (first >= 0)[None] & (position % stride == stride - 1)
    # Those that end a block first, in order.
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
    windows = jnp.where(complete[..., None, None, None], windows, jnp.zeros_like(windows))
    weight = weight.astype(x.dtype)
    made = jnp.einsum("bnjkh,jkhv->bnkv", windows, weight, preferred_element_type=accumulator(x.dtype))
    return made.astype(x.dtype)

"""A stack of self-attention blocks: what encoders and decoder-only language models are made of."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.checks import check_integer
from seqattn.coordinates import Coordinates
from seqattn.dropout import split
from seqattn.mask import Mask
from seqattn.masks import Causal, SameBlock, SameSegment, SlidingWindow
from seqattn.models.layer_loop import run_layers
from seqattn.models.position_encodings import Positions, PositionScores, rotary_base
from seqattn.nn.blocks import BlockConfig, EncoderBlock
from seqattn.nn.cache import Cache, RingCache, StaticCache
from seqattn.nn.compressed import CompressedCache
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class Full:
    """Every token of the text; where the stack is causal, those up to the token itself."""


@dataclasses.dataclass(frozen=True)
class Window:
    """The latest tokens only; where the stack is not causal, as many ahead (Beltagy 2020)."""

    size: int = 256
    """How many, the token itself included."""


@dataclasses.dataclass(frozen=True)
class Local:
    """The tokens of the same block only (Liu 2018, section 4.2.4)."""

    size: int = 256
    """Tokens of a block, counted from the start of the text."""


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A convolution of the keys and values of every few tokens (Liu 2018, section 4.2.4); causal stacks alone."""

    stride: int = 3
    """Tokens that become one key."""


Attention = Full | Window | Local | Compressed
"""What the self attention of a layer sees."""


class Stack(nnx.Module):
    """Self-attention blocks over vectors, each with its own choice of what it sees.

    Args:
        block: sizes and choices of every block.
        num_layers: how many blocks.
        causal: no token sees a later one.
        positions: how order enters scores and rotations; vectors with positions come from `positions.embed`.
        pattern: what each layer sees, repeated over the layers: Liu's L-M-L-M-L is `(Local(), Compressed())`.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    Raises:
        ValueError: an empty pattern, a negative number of layers, or compressed attention that is not causal.

    >>> block = BlockConfig(model_dim=6, hidden_dim=8, num_heads=2)
    >>> stack = Stack(block, 3, causal=True, positions=None, pattern=(Local(4), Compressed(3)), rngs=nnx.Rngs(0))
    >>> stack(jnp.ones((2, 5, 6)), Coordinates.from_lengths([5, 2], 5)).shape
    (2, 5, 6)
    """

    def __init__(
        self,
        block: BlockConfig,
        num_layers: int,
        *,
        causal: bool,
        positions: Positions,
        pattern: Sequence[Attention] = (Full(),),
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_integer("num_layers", num_layers, 0)
        if not pattern:
            raise ValueError("pattern must name what at least one layer sees, got ()")
        if not causal and any(isinstance(each, Compressed) for each in pattern):
            raise ValueError("compressed attention is causal: a block is seen by the tokens behind it alone")
        self.block, self.pattern = block, tuple(pattern[layer % len(pattern)] for layer in range(num_layers))
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List(
            [
                EncoderBlock(
                    block,
                    mask=_mask(attention, causal),
                    rotary_base=rotary_base(positions),
                    stride=attention.stride if isinstance(attention, Compressed) else None,
                    **sizes,
                )
                for attention in self.pattern
            ]
        )
        heads: dict[str, Any] = {"num_heads": block.num_heads, "head_dim": block.head_dim}
        self.scores = PositionScores(positions, num_layers, **heads, bidirectional=not causal, **sizes)
        # With the norm first the sum that leaves the last block was never normalised (Xiong 2020).
        self.norm = block.norm(**sizes) if block.norm_first else None

    def __call__(
        self, x: Float[Array, "*batch T D"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch T D"]:
        """`[*batch, T, D]` to `[*batch, T, D]`. Without a dropout key nothing drops."""

        def call(x: Array, block: EncoderBlock, score_mod: ScoreMod | None, key: Array | None) -> Array:
            return block(x, at, score_mod=score_mod, dropout_key=key)

        mods = map(self.scores.of, range(len(self.blocks)))
        layers = list(zip(self.blocks, mods, split(dropout_key, len(self.blocks)), strict=True))
        x = run_layers(call, x, layers, remat=self.block.remat, scan=self.block.scan_layers)
        return x if self.norm is None else self.norm(x)

    def weights(self, x: Float[Array, "*batch T D"], at: Coordinates) -> Float[Array, "*batch L T T"]:
        """Where each token looks, in every head of every layer but the compressed ones; `[*batch, L, T, T]`."""
        found = [jnp.zeros((*x.shape[:-2], 0, x.shape[-2], x.shape[-2]))]
        for layer, (block, attention) in enumerate(zip(self.blocks, self.pattern, strict=True)):
            score_mod = self.scores.of(layer)
            if not isinstance(attention, Compressed):
                found.append(block.weights(x, at, score_mod=score_mod).astype(found[0].dtype))
            x = block(x, at, score_mod=score_mod)
        return jnp.concatenate(found, axis=-3)

    def start(self, batch: int, max_length: int, dtype: DTypeLike) -> tuple[Cache, ...]:
        """Empty caches with room for `max_length` tokens a row, one for each layer of a causal stack."""
        return tuple(self._cache(attention, batch, max_length, dtype) for attention in self.pattern)

    def extend(
        self, x: Float[Array, "B T D"], at: Coordinates, caches: Sequence[Cache]
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """The same as a call for tokens behind those that the caches hold, and the caches with them."""
        grown = []
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            cache, seen = block.extend(cache, x, at)
            x = block(x, at, seen, score_mod=self.scores.of(layer))
            grown.append(cache)
        return x if self.norm is None else self.norm(x), tuple(grown)

    def _cache(self, attention: Attention, batch: int, max_length: int, dtype: DTypeLike) -> Cache:
        num_kv_heads = self.block.num_heads if self.block.num_kv_heads is None else self.block.num_kv_heads
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": self.block.head_dim, "dtype": dtype}
        if isinstance(attention, Compressed):
            return CompressedCache.empty(batch, max_length, stride=attention.stride, **sizes)
        if isinstance(attention, Full):
            return StaticCache.empty(batch, max_length, **sizes)
        # A block of the text lies within as many of the latest tokens.
        return RingCache.empty(batch, attention.size, **sizes)


def _mask(attention: Attention, causal: bool) -> Mask:
    if isinstance(attention, Window):
        return SlidingWindow(attention.size, ahead=0 if causal else attention.size - 1) & SameSegment()
    mask: Mask = Causal() & SameSegment() if causal else SameSegment()
    return SameBlock(attention.size) & mask if isinstance(attention, Local) else mask

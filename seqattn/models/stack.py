"""Stack of self-attention blocks, the body of encoders and of decoder-only language models."""

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
from seqattn.models.block_masks import BlockMasks
from seqattn.models.layer_loop import run_layers
from seqattn.models.position_encodings import Positions, PositionScores, rotary
from seqattn.nn.blocks import BlockConfig, EncoderBlock
from seqattn.nn.cache import Cache, RingCache, StaticCache
from seqattn.nn.compressed import CompressedCache
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class Full:
    """Attention to every token of the text; in a causal stack, up to the token itself (Vaswani 2017)."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Sliding window: attention to the latest tokens (Child 2019; Beltagy 2020, section 3.1).

    In a bidirectional stack, a token also sees as many later tokens.
    """

    size: int = 256
    """Number of tokens on each visible side, including the token itself."""


@dataclasses.dataclass(frozen=True)
class Local:
    """Local attention: attention to the tokens of the same block (Liu 2018, section 4.2.4)."""

    size: int = 256
    """Tokens per block, counted from the start of the text."""


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Memory-compressed attention: a strided convolution of keys and values (Liu 2018, section 4.2.4). Causal only."""

    stride: int = 3
    """Number of tokens merged into one key."""


Attention = Full | Window | Local | Compressed
"""What the self-attention of a layer attends to."""


class Stack(nnx.Module):
    """Self-attention blocks over vectors. Each layer has its own attention pattern.

    Args:
        block: sizes and choices of every block.
        num_layers: number of blocks; at least 0.
        causal: if True, no token attends to a later one.
        positions: the position encoding. The stack applies scores and rotations. The caller adds position vectors to
            its input.
        pattern: what each layer attends to, repeated over the layers. The L-M-L-M-L of Liu 2018 is `(Local(),
            Compressed())`.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: `pattern` is empty, `num_layers` is negative, or `pattern` contains `Compressed` and `causal` is
            False.

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
            raise ValueError("pattern must name what at least one layer attends to, got ()")
        if not causal and any(isinstance(each, Compressed) for each in pattern):
            raise ValueError("compressed attention needs causal=True: only the tokens after a block see it")
        self.block, self.pattern = block, tuple(pattern[layer % len(pattern)] for layer in range(num_layers))
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.blocks = nnx.List(
            [
                EncoderBlock(
                    block,
                    mask=_mask(attention, causal),
                    rotary=rotary(positions),
                    stride=attention.stride if isinstance(attention, Compressed) else None,
                    **sizes,
                )
                for attention in self.pattern
            ]
        )
        heads: dict[str, Any] = {"num_heads": block.num_heads, "head_dim": block.head_dim}
        heads |= {"soft_cap": block.attention_soft_cap}
        self.scores = PositionScores(positions, num_layers, **heads, bidirectional=not causal, **sizes)
        # With pre-norm blocks, nothing has normalised the output of the last block (Xiong 2020).
        self.norm = block.norm(**sizes) if block.norm_first else None

    def __call__(
        self, x: Float[Array, "*batch T D"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch T D"]:
        """Applies all blocks.

        Args:
            x: vectors `[*batch, T, D]`.
            at: their coordinates.
            dropout_key: if None, nothing is dropped.

        Returns:
            `[*batch, T, D]`.
        """

        mods = [self.scores.of(layer) for layer in range(len(self.blocks))]
        attentions = [block.attention for block in self.blocks]
        masks = BlockMasks.of(zip(attentions, mods, strict=True), x, at)

        def call(x: Array, block: EncoderBlock, score_mod: ScoreMod | None, key: Array | None) -> Array:
            return block(x, at, score_mod=score_mod, block_mask=masks.get(block.attention), dropout_key=key)

        layers = list(zip(self.blocks, mods, split(dropout_key, len(self.blocks)), strict=True))
        x = run_layers(call, x, layers, remat=self.block.remat, scan=self.block.scan_layers)
        return x if self.norm is None else self.norm(x)

    def weights(self, x: Float[Array, "*batch T D"], at: Coordinates) -> Float[Array, "*batch L T T"]:
        """Returns the attention weights of every head of every uncompressed layer, `[*batch, L, T, T]`."""
        found = [jnp.zeros((*x.shape[:-2], 0, x.shape[-2], x.shape[-2]))]
        for layer, (block, attention) in enumerate(zip(self.blocks, self.pattern, strict=True)):
            score_mod = self.scores.of(layer)
            # The keys of a compressed layer are blocks, so its weights do not have the shape `[T, T]`.
            if not isinstance(attention, Compressed):
                found.append(block.weights(x, at, score_mod=score_mod).astype(found[0].dtype))
            x = block(x, at, score_mod=score_mod)
        return jnp.concatenate(found, axis=-3)

    def start(self, batch: int, max_length: int, dtype: DTypeLike) -> tuple[Cache, ...]:
        """Creates empty caches with room for `max_length` tokens per row, one for each layer of a causal stack.

        Args:
            batch: B, the number of rows.
            max_length: number of tokens per row.
            dtype: dtype in which keys and values are stored.
        """
        return tuple(self._cache(attention, batch, max_length, dtype) for attention in self.pattern)

    def extend(
        self, x: Float[Array, "B T D"], at: Coordinates, caches: Sequence[Cache]
    ) -> tuple[Float[Array, "B T D"], tuple[Cache, ...]]:
        """Applies all blocks to new tokens, which follow the tokens in the caches.

        Args:
            x: vectors `[B, T, D]` of the new tokens.
            at: their coordinates.
            caches: one cache per layer.

        Returns:
            The outputs `[B, T, D]`, and the next caches.

        Raises:
            ValueError: the tokens do not fit into a cache.
        """
        grown = []
        for layer, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
            # Append first: a token also attends to itself.
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
        # The current block always lies within the `size` latest tokens, so a ring serves `Local` as well as `Window`.
        return RingCache.empty(batch, attention.size, **sizes)


def _mask(attention: Attention, causal: bool) -> Mask:
    if isinstance(attention, Window):
        return SlidingWindow(attention.size, ahead=0 if causal else attention.size - 1) & SameSegment()
    mask: Mask = Causal() & SameSegment() if causal else SameSegment()
    return SameBlock(attention.size) & mask if isinstance(attention, Local) else mask

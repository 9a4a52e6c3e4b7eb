"""Self-attention encoder for a recurrent decoder: a model between Luong 2015 and Vaswani 2017."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.checks import check_even, check_integer, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import split
from seqattn.masks import SameSegment
from seqattn.models import position_encodings
from seqattn.models.pooling import mean_over_tokens
from seqattn.models.position_encodings import Learned, Sinusoidal
from seqattn.nn.blocks import BlockConfig, EncoderBlock
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule
from seqattn.nn.recurrent import Carry, Cell

RULES = (ParameterRule("*starts/*/kernel", Kind.MATRIX, INTO),)


@dataclasses.dataclass(frozen=True)
class AttentionEncoder:
    """Sizes and choices of an encoder of self-attention blocks."""

    num_layers: int = 2
    """Number of blocks, each with self-attention and a feed-forward network; at least 0."""
    num_heads: int = 4
    """Number of heads of each self-attention. Must divide the hidden size of the model."""
    hidden_dim: int = 2048
    """Size of the hidden layer of the feed-forward networks."""
    positions: Sinusoidal | Learned | None = Sinusoidal()
    """Encoding of the source order. If None, the source is an unordered set of tokens."""


class SelfAttentionEncoder(nnx.Module):
    """Self-attention blocks (Vaswani 2017, figure 1, left) whose mean state initialises a recurrent decoder.

    A token sees all tokens of its own segment; no token sees padding. Without positions the encoder is
    permutation-equivariant: reordered tokens have the same states in the new order, and the decoder starts from the
    same state.

    Args:
        config: sizes and choices.
        input_dim: E, the size of token vectors.
        hidden_dim: H, the size of encoder states and of the decoder's state.
        num_layers: number of layers of the decoder.
        cell: the recurrent cell of the decoder.
        dropout_rate: dropout rate of each sublayer's output, in [0, 1). Applies only in calls with a dropout key.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: the heads do not divide `hidden_dim`, `hidden_dim` is odd with sinusoidal positions, or a size or
            rate is out of range.

    >>> config = AttentionEncoder(num_layers=1, num_heads=2, hidden_dim=8)
    >>> encoder = SelfAttentionEncoder(config, 3, 4, num_layers=2, cell=Cell.GRU, dropout_rate=0.1, rngs=nnx.Rngs(0))
    >>> states, (first, second) = encoder(jnp.ones((2, 5, 3)), Coordinates.from_lengths([5, 2], 5))
    >>> states.shape, second.shape
    ((2, 5, 4), (2, 4))
    """

    def __init__(
        self,
        config: AttentionEncoder,
        input_dim: int,
        hidden_dim: int,
        *,
        num_layers: int,
        cell: Cell,
        dropout_rate: float,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_integer("num_layers of an attention encoder", config.num_layers, 0)
        check_sizes(num_layers=num_layers)
        if isinstance(config.positions, Sinusoidal):
            check_even("hidden_dim", hidden_dim, " for sinusoidal positions")
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        block = BlockConfig(hidden_dim, config.hidden_dim, config.num_heads, dropout_rate=dropout_rate)
        self.input = Linear(input_dim, hidden_dim, **sizes)
        self.order = config.positions
        self.positions = position_encodings.table(config.positions, hidden_dim, **sizes)
        self.blocks = nnx.List([EncoderBlock(block, mask=SameSegment(), **sizes) for _ in range(config.num_layers)])
        # No bias: an empty source must start the decoder from zeros, as with a recurrent encoder.
        self.is_lstm = cell is Cell.LSTM
        size = hidden_dim * (2 if self.is_lstm else 1)
        self.starts = nnx.List([Linear(hidden_dim, size, use_bias=False, **sizes) for _ in range(num_layers)])

    def __call__(
        self, x: Float[Array, "*batch S E"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "*batch S H"], list[Carry]]:
        """Encodes a source.

        Args:
            x: token vectors `[*batch, S, E]`.
            at: their coordinates.
            dropout_key: if None, nothing is dropped.

        Returns:
            States `[*batch, S, H]`, and the initial state `[*batch, H]` of each decoder layer.
        """
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), at)
        real = at.segment != 0
        # Padding may hold any values, including NaN and positions outside the table.
        x = self.input(jnp.where(real[..., None], x, jnp.zeros_like(x)))
        position = jnp.where(real, at.position, jnp.zeros_like(at.position))
        x = position_encodings.add(x, position, self.order, self.positions)
        for block, key in zip(self.blocks, split(dropout_key, len(self.blocks)), strict=True):
            x = block(x, at, dropout_key=key)
        mean = mean_over_tokens(x, real)
        starts = [start(mean) for start in self.starts]
        return x, [tuple(jnp.split(start, 2, axis=-1)) if self.is_lstm else start for start in starts]

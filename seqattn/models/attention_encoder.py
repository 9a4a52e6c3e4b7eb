"""Self attention as the encoder of a recurrent decoder: the model between Luong 2015 and Vaswani 2017."""

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
    """Sizes and choices of an encoder of self attention blocks."""

    num_layers: int = 2
    """Blocks of self attention and feed-forward network."""
    num_heads: int = 4
    """Heads of each self attention."""
    hidden_dim: int = 2048
    """Size of the hidden layer of the feed-forward networks."""
    positions: Sinusoidal | Learned | None = Sinusoidal()
    """How the order of the source enters; None for a source without order, a set of tokens."""


class SelfAttentionEncoder(nnx.Module):
    """Self attention blocks (Vaswani 2017, figure 1, left) whose mean state starts a recurrent decoder.

    A token sees all tokens of its own segment, and nobody sees padding. Without positions the encoder is a function
    of a set: tokens in another order have the same states in that order, and the decoder starts from the same state.

    Args:
        config: sizes and choices.
        input_dim: E, the size of token vectors.
        hidden_dim: H, the size of encoder states and of the decoder's state.
        num_layers: layers of the decoder.
        cell: the recurrence of the decoder.
        dropout_rate: of each sublayer's output, where a call has a dropout key.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    Raises:
        ValueError: sizes that do not fit (heads, an odd hidden_dim for sines).

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
        # Without a bias an empty source starts the decoder from zeros, as a recurrent encoder does.
        self.is_lstm = cell is Cell.LSTM
        size = hidden_dim * (2 if self.is_lstm else 1)
        self.starts = nnx.List([Linear(hidden_dim, size, use_bias=False, **sizes) for _ in range(num_layers)])

    def __call__(
        self, x: Float[Array, "*batch S E"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "*batch S H"], list[Carry]]:
        """States `[*batch, S, H]`, and the state `[*batch, H]` that each layer of the decoder starts from."""
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), at)
        real = at.segment != 0
        # Padding may hold anything, also NaN and a position outside the table.
        x = self.input(jnp.where(real[..., None], x, jnp.zeros_like(x)))
        position = jnp.where(real, at.position, jnp.zeros_like(at.position))
        x = position_encodings.add(x, position, self.order, self.positions)
        for block, key in zip(self.blocks, split(dropout_key, len(self.blocks)), strict=True):
            x = block(x, at, dropout_key=key)
        mean = mean_over_tokens(x, real)
        starts = [start(mean) for start in self.starts]
        return x, [tuple(jnp.split(start, 2, axis=-1)) if self.is_lstm else start for start in starts]

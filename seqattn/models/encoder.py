"""The Transformer encoder: a label for each token, for each text, or the masked tokens back (Devlin 2019)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.models import position_encodings
from seqattn.models.pooling import mean_over_tokens
from seqattn.models.position_encodings import Positions, Sinusoidal
from seqattn.models.stack import Attention, Full, Stack
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule

RULES = (ParameterRule("head/output/kernel", Kind.LOGITS, INTO),)


@dataclasses.dataclass(frozen=True)
class TokenLabels:
    """A label for each token: `[B, T, num_labels]`."""

    num_labels: int = 2
    """How many labels there are."""


@dataclasses.dataclass(frozen=True)
class TextLabels:
    """A label for each text, from the mean of its tokens' vectors: `[B, num_labels]`."""

    num_labels: int = 2
    """How many labels there are."""


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """The token that stood at each place: `[B, T, vocab_size]`, by the table of the input (Devlin 2019, task 1)."""


Head = TokenLabels | TextLabels | MaskedTokens
"""What an encoder is for."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and choices of a Transformer encoder."""

    vocab_size: int
    """Tokens of the vocabulary."""
    num_layers: int = 6
    """Blocks."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """How the order of tokens enters; None for a set of tokens."""
    pattern: tuple[Attention, ...] = (Full(),)
    """What each layer sees, repeated over the layers; not compressed."""
    head: Head = TokenLabels()
    """What the encoder is for."""


class Encoder(nnx.Module):
    """Transformer encoder with a head. A token sees the tokens of its own segment, and padding is seen by nobody.

    All parameters but those of `head` have the same paths and shapes whatever the head is: so an encoder that was
    trained to find masked tokens can be tuned for labels.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    >>> block = BlockConfig(model_dim=6, hidden_dim=8, num_heads=2)
    >>> tagger = Encoder(EncoderConfig(11, num_layers=1, block=block, head=TokenLabels(3)), rngs=nnx.Rngs(0))
    >>> tagger(jnp.array([[5, 8, 9, 0]]), Coordinates.from_lengths([3], 4)).shape
    (1, 4, 3)
    """

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, dim = config, config.block.model_dim
        position_encodings.check_positions(config.positions, dim)
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.embedding = TokenEmbedding(config.vocab_size, dim, **sizes)
        self.learned = position_encodings.table(config.positions, dim, **sizes)
        choices: dict[str, Any] = {"positions": config.positions, "pattern": config.pattern}
        self.stack = Stack(config.block, config.num_layers, causal=False, **choices, **sizes)
        self.head = _HEADS[type(config.head)](config, **sizes)

    def __call__(
        self, tokens: Int[Array, "B T"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B ..."]:
        """Logits of what the head is for: `[B, T, labels]`, `[B, labels]` or `[B, T, V]`. Texts are not packed for it.

        Without a dropout key nothing drops.
        """
        keys = split(dropout_key, 3)
        x = self.encode(tokens, at, dropout_key=keys[0])
        x = drop(x, self.config.block.dropout_rate, keys[1])
        return self.head(x, at, self.embedding)

    def room(self, source_length: int) -> int | None:
        """None where a text of so many tokens can be read, 0 where it is longer than there are learned positions."""
        limit = position_encodings.limit(self.config.positions)
        return None if limit is None or source_length <= limit else 0

    def encode(
        self, tokens: Int[Array, "B T"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        """A vector for each token `[B, T]`, before the head."""
        keys = split(dropout_key, 2)
        x = position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at)
        return self.stack(drop(x, self.config.block.dropout_rate, keys[0]), at, dropout_key=keys[1])

    def attention(self, tokens: Int[Array, "B T"], at: Coordinates) -> Float[Array, "B L T T"]:
        """Where each token looks: every head of every layer, `[B, layers * N, T, T]`."""
        return self.stack.weights(
            position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at), at
        )


class TokenHead(nnx.Module):
    """One linear layer over each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        size = _num_labels(config.head)
        self.output = Linear(config.block.model_dim, size, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T C"]:
        """Logits of the label of each token."""
        return self.output(x)


class TextHead(nnx.Module):
    """The mean over a row's real tokens, then two layers (the pooler of Devlin 2019, over the mean)."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear(config.block.model_dim, config.block.model_dim, **sizes)
        self.output = Linear(config.block.model_dim, _num_labels(config.head), **sizes)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B C"]:
        """Logits of the label of each row."""
        return self.output(jnp.tanh(self.hidden(mean_over_tokens(x, jnp.broadcast_to(at.segment, x.shape[:-1]) != 0))))


class MaskedHead(nnx.Module):
    """A layer with GELU and norm, then the table of the input, and a bias for each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        dim = config.block.model_dim
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear(dim, dim, **sizes)
        self.norm = nnx.LayerNorm(dim, **sizes)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T V"]:
        """Logits of the token at each place."""
        logits = embedding.logits(self.norm(jax.nn.gelu(self.hidden(x))))
        return logits + self.bias[...].astype(logits.dtype)[None, None]


_HEADS: dict[type, type] = {TokenLabels: TokenHead, TextLabels: TextHead, MaskedTokens: MaskedHead}


def _num_labels(head: Head) -> int:
    labels: int = getattr(head, "num_labels", 0)
    check_sizes(num_labels=labels)
    return labels

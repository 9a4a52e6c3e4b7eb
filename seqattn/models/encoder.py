"""Transformer encoder with a head for token labels, text labels or masked tokens (Devlin 2019)."""

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
    """Head that labels each token: logits `[B, T, num_labels]`."""

    num_labels: int = 2
    """Number of labels."""


@dataclasses.dataclass(frozen=True)
class TextLabels:
    """Head that labels each text from the mean of its token vectors: logits `[B, num_labels]`."""

    num_labels: int = 2
    """Number of labels."""


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Head that predicts the original token at each place, with the input table (Devlin 2019, task 1): `[B, T, V]`."""


Head = TokenLabels | TextLabels | MaskedTokens
"""The task of an encoder."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and choices of a Transformer encoder (Vaswani 2017; Devlin 2019)."""

    vocab_size: int
    """V, the number of tokens of the vocabulary."""
    num_layers: int = 6
    """Number of blocks."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """Position encoding. If None, the input is an unordered set of tokens."""
    pattern: tuple[Attention, ...] = (Full(),)
    """What each layer attends to, repeated over the layers. `Compressed` is not allowed."""
    head: Head = TokenLabels()
    """The task of the encoder."""


class Encoder(nnx.Module):
    """Transformer encoder with a head.

    A token sees the tokens of its own segment; no token sees padding. All parameters except those of `head` have the
    same paths and shapes for every head. So an encoder pretrained on masked tokens can be fine-tuned for labels.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: sizes do not fit, or `pattern` contains `Compressed`.

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
        """Returns the logits of the head: `[B, T, labels]`, `[B, labels]` or `[B, T, V]`.

        Args:
            tokens: `[B, T]`. For text labels each row must hold one text: packed documents are not supported.
            at: their coordinates.
            dropout_key: if None, nothing is dropped.
        """
        keys = split(dropout_key, 3)
        x = self.encode(tokens, at, dropout_key=keys[0])
        x = drop(x, self.config.block.dropout_rate, keys[1])
        return self.head(x, at, self.embedding)

    def room(self, source_length: int) -> int | None:
        """Returns None if a text of `source_length` tokens fits the learned positions (if any), 0 if it is too long."""
        limit = position_encodings.limit(self.config.positions)
        return None if limit is None or source_length <= limit else 0

    def encode(
        self, tokens: Int[Array, "B T"], at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T D"]:
        """Returns a vector for each token `[B, T]`, before the head: `[B, T, D]`."""
        keys = split(dropout_key, 2)
        x = position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at)
        return self.stack(drop(x, self.config.block.dropout_rate, keys[0]), at, dropout_key=keys[1])

    def attention(self, tokens: Int[Array, "B T"], at: Coordinates) -> Float[Array, "B L T T"]:
        """Returns the self-attention weights of every head of every layer, `[B, layers * N, T, T]`."""
        return self.stack.weights(
            position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at), at
        )


class TokenHead(nnx.Module):
    """One linear layer on each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        size = _num_labels(config.head)
        self.output = Linear(config.block.model_dim, size, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T C"]:
        """Returns the logits of each token's label."""
        return self.output(x)


class TextHead(nnx.Module):
    """Mean over the real tokens of a row, then two layers (the pooler of Devlin 2019, on the mean)."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear(config.block.model_dim, config.block.model_dim, **sizes)
        self.output = Linear(config.block.model_dim, _num_labels(config.head), **sizes)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B C"]:
        """Returns the logits of each row's label."""
        return self.output(jnp.tanh(self.hidden(mean_over_tokens(x, jnp.broadcast_to(at.segment, x.shape[:-1]) != 0))))


class MaskedHead(nnx.Module):
    """A layer with GELU and layer norm, then the input table, and a bias for each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        dim = config.block.model_dim
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear(dim, dim, **sizes)
        self.norm = nnx.LayerNorm(dim, **sizes)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T V"]:
        """Returns the logits of the token at each place."""
        logits = embedding.logits(self.norm(jax.nn.gelu(self.hidden(x))))
        return logits + self.bias[...].astype(logits.dtype)[None, None]


_HEADS: dict[type, type] = {TokenLabels: TokenHead, TextLabels: TextHead, MaskedTokens: MaskedHead}


def _num_labels(head: Head) -> int:
    labels: int = getattr(head, "num_labels", 0)
    check_sizes(num_labels=labels)
    return labels

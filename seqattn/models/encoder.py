"""Transformer encoder with a head for token labels, text labels or masked tokens (Devlin 2019)."""

import dataclasses
import enum
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_integer, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.models import position_encodings
from seqattn.models.pooling import first_token, mean_over_tokens
from seqattn.models.position_encodings import Positions, Sinusoidal
from seqattn.models.stack import Attention, Full, Stack
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.feed_forward import Activation
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule

RULES = (ParameterRule("head/output/kernel", Kind.LOGITS, INTO),)


@dataclasses.dataclass(frozen=True)
class TokenLabels:
    """Head that labels each token: logits `[B, T, num_labels]`."""

    num_labels: int = 2
    """Number of labels."""


class Pooling(enum.Enum):
    """Which vector stands for a text."""

    MEAN = "mean"
    """The mean of the vectors of its tokens."""
    FIRST = "first"
    """The vector of its first token, which BERT adds to each text (Devlin 2019)."""


@dataclasses.dataclass(frozen=True)
class TextLabels:
    """Head that labels each text from one vector: logits `[B, num_labels]`."""

    num_labels: int = 2
    """Number of labels."""
    pooling: Pooling = Pooling.MEAN
    """Which vector stands for a text."""
    activation: Activation = Activation.TANH
    """Nonlinearity between the two layers of the head. BERT has TANH (Devlin 2019), DistilBERT has RELU."""


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Head that predicts the original token at each place, with the input table (Devlin 2019, task 1): `[B, T, V]`."""

    activation: Activation = Activation.GELU
    """Nonlinearity of the head."""
    norm_epsilon: float = 1e-6
    """Added to the variance in the head's layer norm."""


@dataclasses.dataclass(frozen=True)
class TokenVectors:
    """No head: the model returns a vector for each token, `[B, T, D]`."""


Head = TokenLabels | TextLabels | MaskedTokens | TokenVectors
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
    embedding_scale: float | None = None
    """Factor of token vectors. If None, `sqrt(model_dim)` (Vaswani 2017, section 3.4); BERT has 1."""
    norm_embedding: bool = False
    """If True, a norm after token and position vectors are added (Devlin 2019)."""
    num_types: int = 0
    """Number of token types, such as first and second text (Devlin 2019), each with a vector. If 0, there are none."""


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
        self.embedding = TokenEmbedding(config.vocab_size, dim, scale=config.embedding_scale, **sizes)
        self.learned = position_encodings.table(config.positions, dim, **sizes)
        choices: dict[str, Any] = {"positions": config.positions, "pattern": config.pattern}
        self.stack = Stack(config.block, config.num_layers, causal=False, **choices, **sizes)
        kind = _HEADS[type(config.head)]
        self.head = None if kind is None else kind(config, **sizes)
        check_integer("num_types", config.num_types, 0)
        self.types = TokenEmbedding(config.num_types, dim, scale=1.0, **sizes) if config.num_types else None
        self.embedding_norm = config.block.embedding_norm(**sizes) if config.norm_embedding else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        at: Coordinates,
        *,
        types: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B ..."]:
        """Returns the logits of the head: `[B, T, labels]`, `[B, labels]` or `[B, T, V]`; without a head, the vectors.

        Args:
            tokens: `[B, T]`. For text labels each row must hold one text: packed documents are not supported.
            at: their coordinates.
            types: the type of each token, `[B, T]`. If None, 0 for all.
            dropout_key: if None, nothing is dropped.

        Raises:
            ValueError: types are given to a model that has none.
        """
        keys = split(dropout_key, 3)
        x = self.encode(tokens, at, types=types, dropout_key=keys[0])
        if self.head is None:
            return x
        x = drop(x, self.config.block.dropout_rate, keys[1])
        return self.head(x, at, self.embedding)

    def room(self, source_length: int) -> int | None:
        """Returns None if a text of `source_length` tokens fits the learned positions (if any), 0 if it is too long."""
        limit = position_encodings.limit(self.config.positions)
        return None if limit is None or source_length <= limit else 0

    def encode(
        self,
        tokens: Int[Array, "B T"],
        at: Coordinates,
        *,
        types: Int[Array, "B T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns a vector for each token `[B, T]`, before the head: `[B, T, D]`. For `types` see a call."""
        keys = split(dropout_key, 2)
        x = self._embed(tokens, at, types)
        return self.stack(drop(x, self.config.block.dropout_rate, keys[0]), at, dropout_key=keys[1])

    def attention(self, tokens: Int[Array, "B T"], at: Coordinates) -> Float[Array, "B L T T"]:
        """Returns the self-attention weights of every head of every layer, `[B, layers * N, T, T]`."""
        return self.stack.weights(self._embed(tokens, at, None), at)

    def _embed(self, tokens: Array, at: Coordinates, types: Array | None) -> Float[Array, "B T D"]:
        """Returns the vectors of tokens, positions and types, from which the stack starts."""
        x = position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at)
        if self.types is None:
            if types is not None:
                raise ValueError("types were given, but num_types is 0: the model has no vectors of types")
        else:
            # Padding may hold any number, and an index outside the table would be an error.
            real = jnp.broadcast_to(at.segment, tokens.shape) != 0
            zeros = jnp.zeros_like(tokens)
            x = x + self.types(zeros if types is None else jnp.where(real, types, zeros))
        return x if self.embedding_norm is None else self.embedding_norm(x)


class TokenHead(nnx.Module):
    """One linear layer on each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        size = _num_labels(config.head)
        self.output = Linear(config.block.model_dim, size, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T C"]:
        """Returns the logits of each token's label."""
        return self.output(x)


class TextHead(nnx.Module):
    """One vector for each row, then two layers (the pooler of Devlin 2019, on the mean or on the first token)."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        assert isinstance(config.head, TextLabels)
        self.pooling, self.activation = config.head.pooling, config.head.activation
        self.hidden = Linear(config.block.model_dim, config.block.model_dim, **sizes)
        self.output = Linear(config.block.model_dim, _num_labels(config.head), **sizes)

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B C"]:
        """Returns the logits of each row's label."""
        real = jnp.broadcast_to(at.segment, x.shape[:-1]) != 0
        pooled = mean_over_tokens(x, real) if self.pooling is Pooling.MEAN else first_token(x, real)
        return self.output(self.activation(self.hidden(pooled)))


class MaskedHead(nnx.Module):
    """A layer with an activation and a layer norm, then the input table, and a bias for each token."""

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        dim = config.block.model_dim
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = Linear(dim, dim, **sizes)
        assert isinstance(config.head, MaskedTokens)
        self.activation = config.head.activation
        self.norm = nnx.LayerNorm(dim, epsilon=config.head.norm_epsilon, **sizes)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype))

    def __call__(self, x: Float[Array, "B T D"], at: Coordinates, embedding: TokenEmbedding) -> Float[Array, "B T V"]:
        """Returns the logits of the token at each place."""
        logits = embedding.logits(self.norm(self.activation(self.hidden(x))))
        return logits + self.bias[...].astype(logits.dtype)[None, None]


_HEADS: dict[type, type | None] = {
    TokenLabels: TokenHead,
    TextLabels: TextHead,
    MaskedTokens: MaskedHead,
    TokenVectors: None,
}


def _num_labels(head: Head) -> int:
    labels: int = getattr(head, "num_labels", 0)
    check_sizes(num_labels=labels)
    return labels

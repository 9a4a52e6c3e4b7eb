"""Decoder-only Transformer: a language model, or sequence to sequence with the source as prefix (Liu 2018)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_number, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.hypotheses import Shared
from seqattn.models import position_encodings
from seqattn.models.position_encodings import Positions, Sinusoidal
from seqattn.models.stack import Attention, Full, Stack
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.cache import Cache
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.linear import Linear
from seqattn.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes and choices of a decoder-only Transformer."""

    vocab_size: int
    """V, the number of tokens of the vocabulary."""
    num_layers: int = 6
    """Number of blocks."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """Position encoding. If None, only the causal mask carries information about order."""
    pattern: tuple[Attention, ...] = (Full(),)
    """What each layer attends to, repeated over the layers."""
    embedding_scale: float | None = None
    """Factor of token vectors. If None, `sqrt(model_dim)` (Vaswani 2017, section 3.4); GPT-2 has 1."""
    tie_logits: bool = True
    """If False, logits have a table of their own, in place of that of the tokens."""
    logits_soft_cap: float | None = None
    """Limits logits to `cap * tanh(logits / cap)` (Gemma 2: Gemma Team 2024). If None, they have no limit."""


@pytree
@dataclasses.dataclass(frozen=True)
class LanguageModelMemory:
    """The prefix: the tokens before the target.

    Attributes:
        tokens: `[B, S]`.
        at: their coordinates `[B, S]`.
    """

    tokens: Array
    at: Coordinates


@pytree
@dataclasses.dataclass(frozen=True)
class LanguageModelState:
    """State between two steps, for B rows with R hypotheses in all.

    Attributes:
        caches: the cache of each block.
        segment: `[B]`, the segment of each row's text.
        position: `[R]`, the number of tokens that each hypothesis has read, including the prefix.
    """

    caches: tuple[Cache, ...]
    segment: Shared
    position: Array


class LanguageModel(nnx.Module):
    """Decoder-only Transformer: each token attends to earlier tokens, and its logits predict the next token.

    Source and target form one stream: the source is the prefix of the target (the Transformer-decoder of Liu 2018,
    section 4.2.3). So training, decoding and evaluation treat the model as any other encoder-decoder. A plain language
    model has empty sources. In a row with several segments, each target continues the source of its own segment.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: sizes do not fit.

    >>> block = BlockConfig(model_dim=6, hidden_dim=8, num_heads=2)
    >>> model = LanguageModel(LanguageModelConfig(vocab_size=11, num_layers=1, block=block), rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[5, 8, 9, 0]]), jnp.array([[1, 6, 3]])
    >>> memory = model.encode(source, Coordinates.from_lengths([3], 4))
    >>> model.decode(target, Coordinates.from_lengths([3], 3), memory).shape
    (1, 3, 11)
    """

    def __init__(self, config: LanguageModelConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        check_sizes(num_layers=config.num_layers)
        position_encodings.check_positions(config.positions, config.block.model_dim)
        self.config = config
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        dim = config.block.model_dim
        self.embedding = TokenEmbedding(config.vocab_size, dim, scale=config.embedding_scale, **sizes)
        self.learned = position_encodings.table(config.positions, dim, **sizes)
        choices: dict[str, Any] = {"positions": config.positions, "pattern": config.pattern}
        self.stack = Stack(config.block, config.num_layers, causal=True, **choices, **sizes)
        self.output = None if config.tie_logits else Linear(dim, config.vocab_size, use_bias=False, **sizes)
        if config.logits_soft_cap is not None:
            check_number("logits_soft_cap", config.logits_soft_cap, above=0)

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> LanguageModelMemory:
        """Returns the prefix `[B, S]` and its coordinates unchanged: the model reads it together with the target.

        `dropout_key` is ignored.
        """
        del dropout_key
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, source.shape), source_at)
        return LanguageModelMemory(source, at)

    def decode(
        self,
        target: Int[Array, "B T"],
        target_at: Coordinates,
        memory: LanguageModelMemory,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes logits `[B, T, V]` with known targets. See `EncoderDecoder.decode`.

        The memory is the prefix. Target positions count from 0; the positions of the prefix are added.
        """
        keys = split(dropout_key, 2)
        x, at = self._stream(target, target_at, memory)
        x = self.stack(drop(x, self.config.block.dropout_rate, keys[0]), at, dropout_key=keys[1])
        return self._logits(x[:, memory.tokens.shape[1] :])

    def room(self, source_length: int) -> int | None:
        """Returns the number of learned positions that a prefix of `source_length` tokens leaves for the target.

        None if positions are not learned, which sets no limit.
        """
        limit = position_encodings.limit(self.config.positions)
        return limit if limit is None else limit - source_length

    def start(self, memory: LanguageModelMemory, max_length: int) -> LanguageModelState:
        """Reads the prefix. Returns the state before the first step, with room for `max_length` more tokens."""
        batch, length = memory.tokens.shape
        x, at = self._embed(memory.tokens, memory.at), memory.at
        caches = self.stack.start(batch, length + max_length, x.dtype)
        if length:
            _, caches = self.stack.extend(x, at, caches)
        follows = at.next()
        segment, position = (jnp.asarray(field)[:, 0] for field in (follows.segment, follows.position))
        return LanguageModelState(caches, Shared(segment), position)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: LanguageModelState
    ) -> tuple[Float[Array, "B T V"], LanguageModelState]:
        """Reads many target tokens at once. See `EncoderDecoder.prefill`."""
        if state.caches[0].beams > 1:
            raise ValueError(f"prefill before branching: the state has {state.caches[0].beams} hypotheses per row")
        new = Coordinates.from_lengths(lengths, tokens.shape[1])
        # Padding keeps segment 0, so no token sees it.
        at = Coordinates(state.position[:, None] + new.position, state.segment.value[:, None] * new.segment)
        x, caches = self.stack.extend(self._embed(tokens, at), at, state.caches)
        position = state.position + jnp.asarray(lengths, jnp.int32)
        return self._logits(x), LanguageModelState(caches, state.segment, position)

    def step(
        self, tokens: Int[Array, "R"], state: LanguageModelState
    ) -> tuple[Float[Array, "R V"], LanguageModelState]:
        """Reads one token per hypothesis.

        Args:
            tokens: `[R]`.
            state: the state before these tokens.

        Returns:
            Logits `[R, V]` of the token after `tokens`, and the next state.

        Raises:
            ValueError: R is not the number of hypotheses of the state, or the caches are full. Inside `jit`, where full
                caches cannot raise, the logits are NaN.
        """
        segment = state.segment.value
        # The hypotheses of a row are T queries of one batch row, so that they share its cache.
        beams = (segment.shape[0], state.caches[0].beams)
        if tokens.shape[0] != beams[0] * beams[1]:
            raise ValueError(f"the state has {beams[0]} rows of {beams[1]} hypotheses, got {tokens.shape[0]} tokens")
        position = state.position.reshape(beams)
        at = Coordinates(position, jnp.broadcast_to(segment[:, None], position.shape))
        x, caches = self.stack.extend(self._embed(tokens.reshape(beams), at), at, state.caches)
        logits = self._logits(x)
        return logits.reshape(*tokens.shape, logits.shape[-1]), LanguageModelState(
            caches, state.segment, state.position + 1
        )

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: LanguageModelMemory
    ) -> Float[Array, "B L T S"]:
        """Returns the attention weights `[B, L, T, S]` from target tokens to the prefix.

        L counts the heads of all layers except compressed ones.
        """
        x, at = self._stream(target, target_at, memory)
        size = memory.tokens.shape[1]
        return self.stack.weights(x, at)[:, :, size:, :size]

    def _stream(
        self, target: Array, target_at: Coordinates, memory: LanguageModelMemory
    ) -> tuple[Float[Array, "B all D"], Coordinates]:
        """Joins prefix and target to one stream of vectors, with coordinates.

        Padding may lie between prefix and target. Only the coordinates say that the target continues the prefix.
        """
        target_at = jax.tree.map(lambda field: jnp.broadcast_to(field, target.shape), target_at)
        same = target_at.segment[:, :, None] == memory.at.segment[:, None, :]
        # The target starts at the position after the last prefix token of its segment. The length of the prefix's array
        # would also count padding and other segments.
        before = jnp.sum(same, axis=-1, dtype=jnp.int32)
        moved = Coordinates(target_at.position + before, target_at.segment)
        tokens = jnp.concatenate([memory.tokens, target.astype(memory.tokens.dtype)], axis=1)
        at = jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), memory.at, moved)
        return self._embed(tokens, at), at

    def _embed(self, tokens: Int[Array, "B T"], at: Coordinates) -> Float[Array, "B T D"]:
        return position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = self.embedding.logits(x) if self.output is None else self.output(x)
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

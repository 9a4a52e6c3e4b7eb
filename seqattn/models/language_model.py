"""The decoder-only Transformer: a language model, and sequence to sequence in one stream (Liu 2018, Transformer-D)."""

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
from seqattn.hypotheses import Shared
from seqattn.models import position_encodings
from seqattn.models.position_encodings import Positions, Sinusoidal
from seqattn.models.stack import Attention, Full, Stack
from seqattn.nn.blocks import BlockConfig
from seqattn.nn.cache import Cache
from seqattn.nn.embedding import TokenEmbedding
from seqattn.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes and choices of a decoder-only Transformer."""

    vocab_size: int
    """Tokens of the vocabulary."""
    num_layers: int = 6
    """Blocks."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """How the order of tokens enters; None for what the causal mask alone tells."""
    pattern: tuple[Attention, ...] = (Full(),)
    """What each layer sees, repeated over the layers."""


@pytree
@dataclasses.dataclass(frozen=True)
class LanguageModelMemory:
    """A context: what was said before the target.

    Attributes:
        tokens: `[B, S]`.
        at: their coordinates `[B, S]`.
    """

    tokens: Array
    at: Coordinates


@pytree
@dataclasses.dataclass(frozen=True)
class LanguageModelState:
    """The model between two steps, of one hypothesis a row or of several (R hypotheses of B rows).

    Attributes:
        caches: what each block keeps of the tokens so far.
        segment: of each row's text, `[B]`.
        position: how many tokens each hypothesis has seen, the context included, `[R]`.
    """

    caches: tuple[Cache, ...]
    segment: Shared
    position: Array


class LanguageModel(nnx.Module):
    """Decoder-only Transformer: each token sees those before it, and its logits are of the token after it.

    Source and target of a pair are one stream: the target goes on where its source ends, so that training, decoding
    and evaluation treat it as every other encoder-decoder. A plain language model has empty sources. In a row with
    several segments each target goes on from the source of its own segment.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

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
        self.embedding = TokenEmbedding(config.vocab_size, config.block.model_dim, **sizes)
        self.learned = position_encodings.table(config.positions, config.block.model_dim, **sizes)
        choices: dict[str, Any] = {"positions": config.positions, "pattern": config.pattern}
        self.stack = Stack(config.block, config.num_layers, causal=True, **choices, **sizes)

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> LanguageModelMemory:
        """The context `[B, S]` at its coordinates, as it is: it is read together with what follows."""
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
        """Logits `[B, T, V]` of the token after each of `target` `[B, T]`, behind the context."""
        keys = split(dropout_key, 2)
        x, at = self._stream(target, target_at, memory)
        x = self.stack(drop(x, self.config.block.dropout_rate, keys[0]), at, dropout_key=keys[1])
        return self.embedding.logits(x[:, memory.tokens.shape[1] :])

    def room(self, source_length: int) -> int | None:
        """How many target tokens have a place behind a source of so many: the learned positions that it leaves."""
        limit = position_encodings.limit(self.config.positions)
        return limit if limit is None else limit - source_length

    def start(self, memory: LanguageModelMemory, max_length: int) -> LanguageModelState:
        """The state before the first step, the context read, with room for `max_length` tokens more."""
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
        """Many tokens at once: the logits after each of `tokens` `[B, T]`, and the state after the last.

        Row i has `lengths[i]` tokens and then padding, which takes room in the caches and is seen by nobody. A text
        may come in pieces of any size.

        Raises:
            ValueError: the state has several hypotheses a row, or the caches are full. Inside `jit`, where the latter
                cannot be raised, the logits are NaN.
        """
        if state.caches[0].beams > 1:
            raise ValueError(f"prefill before branching: the state has {state.caches[0].beams} hypotheses a row")
        new = Coordinates.from_lengths(lengths, tokens.shape[1])
        at = Coordinates(state.position[:, None] + new.position, state.segment.value[:, None] * new.segment)
        x, caches = self.stack.extend(self._embed(tokens, at), at, state.caches)
        position = state.position + jnp.asarray(lengths, jnp.int32)
        return self.embedding.logits(x), LanguageModelState(caches, state.segment, position)

    def step(
        self, tokens: Int[Array, "R"], state: LanguageModelState
    ) -> tuple[Float[Array, "R V"], LanguageModelState]:
        """Logits `[R, V]` of the token after `tokens` `[R]`, and the next state.

        Raises:
            ValueError: R is not what the state holds, or the caches are full. Inside `jit`, where the latter cannot be
                raised, the logits are NaN.
        """
        segment = state.segment.value
        beams = (segment.shape[0], state.caches[0].beams)
        if tokens.shape[0] != beams[0] * beams[1]:
            raise ValueError(f"the state has {beams[0]} rows of {beams[1]} hypotheses, got {tokens.shape[0]} tokens")
        position = state.position.reshape(beams)
        at = Coordinates(position, jnp.broadcast_to(segment[:, None], position.shape))
        x, caches = self.stack.extend(self._embed(tokens.reshape(beams), at), at, state.caches)
        logits = self.embedding.logits(x)
        return logits.reshape(*tokens.shape, logits.shape[-1]), LanguageModelState(
            caches, state.segment, state.position + 1
        )

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: LanguageModelMemory
    ) -> Float[Array, "B L T S"]:
        """Where each target token looks in the context: every head of every layer but the compressed ones."""
        x, at = self._stream(target, target_at, memory)
        size = memory.tokens.shape[1]
        return self.stack.weights(x, at)[:, :, size:, :size]

    def _stream(
        self, target: Array, target_at: Coordinates, memory: LanguageModelMemory
    ) -> tuple[Float[Array, "B all D"], Coordinates]:
        """Vectors and coordinates of context and target as one stream.

        Only coordinates tell that the target goes on where the context ends: padding may lie between them.
        """
        target_at = jax.tree.map(lambda field: jnp.broadcast_to(field, target.shape), target_at)
        same = target_at.segment[:, :, None] == memory.at.segment[:, None, :]
        before = jnp.sum(same, axis=-1, dtype=jnp.int32)
        moved = Coordinates(target_at.position + before, target_at.segment)
        tokens = jnp.concatenate([memory.tokens, target.astype(memory.tokens.dtype)], axis=1)
        at = jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), memory.at, moved)
        return self._embed(tokens, at), at

    def _embed(self, tokens: Int[Array, "B T"], at: Coordinates) -> Float[Array, "B T D"]:
        return position_encodings.embed(self.embedding, self.learned, self.config.positions, tokens, at)

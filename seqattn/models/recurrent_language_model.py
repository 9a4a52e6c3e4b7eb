"""Recurrent language model (Mikolov 2010), which continues a text or starts one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_rate, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.linear import Linear
from seqattn.nn.recurrent import Carry, Cell, Recurrent
from seqattn.pytrees import pytree


@dataclasses.dataclass(frozen=True)
class RecurrentLanguageModelConfig:
    """Sizes and choices of a recurrent language model."""

    vocab_size: int
    """V, the number of tokens of the vocabulary."""
    embedding_dim: int = 256
    """E, the size of token vectors."""
    hidden_dim: int = 512
    """H, the size of recurrent states."""
    num_layers: int = 1
    """Number of recurrent layers."""
    cell: Cell = Cell.GRU
    """The recurrent cell."""
    tie_embeddings: bool = False
    """If True, the token table also computes the logits (Press 2017). Requires `embedding_dim == hidden_dim`."""
    dropout_rate: float = 0.1
    """Dropout rate of token vectors, layer inputs and the vector before the logits, never of a state (Zaremba 2014)."""


@pytree
@dataclasses.dataclass(frozen=True)
class RecurrentLanguageModelState:
    """The state after the tokens read so far. It is both the memory of a context and the state between two steps.

    Attributes:
        carries: the state `[R, H]` of each layer, for R rows or hypotheses.
        segment: `[R]`, the segment of the current text; 1 if nothing was read.
    """

    carries: tuple[Carry, ...]
    segment: Array


class RecurrentLanguageModel(nnx.Module):
    """Recurrent language model: the probability of each token given all earlier tokens of its text (Mikolov 2010).

    It follows the protocol `EncoderDecoder`, with the source as context: `decode` continues where `encode` stopped, as
    if both were one text. With an empty source, `decode` is a plain language model. Padding may be anywhere and is
    skipped. A new segment starts a new text, so packed documents do not influence each other. A target continues the
    last text of its row's source if both have the same segment number.

    To continue a text, encode all but its last token and feed that token first: `generate(model.step,
    model.start(model.encode(text[:, :-1], at), 50), text[:, -1], max_length=50, ...)`. For texts of unequal lengths,
    use `prefill` after an empty context.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: `tie_embeddings` with `embedding_dim` different from `hidden_dim`, a size below 1, or a dropout rate
            not in [0, 1).

    >>> config = RecurrentLanguageModelConfig(vocab_size=11, embedding_dim=4, hidden_dim=6)
    >>> model = RecurrentLanguageModel(config, rngs=nnx.Rngs(0))
    >>> context, rest = jnp.array([[5, 8, 9, 0]]), jnp.array([[7, 6]])
    >>> memory = model.encode(context, Coordinates.from_lengths([3], 4))
    >>> logits = model.decode(rest, Coordinates.range(2), memory)
    >>> logits.shape
    (1, 2, 11)

    The same in one piece, after an empty context:

    >>> nothing = model.encode(jnp.zeros((1, 0), int), Coordinates.range(0))
    >>> whole = model.decode(jnp.array([[5, 8, 9, 7, 6]]), Coordinates.range(5), nothing)
    >>> print(jnp.allclose(whole[:, 3:], logits, atol=1e-6))
    True
    """

    def __init__(
        self, config: RecurrentLanguageModelConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        embedded, hidden = config.embedding_dim, config.hidden_dim
        check_rate(config.dropout_rate)
        check_sizes(num_layers=config.num_layers)
        if config.tie_embeddings and embedded != hidden:
            raise ValueError(f"tie_embeddings needs embedding_dim ({embedded}) equal to hidden_dim ({hidden})")
        self.config = config
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.embedding = TokenEmbedding(config.vocab_size, embedded, **sizes)
        self.layers = nnx.List(
            [Recurrent(hidden if i else embedded, hidden, cell=config.cell, **sizes) for i in range(config.num_layers)]
        )
        self.output = None if config.tie_embeddings else Linear(hidden, config.vocab_size, **sizes)

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> RecurrentLanguageModelState:
        """Reads the context `[B, S]` at its coordinates. Returns the state after it."""
        nothing = RecurrentLanguageModelState(self._start(source.shape[0]), jnp.ones(source.shape[:1], jnp.int32))
        return self._unroll(source, source_at, nothing, dropout_key)[1]

    def decode(
        self,
        target: Int[Array, "B T"],
        target_at: Coordinates,
        memory: RecurrentLanguageModelState,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes logits `[B, T, V]` with known targets. See `EncoderDecoder.decode`.

        The memory is the state after the context.
        """
        keys = split(dropout_key, 2)
        features, _ = self._unroll(target, target_at, memory, keys[0])
        return self._logits(drop(features, self.config.dropout_rate, keys[1]))

    def room(self, source_length: int) -> int | None:
        """Returns None: the number of target tokens is unlimited."""
        del source_length
        return None

    def start(self, memory: RecurrentLanguageModelState, max_length: int) -> RecurrentLanguageModelState:
        """Returns the state before the first step. `max_length` is ignored, since the state does not grow."""
        del max_length
        return memory

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: RecurrentLanguageModelState
    ) -> tuple[Float[Array, "B T V"], RecurrentLanguageModelState]:
        """Reads many target tokens at once. See `EncoderDecoder.prefill`."""
        rows, hypotheses = tokens.shape[0], state.segment.shape[0]
        if hypotheses != rows:
            raise ValueError(f"prefill before branching: {rows} rows of tokens, {hypotheses} hypotheses in the state")
        at = Coordinates.from_lengths(lengths, tokens.shape[1])
        at = Coordinates(at.position, at.segment * state.segment[:, None])
        features, state = self._unroll(tokens, at, state, None)
        return self._logits(features), state

    def step(
        self, tokens: Int[Array, "R"], state: RecurrentLanguageModelState
    ) -> tuple[Float[Array, "R V"], RecurrentLanguageModelState]:
        """Reads tokens `[R]`. Returns logits `[R, V]` of the next token, and the next state."""
        features, carries = self._advance(self.embedding(tokens), state.carries, None)
        return self._logits(features), RecurrentLanguageModelState(carries, state.segment)

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: RecurrentLanguageModelState
    ) -> Float[Array, "B 0 T 0"]:
        """Returns an empty array `[B, 0, T, 0]`: the model has no attention."""
        del target_at, memory
        return jnp.zeros((target.shape[0], 0, target.shape[1], 0))

    def _start(self, rows: int) -> tuple[Carry, ...]:
        return tuple(layer.start((rows,)) for layer in self.layers)

    def _unroll(
        self,
        tokens: Array,
        at: Coordinates,
        state: RecurrentLanguageModelState,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Array, RecurrentLanguageModelState]:
        """Returns the top state `[B, T, H]` after every token, and the last state. Padding holds the state."""
        keys = split(dropout_key, 2)
        segment = jnp.broadcast_to(at.segment, tokens.shape)
        # Padding may hold any number, and an index outside the table would be an error.
        embedded = self.embedding(jnp.where(segment != 0, tokens, jnp.zeros_like(tokens)))
        embedded, initial = drop(embedded, self.config.dropout_rate, keys[0]), self._start(tokens.shape[0])

        def advance(
            state: RecurrentLanguageModelState, token: tuple[Array, Array, Array]
        ) -> tuple[RecurrentLanguageModelState, Array]:
            index, vector, now = token
            # A key per step: one shared key would drop the same features at every step.
            key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            real = now != 0
            # The first token of a new segment starts from the initial state, so that packed documents stay independent.
            before = _select(real & (now != state.segment), initial, state.carries)
            features, after = self._advance(vector, before, key)
            # Padding does not end a text: remember the segment of the latest real token.
            last = jnp.where(real, now, state.segment)
            return RecurrentLanguageModelState(_select(real, after, state.carries), last), features

        steps = (jnp.arange(tokens.shape[1]), jnp.moveaxis(embedded, 1, 0), segment.T)
        state, features = jax.lax.scan(advance, state, steps)
        return jnp.moveaxis(features, 0, 1), state

    def _advance(
        self, x: Float[Array, "R E"], carries: tuple[Carry, ...], dropout_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "R H"], tuple[Carry, ...]]:
        """One step: returns the top state `[R, H]` and the next state of every layer."""
        moved = []
        keys = split(dropout_key, len(self.layers))
        for i, (layer, carry, key) in enumerate(zip(self.layers, carries, keys, strict=True)):
            # Dropout on the connections between layers only, never on the recurrent state (Zaremba 2014).
            carry, x = layer.step(carry, drop(x, self.config.dropout_rate, key) if i else x)
            moved.append(carry)
        return x, tuple(moved)

    def _logits(self, features: Float[Array, "*batch H"]) -> Float[Array, "*batch V"]:
        return self.embedding.logits(features) if self.output is None else self.output(features)


def _select(where: Array, new: tuple[Carry, ...], old: tuple[Carry, ...]) -> tuple[Carry, ...]:
    return jax.tree.map(lambda a, b: jnp.where(where[:, None], a, b), new, old)

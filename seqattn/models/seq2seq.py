"""The recurrent decoder and its encoder, without attention (Sutskever 2014) or with it (Bahdanau 2014; Luong 2015)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.hypotheses import Shared
from seqattn.models import position_encodings
from seqattn.models.attention_encoder import AttentionEncoder, SelfAttentionEncoder
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.key_value import KeyValue
from seqattn.nn.linear import Linear
from seqattn.nn.local_window import Monotonic, Predictive
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule
from seqattn.nn.recurrent import Carry, Cell, Direction, Recurrent, RecurrentEncoder
from seqattn.nn.scored_attention import Score, ScoredAttention
from seqattn.precision import accumulator
from seqattn.pytrees import pytree

RULES = (
    # Of a recurrent language model, too, and of the decoder of a captioner.
    ParameterRule("output/kernel", Kind.LOGITS, INTO),
    ParameterRule("decoder/output/kernel", Kind.LOGITS, INTO),
    ParameterRule("*combine/kernel", Kind.MATRIX, INTO),
)


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and choices of a recurrent encoder-decoder."""

    vocab_size: int
    """Tokens of the joint vocabulary of source and target."""
    embedding_dim: int = 256
    """Size of token vectors."""
    hidden_dim: int = 512
    """Size of recurrent states; an encoder that reads both ways gives each direction half."""
    num_layers: int = 1
    """Recurrent layers of the decoder, and of a recurrent encoder."""
    cell: Cell = Cell.GRU
    """The recurrence."""
    direction: Direction = Direction.BOTH
    """Which way a recurrent encoder reads."""
    attention: Score | None = Score.ADDITIVE
    """How alike a decoder and an encoder state are; None for a fixed context, the state to start from alone."""
    input_feeding: bool = True
    """Feed what was attended to into the next step (Luong 2015, section 3.3)."""
    dropout_rate: float = 0.1
    """Of token vectors, of layer inputs and of the vector before the logits."""
    local: Monotonic | Predictive | None = None
    """Look around one source position at a time (Luong 2015, section 3.2); None for the whole source."""
    attention_encoder: AttentionEncoder | None = None
    """Self attention that reads the source instead of recurrent layers; None for a recurrent encoder."""


@pytree
@dataclasses.dataclass(frozen=True)
class Seq2SeqMemory:
    """An encoded source.

    Attributes:
        key_value: encoder states to attend to, or None without attention.
        carries: the state `[B, H]` that the decoder starts from, a layer each: the last one of a recurrent encoder.
    """

    key_value: KeyValue | None
    carries: tuple[Carry, ...]


@pytree
@dataclasses.dataclass(frozen=True)
class Seq2SeqState:
    """The decoder between two steps, of one hypothesis a row or of several (R hypotheses of B rows).

    Attributes:
        carries: the decoder's state `[R, H]`, a layer each.
        attentional: what the last step attended to, combined with its state `[R, H]`; None without input feeding.
        weights: where the last step looked in the source, `[R, S]`; None without attention.
        position: how many tokens each hypothesis has seen, `[R]`.
        memory: encoder states `[B, S, 1, H]` to attend to, which all hypotheses of a row share, or None without
            attention.
    """

    carries: tuple[Carry, ...]
    attentional: Array | None
    weights: Array | None
    position: Array
    memory: Shared


class Seq2Seq(nnx.Module):
    """Encoder and recurrent decoder over one joint vocabulary.

    The decoder starts from the encoder's last state, or from the mean of all where the encoder is not recurrent. With
    attention, the decoder's top state `h` looks for a context `c` among the encoder states, and `tanh(W [c; h])` gives
    the logits (Luong 2015, equations 5 and 6). One function makes a step; training scans it over known targets. A row
    holds one text, with padding anywhere; packed texts would see each other.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    Raises:
        ValueError: input feeding or a local window without attention, or sizes that do not fit.

    >>> config = Seq2SeqConfig(vocab_size=11, embedding_dim=4, hidden_dim=6)
    >>> model = Seq2Seq(config, rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[5, 8, 9, 0]]), jnp.array([[1, 6, 3]])
    >>> memory = model.encode(source, Coordinates.from_lengths([3], 4))
    >>> model.decode(target, Coordinates.from_lengths([3], 3), memory).shape
    (1, 3, 11)
    """

    def __init__(self, config: Seq2SeqConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        if config.input_feeding and config.attention is None:
            raise ValueError("input_feeding feeds what was attended to: it needs an attention, got attention=None")
        if config.local is not None and config.attention is None:
            raise ValueError(f"local narrows an attention: it needs one, got attention=None and local={config.local}")
        self.config = config
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        hidden, embedded = config.hidden_dim, config.embedding_dim
        self.embedding = TokenEmbedding(config.vocab_size, embedded, **sizes)
        self.encoder = _encoder(config, sizes)
        first = embedded + hidden * config.input_feeding
        self.layers = nnx.List(
            [Recurrent(hidden if i else first, hidden, cell=config.cell, **sizes) for i in range(config.num_layers)]
        )
        score, local = config.attention, config.local
        self.attention = None if score is None else ScoredAttention(score, hidden, hidden, local=local, **sizes)
        self.combine = None if score is None else Linear(2 * hidden, hidden, **sizes)
        self.output = Linear(hidden, config.vocab_size, **sizes)

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Seq2SeqMemory:
        """The memory of source tokens `[B, S]` at their coordinates."""
        return self.encode_vectors(self._embed(source, source_at), source_at, dropout_key=dropout_key)

    def encode_vectors(
        self, x: Float[Array, "B S E"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Seq2SeqMemory:
        """The memory of a source of vectors `[B, S, E]` in place of tokens: parts of an image, frames of speech."""
        keys = split(dropout_key, 2)
        x = drop(x, self.config.dropout_rate, keys[0])
        outputs, carries = self.encoder(x, source_at, dropout_key=keys[1])
        key_value = None if self.attention is None else self.attention.project(outputs, source_at)
        return Seq2SeqMemory(key_value, tuple(carries))

    def decode(
        self,
        target: Int[Array, "B T"],
        target_at: Coordinates,
        memory: Seq2SeqMemory,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits `[B, T, V]` of the token after each of `target` `[B, T]`."""
        keys = split(dropout_key, 2)
        features, _, _ = self._unroll(target, target_at, self.start(memory, target.shape[1]), keys[0])
        return self.output(drop(features, self.config.dropout_rate, keys[1]))

    def room(self, source_length: int) -> int | None:
        """None for any number of target tokens, or 0 where a source of so many has no learned position for each."""
        encoder = self.config.attention_encoder
        limit = None if encoder is None else position_encodings.limit(encoder.positions)
        return None if limit is None or source_length <= limit else 0

    def start(self, memory: Seq2SeqMemory, max_length: int) -> Seq2SeqState:
        """The state before the first step; `max_length` sets no limit here, since the state does not grow."""
        del max_length
        hidden = jax.tree.leaves(memory.carries)[0]
        attentional = jnp.zeros_like(hidden) if self.config.input_feeding else None
        seen = memory.key_value
        weights = None if seen is None else jnp.zeros(seen.at.shape, accumulator(seen.key.dtype))
        position = jnp.zeros(hidden.shape[:1], jnp.int32)
        return Seq2SeqState(memory.carries, attentional, weights, position, Shared(seen))

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: Seq2SeqState
    ) -> tuple[Float[Array, "B T V"], Seq2SeqState]:
        """Many target tokens at once: the logits after each of `tokens` `[B, T]`, and the state after the last.

        Row i has `lengths[i]` tokens and then padding, which is stepped over. A text may come in pieces of any size.

        Raises:
            ValueError: the state has several hypotheses a row.
        """
        rows, hypotheses = tokens.shape[0], state.position.shape[0]
        if hypotheses != rows:
            raise ValueError(f"prefill before branching: {rows} rows of tokens, {hypotheses} hypotheses in the state")
        at = Coordinates.from_lengths(lengths, tokens.shape[1])
        features, _, state = self._unroll(tokens, at, state, None)
        return self.output(features), state

    def step(self, tokens: Int[Array, "R"], state: Seq2SeqState) -> tuple[Float[Array, "R V"], Seq2SeqState]:
        """Logits `[R, V]` of the token after `tokens` `[R]`, and the next state."""
        features, state = self._advance(self.embedding(tokens), state, None)
        return self.output(features), state

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: Seq2SeqMemory
    ) -> Float[Array, "B L T S"]:
        """Where each target token looks in the source, `[B, 1, T, S]`; `[B, 0, T, 0]` without attention."""
        _, weights, _ = self._unroll(target, target_at, self.start(memory, target.shape[1]), None)
        return jnp.zeros((target.shape[0], 0, target.shape[1], 0)) if weights is None else weights[:, None]

    def _embed(self, tokens: Array, at: Coordinates) -> Array:
        """Token vectors; what padding holds is not looked up."""
        real = jnp.broadcast_to(at.segment, tokens.shape) != 0
        return self.embedding(jnp.where(real, tokens, jnp.zeros_like(tokens)))

    def _unroll(
        self, target: Array, target_at: Coordinates, state: Seq2SeqState, dropout_key: PRNGKeyArray | None
    ) -> tuple[Array, Array | None, Seq2SeqState]:
        """Features `[B, T, H]` and weights `[B, T, S]` of every target token, one step after the other; the last state.

        Padding is stepped over, wherever it is: the state is held.
        """
        keys = split(dropout_key, 2)
        embedded = drop(self._embed(target, target_at), self.config.dropout_rate, keys[0])
        real = jnp.broadcast_to(target_at.segment, target.shape) != 0

        def advance(state: Seq2SeqState, token: tuple[Array, Array, Array]) -> tuple[Seq2SeqState, tuple]:
            index, vector, present = token
            key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            features, moved = self._advance(vector, state, key)
            carries, attentional, weights, position = jax.tree.map(
                lambda new, old: jnp.where(present if new.ndim == 1 else present[:, None], new, old),
                (moved.carries, moved.attentional, moved.weights, moved.position),
                (state.carries, state.attentional, state.weights, state.position),
            )
            return Seq2SeqState(carries, attentional, weights, position, state.memory), (features, moved.weights)

        steps = (jnp.arange(target.shape[1]), jnp.moveaxis(embedded, 1, 0), real.T)
        state, results = jax.lax.scan(advance, state, steps)
        features, weights = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), results)
        return features, weights, state

    def _advance(
        self, embedded: Float[Array, "R E"], state: Seq2SeqState, dropout_key: PRNGKeyArray | None
    ) -> tuple[Array, Seq2SeqState]:
        """One step: features `[R, H]` and the next state."""
        x = embedded if state.attentional is None else jnp.concatenate([embedded, state.attentional], axis=-1)
        carries = []
        for i, (layer, carry, key) in enumerate(
            zip(self.layers, state.carries, split(dropout_key, len(self.layers)), strict=True)
        ):
            carry, x = layer.step(carry, drop(x, self.config.dropout_rate, key) if i else x)
            carries.append(carry)
        features, weights = self._look(x, state.position, state.memory.value)
        attentional = None if state.attentional is None else features
        return features, Seq2SeqState(tuple(carries), attentional, weights, state.position + 1, state.memory)

    def _look(
        self, query: Float[Array, "R H"], position: Int[Array, "R"], memory: KeyValue | None
    ) -> tuple[Array, Array | None]:
        """The decoder's top state combined with its context, and the weights; the state itself without attention.

        The hypotheses of a row look side by side, as queries of one row.
        """
        if self.attention is None or self.combine is None or memory is None:
            return query, None
        rows = memory.at.shape[0]
        hypotheses = query.shape[0] // rows if rows else 1
        queries = query.reshape(rows, hypotheses, query.shape[-1])
        now = Coordinates(position.reshape(queries.shape[:2]), jnp.ones(queries.shape[:2], jnp.int32))
        context, weights = self.attention(queries, now, memory)
        combined = self.combine(jnp.concatenate([context.reshape(query.shape), query], axis=-1))
        return jnp.tanh(combined), weights.reshape(query.shape[0], weights.shape[-1])


def _encoder(config: Seq2SeqConfig, sizes: dict[str, Any]) -> RecurrentEncoder | SelfAttentionEncoder:
    """What reads the source: states `[B, S, H]`, and the state that each layer of the decoder starts from."""
    sizes = sizes | {"input_dim": config.embedding_dim, "hidden_dim": config.hidden_dim}
    options: dict[str, Any] = {"num_layers": config.num_layers, "cell": config.cell}
    options |= {"dropout_rate": config.dropout_rate}
    if config.attention_encoder is not None:
        return SelfAttentionEncoder(config.attention_encoder, **options, **sizes)
    return RecurrentEncoder(direction=config.direction, **options, **sizes)

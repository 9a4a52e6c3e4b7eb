"""Recurrent encoder-decoder, without attention (Sutskever 2014) or with it (Bahdanau 2014; Luong 2015)."""

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
    # These also match a recurrent language model and the decoder of a captioner.
    ParameterRule("output/kernel", Kind.LOGITS, INTO),
    ParameterRule("decoder/output/kernel", Kind.LOGITS, INTO),
    ParameterRule("*combine/kernel", Kind.MATRIX, INTO),
)


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and choices of a recurrent encoder-decoder."""

    vocab_size: int
    """V, the number of tokens of the joint vocabulary of source and target."""
    embedding_dim: int = 256
    """E, the size of token vectors."""
    hidden_dim: int = 512
    """H, the size of recurrent states. A bidirectional encoder gives each direction half."""
    num_layers: int = 1
    """Number of recurrent layers of the decoder, and of a recurrent encoder."""
    cell: Cell = Cell.GRU
    """The recurrent cell."""
    direction: Direction = Direction.BOTH
    """Reading direction of a recurrent encoder."""
    attention: Score | None = Score.ADDITIVE
    """Score of a decoder and an encoder state. If None, the decoder sees only its initial state (Sutskever 2014)."""
    input_feeding: bool = True
    """If True, feeds the attentional vector into the next step (Luong 2015, section 3.3). Requires `attention`."""
    dropout_rate: float = 0.1
    """Dropout rate of token vectors, layer inputs and the vector before the logits, in [0, 1)."""
    local: Monotonic | Predictive | None = None
    """If given, attends to a window of the source (Luong 2015, section 3.2). If None, to the whole source."""
    attention_encoder: AttentionEncoder | None = None
    """If given, self-attention encodes the source. If None, recurrent layers do."""


@pytree
@dataclasses.dataclass(frozen=True)
class Seq2SeqMemory:
    """An encoded source.

    Attributes:
        key_value: encoder states to attend to; None without attention.
        carries: the initial state `[B, H]` of each decoder layer: the last state of a recurrent encoder.
    """

    key_value: KeyValue | None
    carries: tuple[Carry, ...]


@pytree
@dataclasses.dataclass(frozen=True)
class Seq2SeqState:
    """State of the decoder between two steps, for B rows with R hypotheses in all.

    Attributes:
        carries: the state `[R, H]` of each decoder layer.
        attentional: `[R, H]`, the attentional vector of the last step (Luong 2015, equation 5); None without input
            feeding.
        weights: `[R, S]`, the attention weights of the last step; None without attention.
        position: `[R]`, the number of tokens that each hypothesis has read.
        memory: encoder states `[B, S, 1, H]`, shared by all hypotheses of a row; None without attention.
    """

    carries: tuple[Carry, ...]
    attentional: Array | None
    weights: Array | None
    position: Array
    memory: Shared


class Seq2Seq(nnx.Module):
    """Encoder and recurrent decoder over one joint vocabulary.

    The decoder starts from the last state of a recurrent encoder, or from the mean state of any other encoder. With
    attention, the decoder's top state `h` attends to the encoder states, which gives the context `c`. Then `tanh(W [c;
    h])` is the attentional vector, from which the logits are computed (Luong 2015, equations 5 and 6). One function
    makes a step, and training scans it over known targets. Each row holds one text, with padding anywhere. Packed
    documents are not supported: they would see each other.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: `input_feeding` or `local` without `attention`, or sizes do not fit.

    >>> config = Seq2SeqConfig(vocab_size=11, embedding_dim=4, hidden_dim=6)
    >>> model = Seq2Seq(config, rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[5, 8, 9, 0]]), jnp.array([[1, 6, 3]])
    >>> memory = model.encode(source, Coordinates.from_lengths([3], 4))
    >>> model.decode(target, Coordinates.from_lengths([3], 3), memory).shape
    (1, 3, 11)
    """

    def __init__(self, config: Seq2SeqConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        if config.input_feeding and config.attention is None:
            raise ValueError("input_feeding feeds the attentional vector: it needs an attention, got attention=None")
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
        """Encodes source tokens `[B, S]` at their coordinates. Without a dropout key, nothing is dropped."""
        return self.encode_vectors(self._embed(source, source_at), source_at, dropout_key=dropout_key)

    def encode_vectors(
        self, x: Float[Array, "B S E"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Seq2SeqMemory:
        """Encodes a source of vectors `[B, S, E]` in place of tokens, such as image patches or frames of speech."""
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
        """Computes logits `[B, T, V]` with known targets. See `EncoderDecoder.decode`."""
        keys = split(dropout_key, 2)
        features, _, _ = self._unroll(target, target_at, self.start(memory, target.shape[1]), keys[0])
        return self.output(drop(features, self.config.dropout_rate, keys[1]))

    def room(self, source_length: int) -> int | None:
        """Returns None: the number of target tokens is unlimited.

        Returns 0 if the source has more tokens than the attention encoder has learned positions.
        """
        encoder = self.config.attention_encoder
        limit = None if encoder is None else position_encodings.limit(encoder.positions)
        return None if limit is None or source_length <= limit else 0

    def start(self, memory: Seq2SeqMemory, max_length: int) -> Seq2SeqState:
        """Returns the state before the first step. `max_length` is ignored, since the state does not grow."""
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
        """Reads many target tokens at once. See `EncoderDecoder.prefill`."""
        rows, hypotheses = tokens.shape[0], state.position.shape[0]
        if hypotheses != rows:
            raise ValueError(f"prefill before branching: {rows} rows of tokens, {hypotheses} hypotheses in the state")
        at = Coordinates.from_lengths(lengths, tokens.shape[1])
        features, _, state = self._unroll(tokens, at, state, None)
        return self.output(features), state

    def step(self, tokens: Int[Array, "R"], state: Seq2SeqState) -> tuple[Float[Array, "R V"], Seq2SeqState]:
        """Reads tokens `[R]`. Returns logits `[R, V]` of the next token, and the next state."""
        features, state = self._advance(self.embedding(tokens), state, None)
        return self.output(features), state

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: Seq2SeqMemory
    ) -> Float[Array, "B L T S"]:
        """Returns the attention weights from target to source, `[B, 1, T, S]`; `[B, 0, T, 0]` without attention."""
        _, weights, _ = self._unroll(target, target_at, self.start(memory, target.shape[1]), None)
        return jnp.zeros((target.shape[0], 0, target.shape[1], 0)) if weights is None else weights[:, None]

    def _embed(self, tokens: Array, at: Coordinates) -> Array:
        """Looks up token vectors. Does not look up padding, which may hold any number."""
        real = jnp.broadcast_to(at.segment, tokens.shape) != 0
        return self.embedding(jnp.where(real, tokens, jnp.zeros_like(tokens)))

    def _unroll(
        self, target: Array, target_at: Coordinates, state: Seq2SeqState, dropout_key: PRNGKeyArray | None
    ) -> tuple[Array, Array | None, Seq2SeqState]:
        """Runs the decoder over known targets.

        Returns:
            Features `[B, T, H]` and attention weights `[B, T, S]` of every target token, and the last state. Padding
            holds the state.
        """
        keys = split(dropout_key, 2)
        embedded = drop(self._embed(target, target_at), self.config.dropout_rate, keys[0])
        real = jnp.broadcast_to(target_at.segment, target.shape) != 0

        def advance(state: Seq2SeqState, token: tuple[Array, Array, Array]) -> tuple[Seq2SeqState, tuple]:
            index, vector, present = token
            # A key per step: one shared key would drop the same features at every step.
            key = None if keys[1] is None else jax.random.fold_in(keys[1], index)
            features, moved = self._advance(vector, state, key)
            # All rows step together. A row at padding keeps its state, so that padding may be anywhere in a target.
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
        """One step: returns features `[R, H]` and the next state."""
        # Input feeding tells the decoder which source positions it has attended to (Luong 2015, section 3.3).
        x = embedded if state.attentional is None else jnp.concatenate([embedded, state.attentional], axis=-1)
        carries = []
        for i, (layer, carry, key) in enumerate(
            zip(self.layers, state.carries, split(dropout_key, len(self.layers)), strict=True)
        ):
            # Dropout on the connections between layers only, never on the recurrent state (Zaremba 2014).
            carry, x = layer.step(carry, drop(x, self.config.dropout_rate, key) if i else x)
            carries.append(carry)
        features, weights = self._look(x, state.position, state.memory.value)
        attentional = None if state.attentional is None else features
        return features, Seq2SeqState(tuple(carries), attentional, weights, state.position + 1, state.memory)

    def _look(
        self, query: Float[Array, "R H"], position: Int[Array, "R"], memory: KeyValue | None
    ) -> tuple[Array, Array | None]:
        """Attends to the source and combines the context with the decoder's top state (Luong 2015, equation 5).

        Returns:
            The attentional vector `[R, H]` and the weights `[R, S]`. Without attention, the query and None.
        """
        if self.attention is None or self.combine is None or memory is None:
            return query, None
        rows = memory.at.shape[0]
        # The hypotheses of a row become queries of one row, so that they share its memory without a copy.
        hypotheses = query.shape[0] // rows if rows else 1
        queries = query.reshape(rows, hypotheses, query.shape[-1])
        # Position is the decoder step, which `Monotonic` windows follow.
        now = Coordinates(position.reshape(queries.shape[:2]), jnp.ones(queries.shape[:2], jnp.int32))
        context, weights = self.attention(queries, now, memory)
        combined = self.combine(jnp.concatenate([context.reshape(query.shape), query], axis=-1))
        return jnp.tanh(combined), weights.reshape(query.shape[0], weights.shape[-1])


def _encoder(config: Seq2SeqConfig, sizes: dict[str, Any]) -> RecurrentEncoder | SelfAttentionEncoder:
    """Builds the encoder. It returns states `[B, S, H]`, and the initial state of each decoder layer."""
    sizes = sizes | {"input_dim": config.embedding_dim, "hidden_dim": config.hidden_dim}
    options: dict[str, Any] = {"num_layers": config.num_layers, "cell": config.cell}
    options |= {"dropout_rate": config.dropout_rate}
    if config.attention_encoder is not None:
        return SelfAttentionEncoder(config.attention_encoder, **options, **sizes)
    return RecurrentEncoder(direction=config.direction, **options, **sizes)

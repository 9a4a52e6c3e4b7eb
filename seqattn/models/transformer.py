"""Transformer encoder-decoder (Vaswani 2017)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_integer, check_number, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.hypotheses import Shared
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.models import position_encodings
from seqattn.models.block_masks import BlockMasks
from seqattn.models.layer_loop import run_layers
from seqattn.models.position_encodings import Positions, PositionScores, Sinusoidal
from seqattn.nn.blocks import BlockConfig, DecoderBlock, EncoderBlock
from seqattn.nn.cache import Cache, RingCache, StaticCache
from seqattn.nn.embedding import TokenEmbedding
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.nn.linear import Linear
from seqattn.pytrees import pytree
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of an encoder-decoder Transformer. The defaults are the base model of Vaswani 2017."""

    vocab_size: int
    """V, the number of tokens of the joint vocabulary of source and target."""
    num_encoder_layers: int = 6
    """Number of encoder blocks; at least 0."""
    num_decoder_layers: int = 6
    """Number of decoder blocks; at least 1."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """Position encoding. If None, only the causal mask carries information about order."""
    share_embeddings: bool = True
    """If True, source, target and logits share one table. If False, the source has its own table."""
    logits_bias: bool = False
    """If True, adds a trained bias for each token to the logits."""
    decoder_window: int | None = None
    """Number of latest target tokens that a target token sees, including itself. If None, it sees all."""
    decoder_block: BlockConfig | None = None
    """Sizes and choices of the decoder's blocks. If None, those of `block`; `model_dim` must be the same."""
    embedding_scale: float | None = None
    """Factor of token vectors. If None, `sqrt(model_dim)` (Vaswani 2017, section 3.4)."""
    norm_embedding: bool = False
    """If True, a norm after token and position vectors are added (BART: Lewis 2020)."""
    tie_logits: bool = True
    """If False, logits have a table of their own, in place of that of the target tokens."""
    logits_scale: float = 1.0
    """Factor of the vectors from which logits are computed. T5 has `model_dim ** -0.5` (Raffel 2020)."""

    @classmethod
    def base(cls, vocab_size: int) -> "TransformerConfig":
        """The base model of Vaswani 2017, table 3.

        It has 63,045,632 parameters with 37,000 tokens, the vocabulary of section 5.1. The paper reports 65 million and
        does not say what it counts.
        """
        return cls(vocab_size)

    @classmethod
    def big(cls, vocab_size: int) -> "TransformerConfig":
        """The big model of Vaswani 2017, table 3.

        It has 214,171,648 parameters with 37,000 tokens. The paper reports 213 million.
        """
        return cls(vocab_size, block=BlockConfig(model_dim=1024, hidden_dim=4096, num_heads=16, dropout_rate=0.3))


@pytree
@dataclasses.dataclass(frozen=True)
class TransformerMemory:
    """An encoded source.

    Attributes:
        key_values: keys and values `[B, S, K, H]` for each decoder block.
        segment: `[B]`, the segment of each row's text, in which step-by-step decoding continues; 1 for an empty source.
    """

    key_values: tuple[KeyValue, ...]
    segment: Array


@pytree
@dataclasses.dataclass(frozen=True)
class TransformerState:
    """State of the decoder between two steps, for B rows with R hypotheses in all.

    Attributes:
        caches: for each decoder block, the keys and values of the target tokens so far.
        memory: for each decoder block, the keys and values of the source; and the segment `[B]`. All hypotheses of a
            row share it.
        position: `[R]`, the number of tokens that each hypothesis has read.
    """

    caches: tuple[Cache, ...]
    memory: Shared
    position: Array


class Transformer(nnx.Module):
    """Encoder-decoder Transformer over one joint vocabulary (Vaswani 2017, figure 1).

    A token attends within its own segment: to all tokens in the encoder, to no later token in the decoder, and from the
    decoder to all source tokens with the same segment number. So no token sees padding, and packed pairs of texts do
    not mix.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: sizes do not fit, such as heads that do not divide `model_dim` or an odd size for sines or
            rotations, or `model_dim` of encoder and decoder differ.

    >>> block = BlockConfig(model_dim=6, hidden_dim=8, num_heads=2)
    >>> config = TransformerConfig(vocab_size=11, num_encoder_layers=1, num_decoder_layers=1, block=block)
    >>> model = Transformer(config, rngs=nnx.Rngs(0))
    >>> source, target = jnp.array([[5, 8, 9, 0]]), jnp.array([[1, 6, 3]])
    >>> memory = model.encode(source, Coordinates.from_lengths([3], 4))
    >>> model.decode(target, Coordinates.from_lengths([3], 3), memory).shape
    (1, 3, 11)
    """

    def __init__(self, config: TransformerConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config, positions, dim = config, config.positions, config.block.model_dim
        check_integer("num_encoder_layers", config.num_encoder_layers, 0)
        check_sizes(num_decoder_layers=config.num_decoder_layers)
        position_encodings.check_positions(positions, dim)
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        rotary = position_encodings.rotary(positions)
        self.decoder_block = decoder_block = config.block if config.decoder_block is None else config.decoder_block
        if decoder_block.model_dim != dim:
            raise ValueError(
                f"model_dim of decoder_block ({decoder_block.model_dim}) must be that of block ({dim}): the decoder "
                "reads the encoder's vectors"
            )
        check_number("logits_scale", config.logits_scale)
        scaled: dict[str, Any] = {"scale": config.embedding_scale, **sizes}
        self.embedding = TokenEmbedding(config.vocab_size, dim, **scaled)
        self.source_embedding = None if config.share_embeddings else TokenEmbedding(config.vocab_size, dim, **scaled)
        self.source_positions = position_encodings.table(positions, dim, **sizes)
        self.target_positions = position_encodings.table(positions, dim, **sizes)
        self.encoder = nnx.List(
            [
                EncoderBlock(config.block, mask=SameSegment(), rotary=rotary, **sizes)
                for _ in range(config.num_encoder_layers)
            ]
        )
        self.source_norm = config.block.embedding_norm(**sizes) if config.norm_embedding else None
        self.target_norm = decoder_block.embedding_norm(**sizes) if config.norm_embedding else None
        window = config.decoder_window
        within = Causal() & SameSegment() if window is None else SlidingWindow(window) & SameSegment()
        masks: dict[str, Any] = {"mask": within, "memory_mask": SameSegment()}
        self.decoder = nnx.List(
            [DecoderBlock(decoder_block, **masks, rotary=rotary, **sizes) for _ in range(config.num_decoder_layers)]
        )
        self.encoder_scores = _scores(positions, config.num_encoder_layers, config.block, bidirectional=True, **sizes)
        self.decoder_scores = _scores(positions, config.num_decoder_layers, decoder_block, bidirectional=False, **sizes)
        # With pre-norm blocks, nothing has normalised the output of the last block (Xiong 2020).
        self.encoder_norm = config.block.norm(**sizes) if config.block.norm_first else None
        self.decoder_norm = decoder_block.norm(**sizes) if decoder_block.norm_first else None
        self.output = None if config.tie_logits else Linear(dim, config.vocab_size, use_bias=False, **sizes)
        self.logits_bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype)) if config.logits_bias else None

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> TransformerMemory:
        """Encodes source tokens `[B, S]` at their coordinates. Without a dropout key, nothing is dropped."""
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        x = position_encodings.embed(embedding, self.source_positions, self.config.positions, source, source_at)
        x = x if self.source_norm is None else self.source_norm(x)
        return self.encode_vectors(x, source_at, dropout_key=dropout_key)

    def encode_vectors(
        self, x: Float[Array, "B S D"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> TransformerMemory:
        """Encodes a source of vectors in place of tokens, such as image patches or frames of speech.

        Args:
            x: vectors `[B, S, D]`, with position vectors already added and normalised. Padding must be finite.
            source_at: their coordinates.
            dropout_key: if None, nothing is dropped.

        Returns:
            The memory for `decode`, `start` and `alignment`.
        """
        keys = split(dropout_key, 1 + len(self.encoder))
        x = drop(x, self.config.block.dropout_rate, keys[0])

        mods = [self.encoder_scores.of(layer) for layer in range(len(self.encoder))]
        attentions = [block.attention for block in self.encoder]
        masks = BlockMasks.of(zip(attentions, mods, strict=True), x, source_at)

        def call(x: Array, block: EncoderBlock, score_mod: ScoreMod | None, key: Array | None) -> Array:
            shared = masks.get(block.attention)
            return block(x, source_at, score_mod=score_mod, block_mask=shared, dropout_key=key)

        layers = list(zip(self.encoder, mods, keys[1:], strict=True))
        x = run_layers(call, x, layers, **_training(self.config.block))
        x = x if self.encoder_norm is None else self.encoder_norm(x)
        rows = jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), source_at)
        # The source does not change while decoding, so its keys and values are computed once per source, not once per
        # step.
        memories = tuple(block.remember(x, source_at) for block in self.decoder)
        return TransformerMemory(memories, rows.next().segment[:, 0])

    def decode(
        self,
        target: Int[Array, "B T"],
        target_at: Coordinates,
        memory: TransformerMemory,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes logits `[B, T, V]` with known targets. See `EncoderDecoder.decode`."""
        keys = split(dropout_key, 1 + len(self.decoder))
        x = self._embed(target, target_at, keys[0])

        mods = [self.decoder_scores.of(layer) for layer in range(len(self.decoder))]
        attentions = [block.attention for block in self.decoder]
        own = BlockMasks.of(zip(attentions, mods, strict=True), x, target_at)
        # All layers read the same source, so their keys have the coordinates of the first.
        source_at = memory.key_values[0].at if memory.key_values else None
        cross = BlockMasks.of(((block.memory_attention, None) for block in self.decoder), x, target_at, source_at)

        def call(
            x: Array, block: DecoderBlock, memory: KeyValue, score_mod: ScoreMod | None, key: Array | None
        ) -> Array:
            shared = own.get(block.attention), cross.get(block.memory_attention)
            options: dict[str, Any] = dict(zip(("block_mask", "memory_block_mask"), shared, strict=True))
            kv = block.project(x, target_at)
            return block(x, target_at, kv, memory, score_mod=score_mod, **options, dropout_key=key)

        layers = list(zip(self.decoder, memory.key_values, mods, keys[1:], strict=True))
        return self._logits(run_layers(call, x, layers, **_training(self.decoder_block)))

    def room(self, source_length: int) -> int | None:
        """Returns how many target tokens fit after a source of `source_length` tokens.

        None if positions are not learned. If they are, their number; or 0 if the source has more tokens than positions.
        """
        limit = position_encodings.limit(self.config.positions)
        return limit if limit is None or source_length <= limit else 0

    def start(self, memory: TransformerMemory, max_length: int) -> TransformerState:
        """Returns the state before the first step, with room for `max_length` tokens per row.

        Each row holds one text, not packed documents. With `decoder_window` the caches hold only the window, and
        `max_length` sets no limit.
        """
        (batch,) = memory.segment.shape

        def cache(like: KeyValue) -> Cache:
            sizes: dict[str, Any] = {"num_kv_heads": like.key.shape[2], "head_dim": like.key.shape[3]}
            sizes |= {"dtype": like.key.dtype}
            if self.config.decoder_window is not None:
                return RingCache.empty(batch, self.config.decoder_window, **sizes)
            return StaticCache.empty(batch, max_length, **sizes)

        caches = tuple(cache(key_value) for key_value in memory.key_values)
        seen = tuple(KeyColumns.of(key_value) for key_value in memory.key_values)
        return TransformerState(caches, Shared((seen, memory.segment)), jnp.zeros(batch, jnp.int32))

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: TransformerState
    ) -> tuple[Float[Array, "B T V"], TransformerState]:
        """Reads many target tokens at once. See `EncoderDecoder.prefill`."""
        if state.caches[0].beams > 1:
            raise ValueError(f"prefill before branching: the state has {state.caches[0].beams} hypotheses per row")
        new = Coordinates.from_lengths(lengths, tokens.shape[1])
        # Padding keeps segment 0, so no token sees it.
        at = Coordinates(state.position[:, None] + new.position, state.memory.value[1][:, None] * new.segment)
        logits, caches = self._continue(tokens, at, state)
        return logits, TransformerState(caches, state.memory, state.position + jnp.asarray(lengths, jnp.int32))

    def step(self, tokens: Int[Array, "R"], state: TransformerState) -> tuple[Float[Array, "R V"], TransformerState]:
        """Reads one token per hypothesis. The hypotheses of a row share its memory and its cache.

        Args:
            tokens: `[R]`.
            state: the state before these tokens.

        Returns:
            Logits `[R, V]` of the token after `tokens`, and the next state.

        Raises:
            ValueError: R is not the number of hypotheses of the state, or the caches are full. Inside `jit`, where full
                caches cannot raise, the logits are NaN.
        """
        segment = state.memory.value[1]
        # The hypotheses of a row are queries of one batch row, so that they share its memory and its cache without
        # copies.
        beams = (segment.shape[0], state.caches[0].beams)
        if tokens.shape[0] != beams[0] * beams[1]:
            raise ValueError(f"the state has {beams[0]} rows of {beams[1]} hypotheses, got {tokens.shape[0]} tokens")
        position = state.position.reshape(beams)
        at = Coordinates(position, jnp.broadcast_to(segment[:, None], position.shape))
        logits, caches = self._continue(tokens.reshape(beams), at, state)
        state = TransformerState(caches, state.memory, state.position + 1)
        return logits.reshape(*tokens.shape, logits.shape[-1]), state

    def _continue(
        self, tokens: Int[Array, "B T"], at: Coordinates, state: TransformerState
    ) -> tuple[Float[Array, "B T V"], tuple[Cache, ...]]:
        """Appends tokens to the caches. Returns the logits after them and the next caches."""
        x = self._embed(tokens, at, None)
        caches = []
        layers = zip(self.decoder, state.caches, state.memory.value[0], strict=True)
        for layer, (block, cache, memory) in enumerate(layers):
            # Append first: a token also attends to itself.
            cache, seen = cache.append(block.project(x, at))
            x = block(x, at, seen, memory, score_mod=self.decoder_scores.of(layer))
            caches.append(cache)
        return self._logits(x), tuple(caches)

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: TransformerMemory
    ) -> Float[Array, "B L T S"]:
        """Returns the cross-attention weights of every head of every decoder block, `[B, layers * N, T, S]`."""
        x = self._embed(target, target_at, None)
        weights = []
        for layer, (block, key_value) in enumerate(zip(self.decoder, memory.key_values, strict=True)):
            kv, score_mod = block.project(x, target_at), self.decoder_scores.of(layer)
            weights.append(block.weights(x, target_at, kv, key_value, score_mod=score_mod))
            x = block(x, target_at, kv, key_value, score_mod=score_mod)
        return jnp.concatenate(weights, axis=1)

    def _embed(self, tokens: Array, at: Coordinates, dropout_key: PRNGKeyArray | None) -> Array:
        """Returns the vectors of target tokens, from which the decoder starts."""
        x = position_encodings.embed(self.embedding, self.target_positions, self.config.positions, tokens, at)
        x = x if self.target_norm is None else self.target_norm(x)
        return drop(x, self.decoder_block.dropout_rate, dropout_key)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        x = x if self.config.logits_scale == 1 else x * jnp.asarray(self.config.logits_scale, x.dtype)
        logits = self.embedding.logits(x) if self.output is None else self.output(x)
        return logits if self.logits_bias is None else logits + self.logits_bias[...].astype(logits.dtype)[None, None]


def _scores(positions: Positions, num_layers: int, block: BlockConfig, **options: Any) -> PositionScores:
    """Builds the score modifications of a stack of these blocks."""
    heads: dict[str, Any] = {"num_heads": block.num_heads, "head_dim": block.head_dim}
    return PositionScores(positions, num_layers, **heads, soft_cap=block.attention_soft_cap, **options)


def _training(block: BlockConfig) -> dict[str, bool]:
    return {"remat": block.remat, "scan": block.scan_layers}

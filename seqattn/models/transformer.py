"""The Transformer encoder-decoder (Vaswani 2017)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.checks import check_integer, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.hypotheses import Shared
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.models import position_encodings
from seqattn.models.layer_loop import run_layers
from seqattn.models.position_encodings import Positions, PositionScores, Sinusoidal
from seqattn.nn.blocks import BlockConfig, DecoderBlock, EncoderBlock
from seqattn.nn.cache import Cache, RingCache, StaticCache
from seqattn.nn.embedding import PositionEmbedding, TokenEmbedding
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.pytrees import pytree
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of an encoder-decoder Transformer; the defaults are the base model of Vaswani 2017."""

    vocab_size: int
    """Tokens of the joint vocabulary of source and target."""
    num_encoder_layers: int = 6
    """Blocks of the encoder."""
    num_decoder_layers: int = 6
    """Blocks of the decoder."""
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    """Sizes and choices of every block."""
    positions: Positions = Sinusoidal()
    """How the order of tokens enters; None for not at all."""
    share_embeddings: bool = True
    """One table for source tokens, target tokens and logits; else one for the source, one for target and logits."""
    logits_bias: bool = False
    """A trained number for each token, added to its logits."""
    decoder_window: int | None = None
    """A target token sees so many of the latest target tokens, itself included; None for all of them."""

    @classmethod
    def base(cls, vocab_size: int) -> "TransformerConfig":
        """The base model of Vaswani 2017, table 3, which says 65 million parameters.

        Here they are 63,045,632 with 37,000 tokens, the size of the vocabulary of its section 5.1; the paper does not
        say what it counts.
        """
        return cls(vocab_size)

    @classmethod
    def big(cls, vocab_size: int) -> "TransformerConfig":
        """The big model of Vaswani 2017, table 3, which says 213 million parameters: 214,171,648 here, as above."""
        return cls(vocab_size, block=BlockConfig(model_dim=1024, hidden_dim=4096, num_heads=16, dropout_rate=0.3))


@pytree
@dataclasses.dataclass(frozen=True)
class TransformerMemory:
    """An encoded source.

    Attributes:
        key_values: keys and values for each decoder block, `[B, S, K, H]`.
        segment: the segment of each row's text, which a target made step by step continues in, `[B]`; 1 for an empty
            source.
    """

    key_values: tuple[KeyValue, ...]
    segment: Array


@pytree
@dataclasses.dataclass(frozen=True)
class TransformerState:
    """The decoder between two steps, of one hypothesis a row or of several (R hypotheses of B rows).

    Attributes:
        caches: keys and values of the tokens so far, for each decoder block.
        memory: what each decoder block sees of the source, and the segment `[B]` of the text: all hypotheses of a row
            share it.
        position: how many tokens each hypothesis has seen, `[R]`.
    """

    caches: tuple[Cache, ...]
    memory: Shared
    position: Array


class Transformer(nnx.Module):
    """Encoder-decoder Transformer over one joint vocabulary.

    A token sees the tokens of its own segment: in the encoder all, in the decoder none after itself, and from decoder
    to encoder all of the source of the same segment number. So padding is seen by nobody, and packed pairs of texts
    do not mix.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    Raises:
        ValueError: sizes that do not fit (heads, odd dims for sines or rotations).

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
        rotary_base = position_encodings.rotary_base(positions)
        self.embedding = TokenEmbedding(config.vocab_size, dim, **sizes)
        self.source_embedding = None if config.share_embeddings else TokenEmbedding(config.vocab_size, dim, **sizes)
        self.source_positions = position_encodings.table(positions, dim, **sizes)
        self.target_positions = position_encodings.table(positions, dim, **sizes)
        self.encoder = nnx.List(
            [
                EncoderBlock(config.block, mask=SameSegment(), rotary_base=rotary_base, **sizes)
                for _ in range(config.num_encoder_layers)
            ]
        )
        window = config.decoder_window
        within = Causal() & SameSegment() if window is None else SlidingWindow(window) & SameSegment()
        masks: dict[str, Any] = {"mask": within, "memory_mask": SameSegment()}
        self.decoder = nnx.List(
            [
                DecoderBlock(config.block, **masks, rotary_base=rotary_base, **sizes)
                for _ in range(config.num_decoder_layers)
            ]
        )
        heads: dict[str, Any] = {"num_heads": config.block.num_heads, "head_dim": config.block.head_dim}
        layers = (config.num_encoder_layers, config.num_decoder_layers)
        self.encoder_scores = PositionScores(positions, layers[0], **heads, bidirectional=True, **sizes)
        self.decoder_scores = PositionScores(positions, layers[1], **heads, bidirectional=False, **sizes)
        # With the norm first the sum that leaves the last block was never normalised (Xiong 2020).
        final = config.block.norm_first
        self.encoder_norm = config.block.norm(**sizes) if final else None
        self.decoder_norm = config.block.norm(**sizes) if final else None
        self.logits_bias = nnx.Param(jnp.zeros(config.vocab_size, param_dtype)) if config.logits_bias else None

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> TransformerMemory:
        """The memory of source tokens `[B, S]` at their coordinates."""
        embedding = self.embedding if self.source_embedding is None else self.source_embedding
        x = position_encodings.embed(embedding, self.source_positions, self.config.positions, source, source_at)
        return self.encode_vectors(x, source_at, dropout_key=dropout_key)

    def encode_vectors(
        self, x: Float[Array, "B S D"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> TransformerMemory:
        """The memory of a source of vectors `[B, S, D]` in place of tokens: parts of an image, frames of speech.

        Positions that are added to vectors are in them already. What padding holds must be finite.
        """
        keys = split(dropout_key, 1 + len(self.encoder))
        x = drop(x, self.config.block.dropout_rate, keys[0])

        def call(x: Array, block: EncoderBlock, score_mod: ScoreMod | None, key: Array | None) -> Array:
            return block(x, source_at, score_mod=score_mod, dropout_key=key)

        layers = list(zip(self.encoder, map(self.encoder_scores.of, range(len(self.encoder))), keys[1:], strict=True))
        x = run_layers(call, x, layers, **self._training)
        x = x if self.encoder_norm is None else self.encoder_norm(x)
        rows = jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), source_at)
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
        """Logits `[B, T, V]` of the token after each of `target` `[B, T]`."""
        keys = split(dropout_key, 1 + len(self.decoder))
        x = self._embed(self.embedding, self.target_positions, target, target_at, keys[0])

        def call(
            x: Array, block: DecoderBlock, memory: KeyValue, score_mod: ScoreMod | None, key: Array | None
        ) -> Array:
            kv = block.project(x, target_at)
            return block(x, target_at, kv, memory, score_mod=score_mod, dropout_key=key)

        mods = map(self.decoder_scores.of, range(len(self.decoder)))
        layers = list(zip(self.decoder, memory.key_values, mods, keys[1:], strict=True))
        return self._logits(run_layers(call, x, layers, **self._training))

    def room(self, source_length: int) -> int | None:
        """How many target tokens have a place behind a source of so many: all learned positions, if it has one too."""
        limit = position_encodings.limit(self.config.positions)
        return limit if limit is None or source_length <= limit else 0

    def start(self, memory: TransformerMemory, max_length: int) -> TransformerState:
        """The state before the first step, with room for `max_length` tokens; one text a row, not packed ones.

        Of a decoder with a window only the window is kept, and `max_length` sets no limit.
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
        """Many target tokens at once: the logits after each of `tokens` `[B, T]`, and the state after the last.

        Row i has `lengths[i]` tokens and then padding, which takes room in the cache and is seen by nobody. A text may
        come in pieces of any size.

        Raises:
            ValueError: the state has several hypotheses a row, or the caches are full. Inside `jit`, where the latter
                cannot be raised, the logits are NaN.
        """
        if state.caches[0].beams > 1:
            raise ValueError(f"prefill before branching: the state has {state.caches[0].beams} hypotheses a row")
        new = Coordinates.from_lengths(lengths, tokens.shape[1])
        at = Coordinates(state.position[:, None] + new.position, state.memory.value[1][:, None] * new.segment)
        logits, caches = self._continue(tokens, at, state)
        return logits, TransformerState(caches, state.memory, state.position + jnp.asarray(lengths, jnp.int32))

    def step(self, tokens: Int[Array, "R"], state: TransformerState) -> tuple[Float[Array, "R V"], TransformerState]:
        """Logits `[R, V]` of the token after `tokens` `[R]`, and the next state.

        The hypotheses of a row are queries side by side, so that they share its memory and its cache.

        Raises:
            ValueError: R is not what the state holds, or the caches are full. Inside `jit`, where the latter cannot be
                raised, the logits are NaN.
        """
        segment = state.memory.value[1]
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
        """Logits after tokens that are appended to the caches."""
        x = self._embed(self.embedding, self.target_positions, tokens, at, None)
        caches = []
        layers = zip(self.decoder, state.caches, state.memory.value[0], strict=True)
        for layer, (block, cache, memory) in enumerate(layers):
            cache, seen = cache.append(block.project(x, at))
            x = block(x, at, seen, memory, score_mod=self.decoder_scores.of(layer))
            caches.append(cache)
        return self._logits(x), tuple(caches)

    def alignment(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: TransformerMemory
    ) -> Float[Array, "B L T S"]:
        """Where each target token looks in the source: every head of every decoder block, `[B, layers * N, T, S]`."""
        x = self._embed(self.embedding, self.target_positions, target, target_at, None)
        weights = []
        for layer, (block, key_value) in enumerate(zip(self.decoder, memory.key_values, strict=True)):
            kv, score_mod = block.project(x, target_at), self.decoder_scores.of(layer)
            weights.append(block.weights(x, target_at, kv, key_value, score_mod=score_mod))
            x = block(x, target_at, kv, key_value, score_mod=score_mod)
        return jnp.concatenate(weights, axis=1)

    @property
    def _training(self) -> dict[str, bool]:
        return {"remat": self.config.block.remat, "scan": self.config.block.scan_layers}

    def _embed(
        self,
        embedding: TokenEmbedding,
        learned: PositionEmbedding | None,
        tokens: Array,
        at: Coordinates,
        dropout_key: PRNGKeyArray | None,
    ) -> Array:
        x = position_encodings.embed(embedding, learned, self.config.positions, tokens, at)
        return drop(x, self.config.block.dropout_rate, dropout_key)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = self.embedding.logits(x if self.decoder_norm is None else self.decoder_norm(x))
        return logits if self.logits_bias is None else logits + self.logits_bias[...].astype(logits.dtype)[None, None]

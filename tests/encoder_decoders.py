"""Models of the protocol, a padded batch, and the logits that each model gives for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Compressed,
    EncoderDecoder,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    LinearBiases,
    Local,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
    Window,
)
from seqattn.nn import (
    Activation,
    BlockConfig,
    Cell,
    Direction,
    MixtureConfig,
    Monotonic,
    Predictive,
    Score,
    YarnScaling,
)
from tests.parameters import drawn

V, B, S, T = 13, 4, 7, 5
BLOCK = BlockConfig(model_dim=12, hidden_dim=5, num_heads=2, dropout_rate=0.5)
RICH = dataclasses.replace(
    BLOCK, num_heads=6, num_kv_heads=3, activation=Activation.GELU, gated=True, norm_first=True, qk_norm=True
)
MIXED = dataclasses.replace(BLOCK, mixture=MixtureConfig(num_experts=3, top_k=2, capacity_factor=0.1))
# What T5, BART and Gemma 2 add to a block.
CAPPED = dataclasses.replace(
    RICH,
    attention_head_dim=4,
    attention_scale=0.7,
    attention_soft_cap=1.5,
    output_bias=True,
    feed_forward_bias=False,
    norm_outputs=True,
    rms_norm=True,
    norm_bias=False,
)
TRANSFORMER = TransformerConfig(V, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK)
LANGUAGE = LanguageModelConfig(V, num_layers=2, block=BLOCK)
SEQ2SEQ = Seq2SeqConfig(V, embedding_dim=5, hidden_dim=6, dropout_rate=0.5)
CONFIGS = {
    "transformer": TRANSFORMER,
    "transformer_learned_own_tables": dataclasses.replace(TRANSFORMER, positions=Learned(11), share_embeddings=False),
    "transformer_rotary_grouped_norm_first": dataclasses.replace(
        TRANSFORMER, positions=Rotary(50.0), block=RICH, num_decoder_layers=2
    ),
    "transformer_window": dataclasses.replace(TRANSFORMER, decoder_window=2, num_decoder_layers=2),
    "transformer_alibi_window": dataclasses.replace(TRANSFORMER, positions=LinearBiases(), decoder_window=3),
    "transformer_buckets": dataclasses.replace(TRANSFORMER, positions=BucketBiases(8, 6)),
    "transformer_relative": dataclasses.replace(TRANSFORMER, positions=RelativeKeys(3), num_decoder_layers=2),
    "transformer_two_blocks_own_logits": dataclasses.replace(
        TRANSFORMER,
        positions=BucketBiases(8, 6),
        block=CAPPED,
        decoder_block=dataclasses.replace(CAPPED, hidden_dim=7, num_heads=4, num_kv_heads=None),
        embedding_scale=1.0,
        norm_embedding=True,
        tie_logits=False,
        logits_scale=0.5,
    ),
    "language_caps_scaled_rotary": dataclasses.replace(
        LANGUAGE,
        positions=Rotary(50.0, YarnScaling(2.0, 8), fraction=0.5, interleaved=True),
        block=CAPPED,
        pattern=(Window(3), Full()),
        embedding_scale=2.0,
        tie_logits=False,
        logits_soft_cap=2.0,
    ),
    "language_learned_norm_first": dataclasses.replace(LANGUAGE, positions=Learned(23), block=RICH),
    "language_local_compressed_rotary": dataclasses.replace(
        LANGUAGE, positions=Rotary(50.0), pattern=(Local(5), Compressed(2), Window(4)), num_layers=3
    ),
    "language_mixture": dataclasses.replace(LANGUAGE, positions=Rotary(50.0), block=MIXED, pattern=(Local(5), Full())),
    "language_music": dataclasses.replace(
        LANGUAGE, positions=RelativeKeys(4, by_head=True), pattern=(Full(), Window(3))
    ),
    "seq2seq_gru_both_additive_feeding": SEQ2SEQ,
    "seq2seq_lstm_backward_no_attention": dataclasses.replace(
        SEQ2SEQ, cell=Cell.LSTM, direction=Direction.BACKWARD, num_layers=2, attention=None, input_feeding=False
    ),
    "seq2seq_lstm_both_general": dataclasses.replace(
        SEQ2SEQ, cell=Cell.LSTM, num_layers=2, attention=Score.GENERAL, input_feeding=False
    ),
    "seq2seq_simple_forward_dot_feeding": dataclasses.replace(
        SEQ2SEQ, cell=Cell.SIMPLE, direction=Direction.FORWARD, attention=Score.SCALED_DOT
    ),
}
CONFIGS |= {
    "seq2seq_local_monotonic": dataclasses.replace(SEQ2SEQ, local=Monotonic(1)),
    "seq2seq_local_predictive_attention_encoder": dataclasses.replace(
        SEQ2SEQ,
        cell=Cell.LSTM,
        num_layers=2,
        local=Predictive(2),
        input_feeding=False,
        attention_encoder=AttentionEncoder(1, 2, 5),
    ),
    "recurrent_language_tied": RecurrentLanguageModelConfig(
        V, embedding_dim=6, hidden_dim=6, num_layers=2, tie_embeddings=True, dropout_rate=0.5
    ),
    "recurrent_language_lstm": RecurrentLanguageModelConfig(
        V, embedding_dim=5, hidden_dim=6, cell=Cell.LSTM, dropout_rate=0.5
    ),
}
MODELS = {
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}
# The relations that a model keeps by its parts, and not by their combination, in full by `make test-all`.
SELDOM = {
    *("transformer_window", "transformer_alibi_window", "transformer_buckets", "language_music"),
    *("seq2seq_lstm_both_general", "seq2seq_simple_forward_dot_feeding", "seq2seq_local_monotonic"),
    *("transformer_relative", "language_learned_norm_first", "language_mixture", "recurrent_language_lstm"),
    "seq2seq_local_predictive_attention_encoder",
    *("transformer_two_blocks_own_logits", "language_caps_scaled_rotary"),
    *("recurrent_language_tied", "transformer_learned_own_tables", "seq2seq_lstm_backward_no_attention"),
}
CACHED = {
    *("transformer_window", "language_music", "seq2seq_local_monotonic", "recurrent_language_lstm"),
    *("transformer_two_blocks_own_logits", "language_caps_scaled_rotary"),
}
"""Of these the caches that the usual ones do not have."""
most_models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SELDOM else ()) for name in CONFIGS]
)
ONE_OF_EACH = [
    "transformer_learned_own_tables",
    "language_local_compressed_rotary",
    "seq2seq_gru_both_additive_feeding",
]
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
SOURCE, TARGET = (np.random.default_rng(0).integers(0, V, (B, n)).astype(np.int32) for n in (S, T))
SOURCE_AT, TARGET_AT = Coordinates.from_lengths([7, 4, 0, 2], S), Coordinates.from_lengths([5, 3, 4, 1], T)
REAL = np.asarray(TARGET_AT.segment) != 0
BATCH = (jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT)


def build(name: str) -> EncoderDecoder:
    config = CONFIGS[name]
    return MODELS[type(config)](config, rngs=nnx.Rngs(0))


@functools.cache
def model_of(name: str) -> EncoderDecoder:
    return drawn(lambda: build(name))


@jax.jit
def decode(model, source, source_at, target, target_at):
    return model.decode(target, target_at, model.encode(source, source_at))


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return np.asarray(decode(model_of(name), *BATCH))

"""A model of each public class and of each kind of memory, and padded batches, for tests of what all models share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import (
    AttentionEncoder,
    Captioner,
    CaptionerConfig,
    Compressed,
    Convolutional,
    Encoder,
    EncoderConfig,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    Local,
    MaskedTokens,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
    Window,
)
from seqattn.nn import BlockConfig, Cell, Direction, MixtureConfig, Monotonic, OverBatch, Predictive, Score
from tests.parameters import drawn

V, B, S, HEIGHT, WIDTH = 13, 4, 7, 6, 9
BLOCK = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2)
_FEEDING: dict[str, Any] = {"embedding_dim": 8, "hidden_dim": 6}
_FIXED: dict[str, Any] = {"attention": None, "input_feeding": False}
_LOCAL = AttentionEncoder(1, num_heads=2, hidden_dim=5)
_MEAN = AttentionEncoder(0, num_heads=2, positions=None)
_MIXED = BlockConfig(8, 5, 2, mixture=MixtureConfig(num_experts=3, top_k=2))

GENERATING = {
    "transformer": TransformerConfig(V, 1, 1, BLOCK, Learned(11)),
    "language": LanguageModelConfig(V, 2, BLOCK, Rotary(50.0), (Local(5), Compressed(2))),
    "recurrent_language": RecurrentLanguageModelConfig(V, 5, 6, num_layers=2, cell=Cell.LSTM),
    "seq2seq": Seq2SeqConfig(V, **_FEEDING),
    "seq2seq_attention_encoder": Seq2SeqConfig(V, **_FEEDING, local=Predictive(2), attention_encoder=_LOCAL),
    "captioner": CaptionerConfig(V, Convolutional((3,)), TransformerConfig(0, 0, 1, BLOCK)),
    "captioner_batch_norm": CaptionerConfig(
        V, Convolutional((3,), norm=OverBatch()), TransformerConfig(0, 0, 1, BLOCK)
    ),
    "captioner_recurrent": CaptionerConfig(V, Patches((3, 3)), Seq2SeqConfig(0, **_FEEDING, attention_encoder=_MEAN)),
    # In `make test-all` alone.
    "transformer_window": TransformerConfig(V, 1, 2, BLOCK, RelativeKeys(3), decoder_window=2),
    "language_mixture": LanguageModelConfig(V, 2, _MIXED, RelativeKeys(4, by_head=True), (Full(), Window(3))),
    "recurrent_language_tied": RecurrentLanguageModelConfig(V, 6, 6, tie_embeddings=True),
    "seq2seq_fixed": Seq2SeqConfig(V, 5, 6, num_layers=2, cell=Cell.LSTM, direction=Direction.BACKWARD, **_FIXED),
    "seq2seq_monotonic": Seq2SeqConfig(
        V, 5, 6, cell=Cell.SIMPLE, direction=Direction.FORWARD, attention=Score.SCALED_DOT, local=Monotonic(1)
    ),
    "captioner_encoder": CaptionerConfig(V, Patches((3, 3)), TransformerConfig(0, 1, 1, BLOCK)),
    "captioner_read_both_ways": CaptionerConfig(V, Convolutional((3,)), Seq2SeqConfig(0, **_FEEDING)),
}
"""Models that generate: they encode, decode and step."""
LABELLING = {
    "encoder_tokens": EncoderConfig(V, 1, BLOCK, head=TokenLabels(3)),
    "encoder_texts": EncoderConfig(V, 1, BLOCK, Learned(S), head=TextLabels(3)),
    "encoder_masked": EncoderConfig(V, 2, BLOCK, pattern=(Window(3), Full()), head=MaskedTokens()),
}
"""Models that read a text and do no more."""
CLASSES: dict[type, type] = {
    CaptionerConfig: Captioner,
    EncoderConfig: Encoder,
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}
_QUICK = [*GENERATING][: [*GENERATING].index("transformer_window")]
every_generating = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in GENERATING]
)
every_labelling = pytest.mark.parametrize("name", LABELLING)


@functools.cache
def model_of(name: str) -> Any:
    """The model of a case, with random parameters."""
    config = (GENERATING | LABELLING)[name]
    return drawn(lambda: CLASSES[type(config)](config, rngs=nnx.Rngs(0)))


def sources(name: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Sources of a case, `[B, S]` tokens or `[B, HEIGHT, WIDTH]` pixels, and how long they are `[B]`.

    What is not of a source is drawn by `seed`: token numbers that no table has, and pixels that are NaN or large.
    """
    garbage = np.random.default_rng(seed)
    if isinstance(model_of(name), Captioner):
        lengths = np.array([1, 1, 0, 1], np.int32)
        pixels = np.random.default_rng(0).normal(size=(B, HEIGHT, WIDTH))
        other = np.where(garbage.random(pixels.shape) < 0.5, np.nan, 1e30 * garbage.normal(size=pixels.shape))
        return jnp.asarray(np.where(lengths[:, None, None] > 0, pixels, other), jnp.float32), jnp.asarray(lengths)
    lengths = np.array([7, 4, 0, 2], np.int32)
    return padded(np.random.default_rng(0).integers(0, V, (B, S)), lengths, garbage), jnp.asarray(lengths)


def padded(tokens: np.ndarray, lengths: np.ndarray, garbage: np.random.Generator) -> jax.Array:
    """Tokens with others that no table has behind each row's length."""
    other = garbage.choice([-999, -2, V, 999], tokens.shape)
    return jnp.asarray(np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, other), jnp.int32)


def source_at(model: Any, source: jax.Array, lengths: jax.Array) -> Coordinates:
    """Where the tokens of sources are, or the places of images, of which a row has one (length 1) or none (0)."""
    if not isinstance(model, Captioner):
        return Coordinates.from_lengths(lengths, source.shape[1])
    rows, columns = model.grid(*source.shape[1:])
    return Coordinates.from_lengths(lengths * (rows * columns), rows * columns)

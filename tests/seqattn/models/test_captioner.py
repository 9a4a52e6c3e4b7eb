"""A model from images to text keeps what every encoder-decoder keeps, with places of an image as its source."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import generate
from seqattn.models import (
    AttentionEncoder,
    Captioner,
    CaptionerConfig,
    Convolutional,
    Learned,
    Patches,
    Seq2Seq,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig, OverBatch, Score, TokenEmbedding
from tests.parameters import drawn

V, B, T = 13, 3, 5
HEIGHT, WIDTH, ROWS, COLUMNS = 6, 10, 2, 3
S = ROWS * COLUMNS
BLOCK = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2, dropout_rate=0.5)
TRANSFORMER = TransformerConfig(0, num_encoder_layers=0, num_decoder_layers=2, block=BLOCK)
SEQ2SEQ = Seq2SeqConfig(0, embedding_dim=8, hidden_dim=6, dropout_rate=0.5)
CONVOLUTIONAL = Convolutional((3, 5))
CONFIGS = {
    "convolutions_transformer": CaptionerConfig(V, CONVOLUTIONAL, TRANSFORMER),
    "patches_encoder_transformer": CaptionerConfig(
        V, Patches((3, 4), image_channels=2), dataclasses.replace(TRANSFORMER, num_encoder_layers=1)
    ),
    "convolutions_mean_recurrent": CaptionerConfig(
        V,
        CONVOLUTIONAL,
        dataclasses.replace(
            SEQ2SEQ, attention=Score.ADDITIVE, attention_encoder=AttentionEncoder(0, num_heads=2, positions=None)
        ),
    ),
    "patches_recurrent": CaptionerConfig(V, Patches((3, 4), image_channels=2), SEQ2SEQ),
}
every_model = pytest.mark.parametrize("name", CONFIGS)
one_of_each = pytest.mark.parametrize("name", ["convolutions_transformer", "convolutions_mean_recurrent"])

TARGET = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
TARGET_AT = Coordinates.from_lengths([5, 3, 4], T)
SOURCE_AT = Coordinates.from_lengths([S, S, 0], S)  # the last row is padding
REAL = np.asarray(TARGET_AT.segment) != 0


@functools.cache
def _model(name: str) -> Captioner:
    return drawn(lambda: Captioner(CONFIGS[name], rngs=nnx.Rngs(0)))


def _images(name: str) -> jnp.ndarray:
    grey = CONFIGS[name].image.image_channels == 1
    shape = (B, HEIGHT, WIDTH) if grey else (B, HEIGHT, 12, 2)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@jax.jit
def _decode(model, images, key=None):
    return model.decode(TARGET, TARGET_AT, model.encode(images, SOURCE_AT, dropout_key=key))


@every_model
def test_it_is_a_decoder_over_the_vectors_of_the_image(name):
    model, images = _model(name), _images(name)
    assert model.grid(*images.shape[1:3]) == (ROWS, COLUMNS)
    kind = Transformer if isinstance(CONFIGS[name].decoder, TransformerConfig) else Seq2Seq
    assert isinstance(model.decoder, kind)

    @jax.jit
    def expected(model, images):
        vectors = model.image(images)
        return model.decoder.decode(TARGET, TARGET_AT, model.decoder.encode_vectors(vectors, SOURCE_AT))

    found = np.asarray(_decode(model, images))
    assert found.shape == (B, T, V)
    np.testing.assert_allclose(found[REAL], np.asarray(expected(model, images))[REAL], atol=1e-5)


@every_model
def test_steps_and_prefill_are_decode(name):
    @jax.jit
    def run(model, images):
        start = model.start(model.encode(images, SOURCE_AT), T)

        def step(state, tokens):
            logits, state = model.step(tokens, state)
            return state, logits

        read, _ = model.prefill(TARGET, jnp.array([5, 3, 4]), start)
        return jax.lax.scan(step, start, TARGET.T)[1].swapaxes(0, 1), read

    expected = np.asarray(_decode(_model(name), _images(name)))
    for found in run(_model(name), _images(name)):
        np.testing.assert_allclose(np.asarray(found)[REAL], expected[REAL], atol=1e-5)


@every_model
def test_causality_by_gradients(name):
    """By what is added to the vector of each target token where it is read."""
    model, images, read = _model(name), _images(name)[:1], TokenEmbedding.__call__
    at, direction = Coordinates.from_lengths([T], T), jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)

    def numbers(shift):
        with pytest.MonkeyPatch.context() as patch:
            # The same table also makes the logits.
            patch.setattr(TokenEmbedding, "__call__", lambda self, tokens: read(self, tokens) + shift[tokens])
            memory = model.encode(images, Coordinates.from_lengths([S], S))
            return (model.decode(jnp.arange(T)[None], at, memory) @ direction)[0]

    slopes = jax.jit(jax.jacobian(numbers))(jnp.zeros((V, 8)))
    np.testing.assert_array_equal(np.abs(slopes[:, :T]).max(axis=-1) > 0, np.tri(T, dtype=bool))


@one_of_each
def test_attention_is_over_the_places_of_the_image(name):
    model = _model(name)
    run = jax.jit(lambda model, images: model.alignment(TARGET, TARGET_AT, model.encode(images, SOURCE_AT)))
    weights = np.asarray(run(model, _images(name)))
    heads = 2 * BLOCK.num_heads if name.endswith("transformer") else 1
    assert weights.shape == (B, heads, T, S)
    sums = weights.sum(-1).swapaxes(1, 2)
    np.testing.assert_allclose(sums[:2][REAL[:2]], 1, atol=1e-5)
    assert not np.any(sums[2])


@one_of_each
def test_what_a_row_of_padding_holds_changes_nothing_forward_and_backward(name):
    @jax.jit
    def gradients(model, images):
        def total(model, images):
            logits = model.decode(TARGET, TARGET_AT, model.encode(images, SOURCE_AT))
            logits = jnp.where(REAL[..., None], logits, jnp.zeros_like(logits))
            return jnp.sum(jnp.sin(jnp.arange(1.0, logits.size + 1)) * logits.ravel())

        return jax.value_and_grad(total, argnums=(0, 1))(model, images)

    images = _images(name)
    expected = jax.tree.leaves(gradients(_model(name), images))
    for ours, theirs in zip(jax.tree.leaves(gradients(_model(name), images.at[2].set(jnp.nan))), expected, strict=True):
        assert np.all(np.isfinite(theirs))
        np.testing.assert_array_equal(ours, theirs)
    assert np.all(np.any(np.asarray(expected[-1]) != 0, axis=(1, 2)) == [True, True, False])


def test_what_a_row_of_padding_holds_changes_nothing_beside_batch_norm():
    image = dataclasses.replace(CONVOLUTIONAL, norm=OverBatch())
    config = dataclasses.replace(CONFIGS["convolutions_transformer"], image=image)
    model = drawn(lambda: Captioner(config, rngs=nnx.Rngs(0)))

    @jax.jit
    def gradients(model, images):
        def total(model, images):
            vectors = model.encode(images, SOURCE_AT, dropout_key=jax.random.key(0))
            return jnp.sum(model.decode(TARGET, TARGET_AT, vectors)[:2] ** 2)

        return jax.value_and_grad(total, argnums=(0, 1))(model, images)

    images = _images("convolutions_transformer")
    expected = jax.tree.leaves(gradients(model, images))
    for ours, theirs in zip(jax.tree.leaves(gradients(model, images.at[2].set(jnp.nan))), expected, strict=True):
        assert np.all(np.isfinite(theirs))
        np.testing.assert_array_equal(ours, theirs)
    other = gradients(model, images.at[1].multiply(2.0))[0]
    assert float(other) != float(expected[0]), "each real image counts in the statistics"


@one_of_each
def test_a_key_decides_what_drops(name):
    keys = jax.random.split(jax.random.key(0))
    first, again, other = (np.asarray(_decode(_model(name), _images(name), key)) for key in (keys[0], *keys))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


@one_of_each
def test_texts_are_generated_from_images(name):
    @jax.jit
    def run(model, images):
        state = model.start(model.encode(images, SOURCE_AT), 4)
        return generate(model.step, state, jnp.ones(B, jnp.int32), max_length=4, end_token=2).tokens

    images = _images(name)
    assert run(_model(name), images).shape == (B, 4)


def test_the_vocabulary_is_that_of_the_config():
    config = dataclasses.replace(CONFIGS["patches_recurrent"], vocab_size=17)
    model = nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0)))
    assert model.decoder.embedding.table.shape == (17, 8)


def test_all_state_is_parameters():
    for name in CONFIGS:
        assert not jax.tree.leaves(nnx.state(_model(name), nnx.Not(nnx.Param)))


def test_what_does_not_fit_is_refused():
    own_table = dataclasses.replace(TRANSFORMER, share_embeddings=False)
    with pytest.raises(ValueError, match="share_embeddings must be True"):
        Captioner(CaptionerConfig(V, CONVOLUTIONAL, own_table), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"source_at \(3, 5\) must have 2 x 3 = 6 places"):
        _model("convolutions_transformer").encode(
            _images("convolutions_transformer"), Coordinates.from_lengths([5, 5, 5], 5)
        )


def test_an_image_with_more_places_than_the_decoder_has_positions_is_refused():
    reader = AttentionEncoder(0, num_heads=2, positions=Learned(S - 1))
    config = dataclasses.replace(SEQ2SEQ, attention=Score.ADDITIVE, attention_encoder=reader)
    model = nnx.eval_shape(lambda: Captioner(CaptionerConfig(V, CONVOLUTIONAL, config), rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((B, HEIGHT, WIDTH), jnp.float32)
    with pytest.raises(ValueError, match="fewer learned positions than an image of 2 x 3 places"):
        jax.eval_shape(lambda model, images: model.encode(images, Coordinates.from_lengths([S] * B, S)), model, images)

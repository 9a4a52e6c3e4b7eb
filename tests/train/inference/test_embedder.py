"""Vectors of texts against their definition in NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import Coordinates
from seqattn.models import Encoder, EncoderConfig, Learned, Pooling, TextLabels, TokenVectors
from seqattn.nn import BlockConfig
from train.data.tokenizer import Characters, Tokenizer
from train.inference.embedder import Embedder

TOKENIZER = Tokenizer.train(Characters(), ["abcdefg"])
BLOCK = BlockConfig(model_dim=6, hidden_dim=5, num_heads=2, dropout_rate=0.3)
TEXTS = ["abc", "", "gfedcba", "b"]


@pytest.fixture(scope="module")
def model():
    config = EncoderConfig(TOKENIZER.vocab_size, num_layers=1, block=BLOCK, positions=Learned(7), head=TokenVectors())
    return Encoder(config, rngs=nnx.Rngs(3))


def tokens_of(model, text):
    ids = jnp.array([TOKENIZER.encode(text)])
    return np.asarray(model.encode(ids, Coordinates.from_lengths([ids.shape[1]], ids.shape[1])), np.float64)[0]


def test_vectors_are_the_mean_or_the_first_of_those_of_the_tokens(model):
    for pooling, of in ((Pooling.MEAN, lambda x: x.mean(0)), (Pooling.FIRST, lambda x: x[0])):
        plain = Embedder(model, TOKENIZER, pooling=pooling, normalize=False)(TEXTS)
        unit = Embedder(model, TOKENIZER, pooling=pooling, batch_size=2)(TEXTS)
        assert plain.shape == (4, 6)
        assert plain.dtype == np.float32
        for row, text in enumerate(TEXTS):
            expected = of(tokens_of(model, text)) if text else np.zeros(6)
            np.testing.assert_allclose(plain[row], expected, atol=1e-6)
            expected = expected / max(np.linalg.norm(expected), 1e-12)
            np.testing.assert_allclose(unit[row], expected, atol=1e-6)


def test_the_head_has_no_part(model):
    config = EncoderConfig(TOKENIZER.vocab_size, num_layers=1, block=BLOCK, positions=Learned(7), head=TextLabels(3))
    labels = Encoder(config, rngs=nnx.Rngs(0))
    nnx.update(labels, nnx.state(model))
    np.testing.assert_array_equal(Embedder(labels, TOKENIZER)(TEXTS), Embedder(model, TOKENIZER)(TEXTS))


def test_long_texts_are_cut_and_told(model, caplog):
    found = Embedder(model, TOKENIZER, max_length=3)(["abcdefg", "abc"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert "1 of 2 texts have more than 3 tokens and were cut" in caplog.text
    caplog.clear()
    whole = Embedder(model, TOKENIZER)(["abcdefga", "abcdefg"])
    np.testing.assert_allclose(whole[0], whole[1], atol=1e-6)
    assert "1 of 2 texts have more than 7 tokens and were cut" in caplog.text


def test_no_texts_have_no_vectors(model):
    assert Embedder(model, TOKENIZER)([]).shape == (0, 6)


def test_sizes_out_of_range_are_refused(model):
    with pytest.raises(ValueError, match=r"max_length \(8\) must be at most 7, the learned positions of the model"):
        Embedder(model, TOKENIZER, max_length=8)
    for name in ("max_length", "batch_size"):
        with pytest.raises(ValueError, match=name):
            Embedder(model, TOKENIZER, **{name: 0})

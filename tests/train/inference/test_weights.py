"""Other numbers for decoding: which arrays change, and that texts are still generated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.interop import to_arrays
from seqattn.models import LanguageModel, LanguageModelConfig
from seqattn.nn import BlockConfig
from train.data.tokenizer import Characters, Tokenizer
from train.inference.completer import Completer
from train.inference.weights import Weights, with_weights

TOKENIZER = Tokenizer.train(Characters(), ["abcdefg"])
BLOCK = BlockConfig(model_dim=8, hidden_dim=7, num_heads=2)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(LanguageModelConfig(TOKENIZER.vocab_size, num_layers=1, block=BLOCK), rngs=nnx.Rngs(3))


def dtypes_of(model):
    return {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))}


def test_trained_numbers_are_the_model_itself(model):
    assert with_weights(model, Weights.TRAINED) is model


def test_bfloat16_rounds_every_number_and_leaves_the_model_as_it_is(model):
    before = to_arrays(model)
    half = with_weights(model, Weights.BFLOAT16)
    assert dtypes_of(half) == {"bfloat16"}
    for name, x in to_arrays(half).items():
        np.testing.assert_array_equal(x, before[name].astype(jnp.bfloat16))
    for name, x in to_arrays(model).items():
        np.testing.assert_array_equal(x, before[name])


def test_int8_keeps_norms_and_biases_in_float32(model):
    assert dtypes_of(with_weights(model, Weights.INT8)) == {"int8", "float32"}


@pytest.mark.parametrize("weights", Weights)
def test_texts_go_on_with_any_numbers(model, weights):
    chosen = with_weights(model, weights)
    found = Completer(chosen, TOKENIZER, length=5)(["abc", ""])
    assert found == [Completer(chosen, TOKENIZER, length=5)([text])[0] for text in ("abc", "")]

"""What pictures show: the weights of the model, beside the tokens that they belong to."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import Coordinates
from seqattn.models import (
    Encoder,
    EncoderConfig,
    Learned,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Seq2Seq,
    Seq2SeqConfig,
)
from seqattn.nn import BlockConfig
from train.data.tokenizer import Characters, Tokenizer
from train.inference.translator import FAILED
from train.objectives import pictures

LETTERS = Tokenizer.train(Characters(), ["abc defg"])
V = LETTERS.vocab_size


@pytest.fixture
def drawn(monkeypatch):
    """Every picture that would be drawn: weights, labels of rows and columns, and name."""
    found = []

    def attention_map(weights, columns, rows, path_stem, *, title):
        assert np.shape(weights)[-2:] == (len(rows), len(columns))
        np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
        found.append((np.asarray(weights), columns, rows, path_stem.name))
        return [path_stem]

    monkeypatch.setattr(pictures, "attention_map", attention_map)
    return found


@pytest.fixture(scope="module")
def translator():
    return Seq2Seq(Seq2SeqConfig(V, embedding_dim=3, hidden_dim=4), rngs=nnx.Rngs(0))


def test_an_output_is_drawn_beside_its_source(translator, drawn, tmp_path):
    paths = pictures.draw_attention(translator, LETTERS, "ab c", "gd", tmp_path / "new" / "1")
    assert paths == [tmp_path / "new" / "1"]  # of one head the mean says all
    (weights, columns, rows, _), *others = drawn
    assert not others
    assert columns == ["a", "b", "␣", "c", "[END]"]
    assert rows == ["g", "d", "[END]"]
    source, target = [*LETTERS.encode("ab c"), 2], [1, *LETTERS.encode("gd")]
    memory = translator.encode(jnp.array([source]), Coordinates.range(5))
    expected = translator.alignment(jnp.array([target]), Coordinates.range(3), memory)
    np.testing.assert_allclose(weights, expected[0, 0], rtol=1e-5)


@pytest.mark.parametrize(("source", "output"), [("", "gd"), ("ab", FAILED)])
def test_there_is_nothing_to_draw_of_no_source_and_of_no_output(source, output, translator, drawn, tmp_path):
    assert pictures.draw_attention(translator, LETTERS, source, output, tmp_path / "1") == []
    assert drawn == []


def test_a_model_without_attention_has_no_pictures(drawn, tmp_path):
    config = RecurrentLanguageModelConfig(V, embedding_dim=3, hidden_dim=4)
    model = RecurrentLanguageModel(config, rngs=nnx.Rngs(0))
    assert pictures.draw_reading(model, LETTERS, "ab", "cd", tmp_path / "1") == []
    assert drawn == []


def test_every_head_of_an_encoder_is_drawn_for_the_start_of_each_text(drawn, tmp_path):
    block = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2)
    config = EncoderConfig(V, num_layers=3, block=block, positions=Learned(40))
    model = Encoder(config, rngs=nnx.Rngs(0))
    texts = [" abc ", "a" * 47, "g"]
    assert pictures.draw_heads(model, LETTERS, texts, tmp_path) == [tmp_path / "1-heads", tmp_path / "2-heads"]
    (first, columns, rows, _), (second, *_) = drawn
    assert columns == rows == ["a", "b", "c"]
    assert (first.shape, second.shape) == ((6, 3, 3), (6, 40, 40))

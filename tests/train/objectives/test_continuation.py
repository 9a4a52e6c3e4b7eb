"""Language modelling: perplexity and bits against what they are defined as."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx

from seqattn import Coordinates
from seqattn.models import LanguageModel, LanguageModelConfig, Learned
from seqattn.nn import BlockConfig
from train.data.batches import collate
from train.data.tokenizer import ByteLevelBPE, Characters, Tokenizer
from train.inference.completer import Completer
from train.objectives import Continuation, pictures

WORDS = Tokenizer.train(ByteLevelBPE(vocab_size=263), ["abcabcabc abcab"])
TEXTS = ["abcabc", "é", "cab abcab", "aa"]
SPLIT = Dataset.from_dict({"source": [""] * 4, "target": TEXTS})
BLOCK = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2, dropout_rate=0.5)
TOKENS = sum(map(len, WORDS.encode_batch(TEXTS)))
OBJECTIVE = Continuation(WORDS)


@pytest.fixture(scope="module")
def model():
    longest = max(map(len, WORDS.encode_batch(TEXTS)))
    config = LanguageModelConfig(WORDS.vocab_size, num_layers=1, block=BLOCK, positions=Learned(longest))
    return LanguageModel(config, rngs=nnx.Rngs(0))


def test_examples_are_whole_texts_behind_the_start_token_and_without_an_end():
    rows = OBJECTIVE.examples(SPLIT)
    assert [source for source, _ in rows] == [[]] * 4
    assert [target for _, target in rows] == [[1, *ids] for ids in WORDS.encode_batch(TEXTS)]
    assert OBJECTIVE.count(collate(rows, (7, 0, 11))) == TOKENS
    assert Continuation.texts(SPLIT) == TEXTS


def test_the_loss_is_that_of_each_token_given_those_before_it_in_its_own_text(model):
    losses = []
    for ids in WORDS.encode_batch(TEXTS):
        nothing = model.encode(jnp.zeros((1, 0), jnp.int32), Coordinates.range(0))
        logits = model.decode(jnp.array([[1, *ids[:-1]]]), Coordinates.range(len(ids)), nothing)
        logits = np.asarray(logits[0], np.float64)
        losses += [math.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, ids, strict=True)]
    batch = jax.tree.map(jnp.asarray, collate(OBJECTIVE.examples(SPLIT), (7, 0, 1 + model.config.positions.max_length)))
    total, count = jax.jit(Continuation.loss)(model, batch)
    assert count == len(losses) == TOKENS
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary_and_its_bits(model):
    uniform = nnx.merge(*nnx.split(model))
    uniform.embedding.table[...] = jnp.zeros_like(uniform.embedding.table[...])
    scores = OBJECTIVE.evaluate(uniform, SPLIT)
    characters = sum(map(len, TEXTS))
    assert characters != TOKENS
    vocab_size = WORDS.vocab_size
    expected = {
        "loss": math.log(vocab_size),
        "perplexity": vocab_size,
        "bits_per_character": math.log2(vocab_size) * TOKENS / characters,
    }
    assert scores.numbers == pytest.approx(expected, rel=1e-5)


def test_outputs_go_on_from_the_first_half(model):
    assert OBJECTIVE.evaluate(model, SPLIT).outputs == Completer(model, WORDS)(["abc", "é", "cab a", "a"])


def test_a_text_that_fills_all_learned_positions_can_be_drawn(monkeypatch, tmp_path):
    letters = Tokenizer.train(Characters(), ["abcdefgh"])
    config = LanguageModelConfig(letters.vocab_size, num_layers=1, block=BLOCK, positions=Learned(8))
    seen = []

    def attention_map(weights, columns, rows, path_stem, *, title):
        seen.append((np.shape(weights), columns, rows, path_stem))
        return [path_stem]

    monkeypatch.setattr(pictures, "attention_map", attention_map)
    split = Dataset.from_dict({"source": ["", ""], "target": ["abcdefgh", "a"]})  # of the second nothing is left
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    paths = Continuation(letters).draw(model, split, tmp_path)
    assert paths == [tmp_path / "1", tmp_path / "1-heads"]
    columns, rows = ["[START]", *"abcd"], [*"fgh"]
    assert seen == [((3, 5), columns, rows, paths[0]), ((2, 3, 5), columns, rows, paths[1])]

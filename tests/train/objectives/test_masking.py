"""Masked language modelling: how many tokens are hidden, how, and which of them count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx

from seqattn import Coordinates
from seqattn.models import Encoder, EncoderConfig, MaskedTokens
from seqattn.nn import BlockConfig
from tests.huggingface_folders import tokenizer_of
from train.data.batches import collate
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.tokenizer import SPECIAL_TOKENS, Characters, SpecialTokens, Tokenizer
from train.objectives import Masking
from train.objectives.masking import hide

LETTERS = Tokenizer.train(Characters(), ["abcdefg"])
SPLIT = Dataset.from_dict({"source": [""] * 5, "target": ["abcdefg" * 7, "gfa", "badcab" * 5, "", "ccb" * 9]})
V = LETTERS.vocab_size
BLOCK = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2, dropout_rate=0.0)


@pytest.fixture(scope="module")
def model():
    return Encoder(EncoderConfig(V, num_layers=1, block=BLOCK, head=MaskedTokens()), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def loss():
    return jax.jit(Masking.loss)


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, collate(Masking(LETTERS).examples(SPLIT), (7, 53, 1)))


def test_fifteen_percent_are_chosen_and_most_of_them_hidden():
    vocab_size, count = 104, 200_003
    tokens = jax.random.randint(jax.random.key(1), (1, count), len(SPECIAL_TOKENS), vocab_size)
    seen, chosen = map(np.asarray, hide(tokens, jax.random.key(2), vocab_size))
    tokens = np.asarray(tokens)
    assert chosen.mean() == pytest.approx(0.15, abs=0.004)
    np.testing.assert_array_equal(seen[~chosen], tokens[~chosen])
    seen, tokens = seen[chosen], tokens[chosen]
    hidden, kept = seen == Tokenizer.start_id, seen == tokens
    replaced = ~(hidden | kept)
    # A random token is the true one in 1 of 100 cases.
    shares = [hidden.mean(), kept.mean(), replaced.mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1 + 0.1 / 100, 0.1 * 99 / 100], atol=0.008)
    # 2,970 draws of 100 tokens: each of them occurs, and nothing else.
    assert set(seen[replaced]) == set(range(len(SPECIAL_TOKENS), vocab_size))


def test_another_key_hides_others_and_the_same_key_the_same():
    tokens = jnp.full((3, 41), 5)
    first, again, other = (np.asarray(hide(tokens, jax.random.key(seed), 11)[1]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_the_loss_is_the_cross_entropy_of_what_was_chosen_and_padding_never_counts(model, loss, batch):
    seen, chosen = hide(batch["source"], jax.random.key(0), V)
    real = np.arange(53) < np.asarray(batch["source_length"])[:, None]
    at = Coordinates.from_lengths(batch["source_length"], 53)
    logits = np.asarray(jax.jit(lambda model: model(seen, at))(model), np.float64)
    losses = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(batch["source"])[..., None], -1)[..., 0]
    )
    counted = real & np.asarray(chosen)
    total, count = loss(model, batch)
    assert 0 < count == counted.sum() < np.asarray(chosen).sum()
    np.testing.assert_allclose(total, losses[counted].sum(), rtol=1e-5)
    junk = batch | {"source": jnp.where(real, batch["source"], 9)}
    np.testing.assert_allclose(loss(model, junk), (total, count), rtol=1e-6)


def test_every_step_hides_other_tokens(model, loss, batch):
    """Without dropout only the hidden tokens tell two keys apart."""
    keys = [jax.random.key(seed) for seed in (0, 1)]
    first, again, other = (loss(model, batch, dropout_key=key) for key in (keys[0], keys[0], keys[1]))
    assert first == again
    assert first[0] != other[0]


def test_every_evaluation_hides_the_same_and_a_uniform_model_has_the_perplexity_of_the_vocabulary(model):
    objective = Masking(LETTERS)
    first, again = (objective.evaluate(model, SPLIT).numbers for _ in range(2))
    assert first == again
    assert first["perplexity"] == math.exp(first["loss"])
    uniform = nnx.merge(*nnx.split(model))
    uniform.embedding.table[...] = jnp.zeros_like(uniform.embedding.table[...])
    scores = objective.evaluate(uniform, SPLIT)
    assert scores.numbers == pytest.approx({"loss": math.log(V), "perplexity": V}, rel=1e-5)
    assert scores.outputs == []


def test_examples_are_targets_alone_and_their_tokens_are_counted():
    objective = Masking(LETTERS)
    rows = objective.examples(SPLIT)
    assert [ids for ids, _ in rows] == LETTERS.encode_batch(SPLIT["target"])
    assert objective.count(collate(rows, (7, 53, 3))) == sum(map(len, SPLIT["target"]))
    assert Masking.texts(SPLIT) == SPLIT["target"][:]


def test_pictures_of_the_first_texts(model, tmp_path):
    paths = Masking(LETTERS).draw(model, SPLIT.select([1, 3]), tmp_path / "attention")
    assert {path.name for path in paths} == {"1-heads.png", "1-heads.svg"}  # the second text is empty
    assert all(path.exists() for path in paths)


def test_a_split_of_which_nothing_is_hidden_has_no_loss(model):
    short = Dataset.from_dict({"source": ["", ""], "target": ["a", ""]})
    with pytest.raises(ValueError, match="the split of 2 examples has no label to measure"):
        Masking(LETTERS).mean_loss(model, short)


def test_a_tokenizer_of_transformers_is_refused():
    theirs = PretrainedTokenizer(tokenizer_of("bert").to_str(), SpecialTokens((0,), 0, 0))
    with pytest.raises(ValueError, match="does not serve a model with a tokenizer of transformers"):
        Masking(theirs)

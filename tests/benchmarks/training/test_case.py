"""What is trained: the batch, the weights, and how much there is to compute."""

import numpy as np
import pytest

from benchmarks.bench.marian import END, Sizes
from benchmarks.training.case import START, TrainingCase, operations, tokens
from train.data.batches import filled

SIZES = Sizes(num_layers=1, model_dim=12, hidden_dim=7, num_heads=2, vocab_size=53, source_length=5)
CASE = TrainingCase("tiny", SIZES, target_length=8, rows=11, dropout_rate=0.25)


def test_a_batch_has_padding_and_is_the_same_in_every_run():
    batch = CASE.batch()
    assert (batch["source"].shape, batch["target"].shape) == ((11, 5), (11, 9))
    assert (batch["target"][:, 0] == START).all()
    for side, shortest in (("source", 3), ("target", 1 + 5)):
        texts, lengths = batch[side], batch[f"{side}_length"]
        assert shortest <= lengths.min() < lengths.max() <= texts.shape[1]
        assert (texts[np.arange(11), lengths - 1] == END).all()
        np.testing.assert_array_equal(texts == SIZES.pad_token, np.arange(texts.shape[1]) >= lengths[:, None])
    for name, array in CASE.batch().items():
        np.testing.assert_array_equal(array, batch[name])
    assert tokens(batch) == (batch["source"] != SIZES.pad_token).sum() + (batch["target"] != SIZES.pad_token).sum() - 11


def test_weights_let_every_token_be_said():
    weights = CASE.weights()
    assert np.abs(weights["final_logits_bias"]).max() < 1
    assert np.abs(weights["final_logits_bias"]).max() > 0


def test_operations_are_those_of_all_products():
    width, hidden, vocabulary, source, target = 12, 7, 53, 5, 8
    attention, feed_forward = 4 * width * width, 2 * width * hidden
    encoder = source * (attention + feed_forward + 2 * source * width)
    cross = target * (2 * width * width + 2 * source * width) + source * 2 * width * width
    decoder = target * (attention + feed_forward + 2 * target * width) + cross
    multiplications = encoder + decoder + target * width * vocabulary
    found = operations(CASE, CASE.weights())
    assert found == pytest.approx(2 * multiplications / (source + target))
    assert tokens(filled(CASE.batch())) == 11 * (source + target)

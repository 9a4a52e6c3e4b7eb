"""Translating: order, shapes, choices and edges."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from seqattn.decoding import Greedy, MinLength, Sample, Temperature
from seqattn.models import (
    LanguageModel,
    LanguageModelConfig,
    Learned,
    Seq2Seq,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig
from tests.parameters import drawn
from train.data import batches
from train.data.tokenizer import Characters, Tokenizer
from train.inference import translator as module
from train.inference.translator import Beam, Output, Translator, in_order

WORDS = Tokenizer.train(Characters(), ["abcdefg hijk"])
MIXED = ["abc", "defgh" * 4, "k", "", "hijk", "abc", "ab" * 20]
SHORT = ["abc", "defgh", "k", "", "hijk"]  # of one padded length


def random_model(seed=0):
    """One whose outputs differ: sharp logits that depend on the source."""
    config = Seq2SeqConfig(WORDS.vocab_size, embedding_dim=5, hidden_dim=6)
    model = Seq2Seq(config, rngs=nnx.Rngs(seed))
    nnx.update(model, jax.tree.map(lambda leaf: 4 * leaf, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def translator(model):
    return Translator(model, WORDS, batch_size=4)


def test_texts_keep_their_order_and_do_not_depend_on_each_other(translator):
    together = translator(MIXED)
    assert together == [translator([text])[0] for text in MIXED]
    assert together[0] == together[5]
    assert len(set(together)) > 3
    assert together[3] == ""


def test_no_texts_give_no_outputs(translator):
    assert translator([]) == []
    assert translator(["", ""]) == ["", ""]


def test_logits_that_are_not_finite_are_not_passed_off_as_text():
    model = random_model()
    model.output.bias[...] = model.output.bias[...].at[:].set(np.nan)
    (outputs,) = Translator(model, WORDS, max_length=3).stream([["abc"]])
    assert outputs[0].text == "[FAILED]"
    assert math.isnan(outputs[0].score)
    (best, second) = next(Translator(model, WORDS, max_length=3, search=Beam(2, n_best=2)).stream([["abc"]]))
    assert (best.text, second) == ("[FAILED]", Output("", -math.inf))


def test_a_text_beyond_learned_positions_is_refused():
    block = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2)
    config = TransformerConfig(WORDS.vocab_size, 1, 1, block, Learned(max_length=4))
    limited = Translator(Transformer(config, rngs=nnx.Rngs(0)), WORDS, max_length=9)
    assert len(limited(["abc"])) == 1
    with pytest.raises(ValueError, match="text 3 has 5 tokens: the learned positions of the model leave no room"):
        list(limited.stream([["", "abc"], ["abcd"]]))


def test_source_and_output_of_a_language_model_share_its_learned_positions():
    config = LanguageModelConfig(WORDS.vocab_size, 1, BlockConfig(model_dim=6, hidden_dim=7, num_heads=2), Learned(8))
    model = drawn(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    never = [MinLength(3, WORDS.end_id)]
    texts = ["abcd", "a", "ab"]
    together = Translator(model, WORDS, processors=never)(texts)
    assert together == [Translator(model, WORDS, processors=never)([text])[0] for text in texts]
    assert all(3 <= len(output) <= 7 - len(text) for text, output in zip(texts, together, strict=True))
    with pytest.raises(ValueError, match=r"text 2 has 6 tokens: .* no room for an output of 3"):
        Translator(model, WORDS, processors=never)(["abc", "abcde"])


def test_long_texts_are_decoded_a_few_at_a_time(model, translator, monkeypatch):
    shapes = []

    def collate(rows, shape):
        shapes.append(shape[:2])
        return batches.collate(rows, shape)

    expected = translator(MIXED)
    monkeypatch.setattr(batches, "_TOKENS", 96)
    monkeypatch.setattr(module, "collate", collate)
    assert Translator(model, WORDS, batch_size=4)(MIXED) == expected
    assert sorted(set(shapes)) == [(2, 48), (3, 32), (4, 16)]


def test_a_beam_of_one_is_greedy(model):
    greedy, beam = (Translator(model, WORDS, max_length=11, search=search) for search in (Greedy(), Beam(1)))
    assert greedy(SHORT) == beam(SHORT)


def test_a_beam_gives_its_best_in_order_as_many_for_each_text(model):
    found = list(Translator(model, WORDS, max_length=11, search=Beam(3, n_best=3)).stream([SHORT]))
    assert [len(outputs) for outputs in found] == [3] * len(SHORT)
    assert found[3] == [Output("", 0.0), Output("", -math.inf), Output("", -math.inf)]
    for outputs in found[:3] + found[4:]:
        scores = [output.score for output in outputs]
        assert scores == sorted(scores, reverse=True)
        assert len({output.text for output in outputs}) > 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"size": 0}, r"beam_size \(0\) must be an integer of at least 1"),
        ({"size": 2, "n_best": 3}, r"n_best \(3\) must be an integer from 1 to beam_size \(2\)"),
        ({"size": 2, "n_best": 0}, r"n_best \(0\) must be an integer from 1 to beam_size \(2\)"),
    ],
)
def test_a_beam_refuses_sizes_that_cannot_be(sizes, words):
    with pytest.raises(ValueError, match=words):
        Beam(**sizes)


def test_max_length_and_processors_bound_outputs(model):
    ending = random_model()
    ending.output.bias[...] = ending.output.bias[...].at[WORDS.end_id].set(1e3)
    assert set(Translator(ending, WORDS, max_length=7)(SHORT)) == {""}
    longer = Translator(ending, WORDS, max_length=7, processors=[MinLength(6, WORDS.end_id)])(SHORT)
    assert longer[3] == ""
    assert all(longer[:3])
    never = random_model()
    never.output.bias[...] = never.output.bias[...].at[7].set(1e3)
    assert Translator(never, WORDS, max_length=5)(["ab"]) == [WORDS.decode([7] * 5)]


def test_a_sample_depends_on_its_seed_and_index_and_not_on_its_batch(model):
    def sample(texts, seed, size):
        search = Sample((Temperature(2.0),))
        return Translator(model, WORDS, batch_size=size, search=search, max_length=11, seed=seed)(texts)

    texts = ["abc", "abc", "k", "defgh" * 2]
    first = sample(texts, 5, 4)
    assert first == sample(texts, 5, 4)
    assert first != sample(texts, 6, 4)
    assert first[0] != first[1]
    assert sample(["defgh" * 3, "abc", "ab" * 5, "defgh" * 2], 5, 2)[1::2] == first[1::2]


def test_a_sample_knows_its_index_in_the_whole_stream(model):
    settings = {"search": Sample((Temperature(2.0),)), "max_length": 11, "seed": 5}
    together = Translator(model, WORDS, **settings)(["abc", "abc"])
    apart = [best.text for (best,) in Translator(model, WORDS, batch_size=2, **settings).stream([["abc"], ["abc"]])]
    assert together == apart


def test_what_is_known_is_given_before_more_is_read(translator):
    read = []

    def chunks():
        for texts in (["abc", "k"], ["", "hijk"]):
            read.append(texts)
            yield texts

    counts = [len(read) for _ in translator.stream(chunks())]
    assert counts == [1, 1, 2, 2]


def test_an_output_is_given_as_soon_as_it_and_all_before_it_are_known():
    known = []

    def found():
        for index in (1, 0, 3, 2, 4):
            known.append(index)
            yield index, index

    assert [(value, len(known)) for value in in_order(found(), 5)] == [(0, 2), (1, 2), (2, 4), (3, 4), (4, 5)]


def test_batches_hold_texts_of_one_padded_length_and_the_earliest_come_first():
    lengths = [20, 3, 40, 16, 17, 1, 2, 31]  # 1: the end token alone
    batches = list(
        module._batches([([5] * length, [0]) for length in lengths], rows=2, pad=module.padded_length, multiple=1)
    )
    assert batches == [([0, 4], 32), ([1, 3], 16), ([2], 48), ([6], 16), ([7], 32)]


def test_long_texts_are_padded_by_less_than_half_to_few_lengths():
    lengths = [module.padded_length(length) for length in range(1, 2049)]
    assert len(set(lengths)) == 14
    assert all(length <= padded < max(length + 16, 1.5 * length) for length, padded in enumerate(lengths, 1))


def test_a_file_of_mixed_lengths_compiles_once_for_each_padded_length(caplog):
    config = Seq2SeqConfig(WORDS.vocab_size, embedding_dim=3, hidden_dim=4)
    fresh = Translator(Seq2Seq(config, rngs=nnx.Rngs(0)), WORDS, batch_size=4, search=Beam(2))
    lines = ["abcdefg hijk"[: 1 + index % 11] * (1 + index % 4) for index in range(61)]
    padded = {module.padded_length(len(line) + 1) for line in lines}
    for expected in (len(padded), 0):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            assert len(list(fresh.stream([lines[:40], lines[40:59], lines[59:]]))) == 61
        compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling")]
        assert len(compiled) == expected
    assert len(padded) == 3

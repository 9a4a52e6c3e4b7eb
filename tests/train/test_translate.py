"""Translating: order, shapes and edges."""

import io

import numpy as np
import pytest
from flax import nnx

from seqattn.models import Learned, Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from train import run, translate
from train.tokenizer import Characters, Tokenizer
from train.translate import Arguments, Translator

WORDS = Tokenizer.train(Characters(), ["abcdefg hijk"])


@pytest.fixture(scope="module")
def translator():
    config = Seq2SeqConfig(WORDS.vocab_size, embedding_dim=5, hidden_dim=6)
    return Translator(Seq2Seq(config, rngs=nnx.Rngs(0)), WORDS, batch_size=4)


def test_texts_keep_their_order_and_do_not_depend_on_each_other(translator):
    texts = ["abc", "defgh" * 4, "k", "", "hijk", "abc", "ab" * 20]
    together = translator(texts)
    assert together == [translator([text])[0] for text in texts]
    assert together[0] == together[5]


def test_no_texts_give_no_outputs(translator):
    assert translator([]) == []


def test_logits_that_are_not_finite_are_not_passed_off_as_text():
    config = Seq2SeqConfig(WORDS.vocab_size, embedding_dim=5, hidden_dim=6)
    model = Seq2Seq(config, rngs=nnx.Rngs(0))
    model.output.bias[...] = model.output.bias[...].at[:].set(np.nan)
    assert Translator(model, WORDS)(["abc"]) == ["[FAILED]"]


def test_a_text_beyond_learned_positions_is_refused():
    block = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2)
    config = TransformerConfig(WORDS.vocab_size, 1, 1, block, Learned(max_length=4))
    limited = Translator(Transformer(config, rngs=nnx.Rngs(0)), WORDS)
    assert len(limited(["abc"])) == 1
    with pytest.raises(ValueError, match="a text of 5 tokens: the model's learned positions end at 4"):
        limited(["abcd"])


def test_the_command_prints_a_line_for_each_text(finished, capsys):
    translate.main(Arguments(finished, ("ab", "cde")))
    arguments = capsys.readouterr().out
    trained = run.load(finished)
    assert arguments.splitlines() == Translator(trained.model, trained.tokenizer)(["ab", "cde"])


def test_without_texts_the_command_reads_standard_input(finished, capsys, monkeypatch):
    translate.main(Arguments(finished, ("ab", "cde")))
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\r\ncde"))
    translate.main(Arguments(finished))
    assert capsys.readouterr().out == expected


def test_a_folder_without_a_checkpoint_says_how_to_train(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m train EXPERIMENT --run"):
        run.load(tmp_path)
    assert list(tmp_path.iterdir()) == []

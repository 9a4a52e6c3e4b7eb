"""Source to target: the loss by hand, and which figures are given."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx

from seqattn import Coordinates
from seqattn.decoding import Greedy
from seqattn.models import Seq2Seq, Seq2SeqConfig
from train.data.batches import collate
from train.data.tokenizer import Characters, Tokenizer
from train.inference.translator import Beam
from train.objectives import SequenceToSequence, sequences
from train.objectives.rouge import rouge_l

LETTERS = Tokenizer.train(Characters(), ["abcdefg"])
SPLIT = Dataset.from_dict({"source": ["abc", "g"], "target": ["cb", "gfeda"]})


def test_the_loss_is_the_cross_entropy_of_every_target_token_and_its_end():
    config = Seq2SeqConfig(LETTERS.vocab_size, embedding_dim=3, hidden_dim=4, dropout_rate=0.5)
    model = Seq2Seq(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda leaf: 3 * leaf, nnx.state(model)))
    rows = SequenceToSequence(LETTERS).examples(SPLIT)
    assert [tuple(map(np.ndarray.tolist, row)) for row in rows] == [
        ([4, 5, 6, 2], [1, 6, 5, 2]),
        ([10, 2], [1, 10, 9, 8, 7, 4, 2]),
    ]

    @jax.jit
    def decode(model, source, lengths, target):
        memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
        return model.decode(target, Coordinates.range(target.shape[1]), memory)

    losses = []
    for source, target in rows:
        padded = np.zeros((1, 5), np.int32)
        padded[0, : len(source)] = source
        logits = decode(model, padded, np.array([len(source)]), np.array([[*target, 0, 0, 0][:6]]))
        for row, label in zip(np.asarray(logits[0], np.float64), target[1:], strict=False):
            losses.append(math.log(np.exp(row).sum()) - row[label])
    batch = jax.tree.map(jnp.asarray, collate(rows, (3, 5, 7)))
    loss = jax.jit(SequenceToSequence.loss)
    total, count = loss(model, batch)
    assert count == len(losses) == 9
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)
    assert not np.allclose(loss(model, batch, dropout_key=jax.random.key(0))[0], total, rtol=1e-3)


@pytest.mark.parametrize(("beam_size", "search"), [(1, Greedy()), (5, Beam(5))])
def test_outputs_are_searched_as_asked_for(beam_size, search, monkeypatch):
    asked = []
    monkeypatch.setattr(sequences, "Translator", lambda *_, **options: asked.append(options) or (lambda texts: texts))
    monkeypatch.setattr(SequenceToSequence, "mean_loss", lambda *_, **__: 2.0)
    split = Dataset.from_dict({"source": ["a"], "target": ["b"]})
    SequenceToSequence(LETTERS, beam_size=beam_size).evaluate(None, split)
    assert [options["search"] for options in asked] == [search]


ENGLISH = ("rouge_l_english", "rouge_l_english_stemmed")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, set()),
        ({"rouge": True}, {"perplexity", "bits_per_character", "rouge_l", *ENGLISH}),
        ({"bleu": True}, {"bleu", "bleu_lowercase", "chrf"}),
    ],
)
def test_figures(options, names, monkeypatch):
    outputs = ["the open file", "nothing alike"]
    split = Dataset.from_dict({"source": ["a", "b"], "target": ["the file", "it"]})
    monkeypatch.setattr(sequences, "Translator", lambda *_, **__: lambda texts: outputs)
    monkeypatch.setattr(SequenceToSequence, "mean_loss", lambda *_, **__: 2.0)
    scores = SequenceToSequence(LETTERS, **options).evaluate(None, split)
    assert scores.numbers.keys() == {"loss", "exact_match"} | names
    assert scores.outputs == outputs
    assert scores.signatures.keys() == names & {"bleu", "bleu_lowercase", "chrf"}
    if "rouge_l" in names:
        assert scores.numbers["perplexity"] == math.exp(2.0)
        # 8 and 2 letters, and the end of each text.
        assert scores.numbers["bits_per_character"] == pytest.approx(2.0 * 12 / 10 / math.log(2))
        assert scores.numbers["rouge_l"] == pytest.approx(100 * (0.8 + 0) / 2)
        assert rouge_l(outputs[0], "the file") == 0.8


def test_rouge_tells_its_words_and_stems_by_name_and_english_figures_are_of_english_alone(monkeypatch):
    monkeypatch.setattr(sequences, "Translator", lambda *_, **__: lambda texts: ["open_file opened"] * len(texts))
    monkeypatch.setattr(SequenceToSequence, "mean_loss", lambda *_, **__: 2.0)
    found = []
    for target in ("file opens", "कल opens"):
        split = Dataset.from_dict({"source": ["a"], "target": [target]})
        found.append(SequenceToSequence(LETTERS, rouge=True).evaluate(None, split).numbers)
    figures = [{name: value for name, value in numbers.items() if name.startswith("rouge")} for numbers in found]
    # Two words and two; three and two of which one is the same, or two once they are stemmed.
    assert figures[0] == pytest.approx({"rouge_l": 0, ENGLISH[0]: 40, ENGLISH[1]: 80})
    assert figures[1] == {"rouge_l": 0}

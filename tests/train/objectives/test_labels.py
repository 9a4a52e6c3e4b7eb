"""Labels: their loss, their accuracy, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx

from seqattn import Coordinates
from seqattn.models import Encoder, EncoderConfig, TextLabels, TokenLabels
from seqattn.nn import BlockConfig
from train.checkpoints import run
from train.data.batches import collate
from train.data.tokenizer import ByteLevelBPE, Characters, Tokenizer
from train.engine import loop
from train.objectives import Classification, Tagging
from train.reports.metrics import read_metrics

LETTERS = Tokenizer.train(Characters(), ["abcdefg"])
BLOCK = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2, dropout_rate=0.5)
TAGS = Dataset.from_dict({"source": ["abc", "g", "fedcb"], "target": ["xyz", "y", "zzxyx"]})
TOPICS = Dataset.from_dict({"source": ["abc", "g", "fedcb", "ab"], "target": ["one", "two", "one", "three"]})


def encoder(head):
    model = Encoder(EncoderConfig(LETTERS.vocab_size, num_layers=1, block=BLOCK, head=head), rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model)))
    return model


@pytest.fixture(scope="module")
def tagger():
    return encoder(TokenLabels(3)), Tagging(LETTERS, Tagging.find_labels(TAGS))


@pytest.fixture(scope="module")
def classifier():
    return encoder(TextLabels(3)), Classification(LETTERS, Classification.find_labels(TOPICS))


def logits_of(model, text):
    """Of one text alone, in float64."""
    ids = jnp.array([LETTERS.encode(text)])
    return np.asarray(model(ids, Coordinates.from_lengths([len(text)], len(text))), np.float64)[0]


def cross_entropy(logits, label, smoothing=0.0):
    log_probability = logits - np.log(np.exp(logits).sum())
    return -(1 - smoothing) * log_probability[label] - smoothing * log_probability.mean()


def each_label(objective, model):
    """Logits and label of everything that has a label, text by text."""
    if type(objective) is Tagging:
        for text, labels in zip(TAGS["source"], TAGS["target"], strict=True):
            yield from zip(logits_of(model, text), ["xyz".index(label) for label in labels], strict=True)
    else:
        for text, label in zip(TOPICS["source"], TOPICS["target"], strict=True):
            yield logits_of(model, text), ["one", "three", "two"].index(label)


def the_split(objective):
    return TAGS if type(objective) is Tagging else TOPICS


@pytest.fixture(params=["tagger", "classifier"])
def both(request):
    return request.getfixturevalue(request.param)


def test_the_loss_is_the_cross_entropy_and_filling_rows_count_nothing(both):
    model, objective = both
    rows = objective.examples(the_split(objective))
    batch = jax.tree.map(jnp.asarray, collate(rows, (7, 8, 8), pad_id=5))
    loss = jax.jit(objective.loss, static_argnames="label_smoothing")
    for smoothing in (0.0, 0.1):
        expected = [cross_entropy(logits, label, smoothing) for logits, label in each_label(objective, model)]
        total, count = loss(model, batch, label_smoothing=smoothing)
        assert count == len(expected)
        np.testing.assert_allclose(total, sum(expected), rtol=1e-5)
    assert objective.count(collate(rows, (7, 8, 8))) == sum(len(ids) for ids, _ in rows)
    assert not np.allclose(loss(model, batch, dropout_key=jax.random.key(0))[0], loss(model, batch)[0], rtol=1e-3)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_accuracy_and_outputs_by_hand(both, batch_size):
    model, objective = both
    split = the_split(objective)
    found = [(int(logits.argmax()), label) for logits, label in each_label(objective, model)]
    right = sum(best == label for best, label in found)
    assert 0 < right < len(found)
    scores = objective.evaluate(model, split, batch_size=batch_size)
    assert scores.numbers["accuracy"] == right / len(found)
    expected = np.mean([cross_entropy(logits, label) for logits, label in each_label(objective, model)])
    assert scores.numbers["loss"] == pytest.approx(expected, rel=1e-5)
    said = [objective.labels[best] for best, _ in found]
    if type(objective) is Tagging:
        assert [len(output) for output in scores.outputs] == [len(text) for text in split["source"]]
        assert "".join(scores.outputs) == "".join(said)
    else:
        assert scores.outputs == said


def test_labels_are_those_of_the_training_split_in_order(tagger, classifier):
    assert tagger[1].labels == ("x", "y", "z")
    assert classifier[1].labels == ("one", "three", "two")
    assert [labels for _, labels in tagger[1].examples(TAGS)] == [[0, 1, 2], [1], [2, 2, 0, 1, 0]]
    assert [labels for _, labels in classifier[1].examples(TOPICS)] == [[0], [2], [0], [1]]


def test_another_number_of_labels_than_tokens_is_refused(tagger):
    with pytest.raises(ValueError, match="2 labels for 3 tokens: use the tokenizer of characters"):
        tagger[1].examples(Dataset.from_dict({"source": ["abc"], "target": ["xy"]}))
    merging = Tagging(Tokenizer.train(ByteLevelBPE(vocab_size=261), ["abababab"]), ("x",))
    with pytest.raises(ValueError, match="4 labels for 2 tokens"):
        merging.examples(Dataset.from_dict({"source": ["abab"], "target": ["xxxx"]}))


def test_a_label_that_the_training_split_lacks_is_named(tagger, classifier):
    with pytest.raises(ValueError, match=r"the labels \['v', 'w'\] are not in the training split"):
        tagger[1].examples(Dataset.from_dict({"source": ["abc"], "target": ["wxv"]}))
    with pytest.raises(ValueError, match=r"the labels \['four'\] are not in the training split"):
        classifier[1].examples(Dataset.from_dict({"source": ["abc", "a"], "target": ["one", "four"]}))


def test_labels_survive_saving_and_loading(tagged, tagging):
    trained = run.load(tagged)
    labels = tuple(sorted(set("".join(tagging.task.load()["train"]["target"]))))
    assert trained.labels == labels
    assert trained.experiment.model.head == TokenLabels(len(labels))
    results = json.loads((tagged / "results.json").read_text())
    assert 0 <= results["accuracy"] <= 1
    (row,) = [row for row in read_metrics(tagged / "metrics.jsonl") if (row["step"], row["kind"]) == (4, "validation")]
    assert row.keys() >= {"loss", "accuracy"}
    assert (tagged / "attention" / "1-heads.png").exists()


def test_a_head_of_another_size_than_the_labels_is_refused(tagging, tmp_path):
    model = dataclasses.replace(tagging.model, head=TokenLabels(97))
    with pytest.raises(ValueError, match=r"num_labels of the model \(97\) must be that of the data \(\d\)"):
        loop.train(dataclasses.replace(tagging, run=tmp_path / "run", model=model))


def test_texts_of_several_padded_lengths_are_judged_as_one_by_one(tagger):
    model, objective = tagger
    texts = ["abc" * 20, "fg" * 35, "g" * 131]  # evaluated as 64, 128 and 131 tokens
    split = Dataset.from_dict({"source": texts, "target": ["xyz" * 20, "zy" * 35, "x" * 131]})
    together = objective.evaluate(model, split)
    alone = [objective.evaluate(model, split.select([index])).numbers for index in range(3)]
    lengths = np.array([len(text) for text in texts])
    for name in ("loss", "accuracy"):
        expected = sum(length * numbers[name] for length, numbers in zip(lengths, alone, strict=True)) / lengths.sum()
        assert together.numbers[name] == pytest.approx(expected, rel=1e-5), name

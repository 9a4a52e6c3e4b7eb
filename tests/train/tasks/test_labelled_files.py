"""Labels of one's own texts, and what is wrong with a line of them."""

import dataclasses
import gzip
import json

import pytest

from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train import objectives
from train.data.tokenizer import Characters, Tokenizer
from train.objectives import Classification, Tagging
from train.tasks import LabelledFiles

JSON = [{"text": "good\tone", "label": "+", "more": 1}, {"text": "bad", "label": "-"}, {"text": "fine", "label": "+"}]


@pytest.fixture
def task(tmp_path):
    """A task of labels of texts; its training file is to be written."""
    (tmp_path / "validation").write_text("v\t+\n")
    (tmp_path / "test").write_text("t\t-\n")
    return LabelledFiles(*(tmp_path / name for name in ("train", "validation", "test")))


@pytest.fixture
def tags(tmp_path):
    """A task of labels of characters."""
    folder = tmp_path / "tags"
    folder.mkdir()
    (folder / "validation").write_text("Bo\tPP\n")
    (folder / "test").write_text("x\t.\n")
    return LabelledFiles(*(folder / name for name in ("train", "validation", "test")), labels="character")


def pairs(task, text):
    task.train.write_text(text)
    loaded = task.load()["train"]
    return list(zip(loaded["source"], loaded["target"], strict=True))


def test_a_line_is_a_text_a_tab_and_its_label(task):
    assert pairs(task, "good one\t+\n\nwith\ta tab\t - \r\n") == [("good one", "+"), ("with\ta tab", "-")]


def test_json_lines_have_named_columns(task, tmp_path):
    train = tmp_path / "train.jsonl.gz"
    train.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in JSON).encode()))
    loaded = dataclasses.replace(task, train=train).load()["train"]
    assert loaded["source"][:] == ["good\tone", "bad", "fine"]
    assert loaded["target"][:] == ["+", "-", "+"]
    named = tmp_path / "named.json"
    named.write_text(json.dumps([{"review": "a", "stars": 1}, {"review": "b", "stars": 2}]))
    (tmp_path / "held").write_text("c\t1\n")
    held = {"validation": tmp_path / "held", "test": tmp_path / "held.jsonl"}
    held["test"].write_text('{"review": "d", "stars": "2"}\n')
    task = LabelledFiles(train=named, **held, text_column="review", label_column="stars")
    assert task.load()["train"]["target"][:] == ["1", "2"]


def test_a_character_of_the_label_for_each_character_of_the_text(tags):
    found = pairs(tags, "Ada in Rome\tPPP    LLLL\nu\u0308x.\t. .\n\t\n")
    assert found == [("Ada in Rome", "PPP    LLLL"), ("\u00fcx.", ". .")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no tab", r"train:2: no tab between a text and its label in 'no tab'"),
        ("a text\t ", r"train:2: no label of the text 'a text'"),
        ("nul\0\t+", "train:2: NUL is no character"),
    ],
)
def test_c6_a_wrong_line_is_named(task, line, words):
    with pytest.raises(ValueError, match=words):
        pairs(task, f"good\t+\n{line}\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"', r"train\.jsonl:2: Expecting ',' delimiter"),
        ("5", r"train\.jsonl:2: no object, but 5"),
        ('{"text": "a"}', r"train\.jsonl:2: no column 'label', the row has \['text'\]"),
        ('{"text": null, "label": "+"}', r"train\.jsonl:2: None in column 'text' is not a text$"),
        ('{"text": 5, "label": "+"}', r"train\.jsonl:2: 5 in column 'text' is not a text$"),
        ('{"text": "a", "label": null}', r"train\.jsonl:2: None in column 'label' is not a text or a whole number"),
        ('{"text": "a", "label": 0.5}', r"train\.jsonl:2: 0\.5 in column 'label' is not a text or a whole number"),
        ('{"text": "a", "label": true}', r"train\.jsonl:2: True in column 'label' is not a text or a whole number"),
        ('{"text": "a\\ud800", "label": "+"}', r"train\.jsonl:2: 'a\\ud800' in column 'text' is not a text"),
        ('{"text": "a", "label": ""}', r"train\.jsonl:2: no label of the text 'a'"),
    ],
)
def test_c6_a_wrong_row_of_json_is_named(task, row, words, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(f'{{"text": "good", "label": "+"}}\n{row}\n')
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(task, train=file).load()


def test_labels_of_characters_must_be_as_many(tags):
    words = r"train:1: 3 labels of 2 characters \(in NFC\) of the text 'ab'; .* --task.labels text"
    with pytest.raises(ValueError, match=words):
        pairs(tags, "ab\tPP.\n")


def test_labels_that_training_lacks_are_named(task, tags):
    with pytest.raises(ValueError, match=r"validation or test has the labels \['\+'\] and training has no example"):
        pairs(task, "a\t-\nb\t0\n")
    with pytest.raises(ValueError, match=r"the labels \['P'\]"):
        pairs(tags, "a\t.\nb\tL\n")


def test_one_label_is_too_few(task):
    with pytest.raises(ValueError, match=r"two or more different ones, and training has \['-'\]"):
        pairs(task, "a\t-\nb\t-\n")


@pytest.mark.parametrize(("head", "kind"), [(TextLabels(0), Classification), (TokenLabels(0), Tagging)])
def test_classifiers_and_taggers_take_them(head, kind, task, tags, tiny):
    chosen = task if kind is Classification else tags
    experiment = dataclasses.replace(tiny, task=chosen, model=EncoderConfig(11, head=head), bleu=False)
    pairs(chosen, "a\t+\nb\t-\n" if chosen is task else "ab\tP.\n")
    split = chosen.load()["train"]
    assert objectives.kind(experiment) is kind
    labels = kind.find_labels(split)
    assert labels == (("+", "-") if chosen is task else (".", "P"))
    objective = objectives.make(experiment, Tokenizer.train(Characters(), ["ab"]), labels)
    assert [labels for _, labels in objective.examples(split)] == ([[0], [1]] if chosen is task else [[1, 0]])

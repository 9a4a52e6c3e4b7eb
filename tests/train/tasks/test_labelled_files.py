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
    held = {split: tmp_path / f"{split}.jsonl" for split in ("validation", "test")}
    for split, file in held.items():
        file.write_text(f'{{"review": "of {split}", "stars": 2}}\n')
    task = LabelledFiles(train=named, **held, text_column="review", label_column="stars")
    assert task.load()["train"]["target"][:] == ["1", "2"]


def test_a_character_of_the_label_for_each_character_of_the_text(tags):
    found = pairs(tags, "Ada in Rome\tPPP    LLLL\nu\u0308x.\t. .\n\t\n")
    assert found == [("Ada in Rome", "PPP    LLLL"), ("\u00fcx.", ". .")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no tab", r"train:2: no tab between text and label in 'no tab'"),
        ("a text\t ", r"train:2: no label for the text 'a text'"),
        ("nul\0\t+", "train:2: the line contains NUL"),
    ],
)
def test_c6_a_wrong_line_is_named(task, line, words):
    with pytest.raises(ValueError, match=words):
        pairs(task, f"good\t+\n{line}\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"', r"train\.jsonl:2: Expecting ',' delimiter"),
        ("5", r"train\.jsonl:2: expected an object, got 5"),
        ('{"text": "a"}', r"train\.jsonl:2: no column 'label'; the row has \['text'\]"),
        ('{"text": null, "label": "+"}', r"train\.jsonl:2: None in column 'text' is not a valid string$"),
        ('{"text": 5, "label": "+"}', r"train\.jsonl:2: 5 in column 'text' is not a valid string$"),
        (
            '{"text": "a", "label": null}',
            r"train\.jsonl:2: None in column 'label' is not a valid string or a whole number",
        ),
        (
            '{"text": "a", "label": 0.5}',
            r"train\.jsonl:2: 0\.5 in column 'label' is not a valid string or a whole number",
        ),
        (
            '{"text": "a", "label": true}',
            r"train\.jsonl:2: True in column 'label' is not a valid string or a whole number",
        ),
        ('{"text": "a\\ud800", "label": "+"}', r"train\.jsonl:2: 'a\\ud800' in column 'text' is not a valid string"),
        ('{"text": "a", "label": ""}', r"train\.jsonl:2: no label for the text 'a'"),
    ],
)
def test_c6_a_wrong_row_of_json_is_named(task, row, words, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(f'{{"text": "good", "label": "+"}}\n{row}\n')
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(task, train=file).load()


@pytest.mark.parametrize(
    "header", ["text\tlabel", "Text \tLABEL", "label\ttext", "sentence\tlabel", "\ufefftext\tlabel"]
)
def test_the_names_of_columns_in_a_file_of_tabs_are_refused(task, header):
    with pytest.raises(ValueError, match=r"train:1: .* a tab-separated file has no header: delete the line"):
        pairs(task, f"{header}\ngood\t+\nbad\t-\n")
    with pytest.raises(ValueError, match=r"train:1: .* no header"):
        pairs(dataclasses.replace(task, labels="character"), f"{header}\nab\t+-\n")
    assert pairs(task, "good\t+\ntext\tlabel\nbad\t-\n")[1] == ("text", "label")  # anywhere beyond the first line


@pytest.mark.parametrize("ending", ["ndjson", "ndjson.gz", "JSONL"])
def test_ndjson_is_lines_of_json(task, tmp_path, ending):
    train = tmp_path / f"train.{ending}"
    content = "".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in JSON).encode()
    train.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert dataclasses.replace(task, train=train).load()["train"]["target"][:] == ["+", "-", "+"]


@pytest.mark.parametrize("name", ["text_column", "label_column"])
def test_columns_of_a_file_of_tabs_are_refused(task, name):
    words = rf"train: --task\.{name.replace('_', '-')} \(stars\) names a JSON column, but this is a tab-separated"
    with pytest.raises(ValueError, match=words):
        pairs(dataclasses.replace(task, **{name: "stars"}), "good\t+\nbad\t-\n")


def test_a_label_that_is_a_number_and_a_text_is_refused(task, tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.json"
    train.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "-"}\n{"text": "c", "label": " 1"}\n')
    words = r'train\.jsonl:3: the label is the string "1", but at .*train\.jsonl:1 it is the number 1'
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(task, train=train).load()
    train.write_text('{"text": "a", "label": "1"}\n{"text": "b", "label": "-"}\n')
    test.write_text('[{"text": "c", "label": "-"},\n{"text": "d", "label": 1}]')
    words = r'test\.json:1, row 1 \(from 0\): the label is the number 1, but at .*train\.jsonl:1 it is the string "1"'
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(task, train=train, validation=train, test=test).load()
    task.validation.write_text("d\t1\n")  # a file of tabs has no types
    assert dataclasses.replace(task, train=train).load()["validation"]["target"][:] == ["1"]


def test_labels_of_characters_are_no_number(tags, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "ab", "label": 12}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: 12 in column 'label' is not a valid string$"):
        dataclasses.replace(tags, train=train).load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"text": "a", "label": "+"}\n{"text": "a", "text": "b", "label": "+"}',
            r":2: an object .* 'text' twice, in row 1",
        ),
        ('[{"text": "a", "label": "+"}, {"text": "b", "label": "-", "label": "+"}]', r":1: .* 'label' twice, in row 1"),
        ('{"text": {"a": 1, "a": 1}, "label": "+"}', r":1: an object with the key 'a' twice in column 'text' is not a"),
    ],
)
def test_an_object_with_one_key_twice_is_refused(task, tmp_path, content, words):
    train = tmp_path / "train.json"
    train.write_text(content)
    with pytest.raises(ValueError, match=rf"train\.json{words}"):
        dataclasses.replace(task, train=train).load()


def test_a_row_of_a_list_is_named_by_its_number(task, tmp_path):
    train = tmp_path / "train.json"
    train.write_text('[{"text": "a", "label": "+"},\n {"text": "b", "label": null}]')
    with pytest.raises(ValueError, match=r"train\.json:1, row 1 \(from 0\): None in column 'label'"):
        dataclasses.replace(task, train=train).load()
    train.write_text('[{"text": "a", "label": "+"},\n {"text": "b", "label": }]')
    with pytest.raises(ValueError, match=r"train\.json:2: Expecting value \(column 25\)$"):  # no row that is wrong
        dataclasses.replace(task, train=train).load()


def test_at_most_five_labels_that_training_lacks_are_listed(task):
    task.validation.write_text("".join(f"v{number}\t{number:02d}\n" for number in range(13)))
    words = r"the labels \['\+', '00', '01', '02', '03'\] and 9 more, which"
    task.test.write_text("t\t+\n")
    with pytest.raises(ValueError, match=words):
        pairs(task, "a\t-\nb\t0\n")


def test_labels_of_characters_must_be_as_many(tags):
    words = r"train:1: 3 labels for 2 characters \(in NFC\) of the text 'ab'; .* --task.labels text"
    with pytest.raises(ValueError, match=words):
        pairs(tags, "ab\tPP.\n")


def test_labels_that_training_lacks_are_named(task, tags):
    with pytest.raises(ValueError, match=r"validation or test has the labels \['\+'\], which have no training example"):
        pairs(task, "a\t-\nb\t0\n")
    with pytest.raises(ValueError, match=r"the labels \['P'\]"):
        pairs(tags, "a\t.\nb\tL\n")


def test_one_label_is_too_few(task):
    with pytest.raises(ValueError, match=r"at least two different labels, but has \['-'\]"):
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

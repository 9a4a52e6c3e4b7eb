"""Splits of one's own files: by file or by share, never with one text in two of them."""

import dataclasses
import gzip
import itertools
import os
import re
from dataclasses import dataclass

import pytest

from train.tasks.lines import read_lines
from train.tasks.own_files import OwnFiles


@dataclass(frozen=True)
class Lines(OwnFiles):
    """A line is a text, and its label its first letter."""

    def load(self):
        return self.divide(self.found(lambda file: [(line, line[:1]) for line in read_lines(file)]))


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words"
    file.write_text("".join(f"word {number}\n" for number in range(1009)))
    return Lines(train=file)


def texts(loaded):
    return {split: [text for text, _ in rows] for split, rows in loaded.items()}


@pytest.mark.parametrize("seed", [0, -7, 2**65])
def test_shares_are_drawn_by_the_seed(words, seed):
    task = dataclasses.replace(words, validation_share=0.2, test_share=0.3, seed=seed)
    found = texts(task.load())
    assert [len(found[split]) for split in ("train", "validation", "test")] == pytest.approx([505, 202, 303], abs=50)
    assert sorted(itertools.chain.from_iterable(found.values())) == sorted(read_lines(words.train))
    assert found == texts(task.load())
    assert found["test"] != texts(words.load())["test"]


def test_a_text_stays_in_its_split_whatever_else_the_files_hold(words, tmp_path):
    before = texts(words.load())
    more = tmp_path / "more"
    more.write_text("first\n\n" + words.train.read_text() + "word 3\nlast\n")
    after = texts(dataclasses.replace(words, train=more).load())
    assert all(set(before[split]) <= set(after[split]) for split in before)
    # More of one held-out split takes from training alone.
    wider = texts(dataclasses.replace(words, validation_share=0.3).load())
    assert wider["test"] == before["test"]
    assert set(before["validation"]) < set(wider["validation"])


def test_the_same_text_never_stands_in_two_splits_in_whatever_normal_form(tmp_path, caplog):
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("".join(f"\u00fc{number % 50}\nu\u0308{number % 50}\n" for number in range(100)) + " \n")
    test.write_text("u\u03083\n\u00fc4\n\u00fc4\n")
    found = texts(Lines(train=train, test=test, validation_share=0.5).load())
    assert found["test"] == ["\u00fc3", "\u00fc4"]
    assert sorted(found["train"] + found["validation"]) == sorted(f"\u00fc{n}" for n in range(50) if n not in (3, 4))
    assert "test: 2 of 3 examples kept, 1 are repeated" in caplog.text
    assert "1 are blank" in caplog.text
    assert "8 occur in another split" in caplog.text or caplog.text.count("4 occur in another split") == 2


def test_given_files_are_their_splits(tmp_path):
    for name, text in {"train": "a\nb\nc\n", "valid": "c\nd\n", "test.gz": "d\ne"}.items():
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    task = Lines(train=tmp_path / "train", validation=tmp_path / "valid", test=tmp_path / "test.gz")
    assert texts(task.load()) == {"test": ["d", "e"], "validation": ["c"], "train": ["a", "b"]}


def test_a_repeated_text_has_its_first_label(tmp_path, caplog):
    repeated = [("x", "1"), ("x", "2"), ("x", "1"), ("y", "2")]
    found = Lines().divide({"train": repeated, "validation": [("v", "1")], "test": [("t", "1")]})
    assert found["train"] == [("x", "1"), ("y", "2")]
    assert "train: 2 of 4 examples kept, 1 are repeated with another label, 1 are repeated" in caplog.text


def test_a_folder_is_its_files_in_order_without_hidden_ones(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name, text in {"b/x": "2", "a": "1", "c.gz": "3", "b/.git/y": "no", ".z": "no"}.items():
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = Lines(train=tmp_path).found(lambda file: [(line, "") for line in read_lines(file)])
    assert found == {"train": [("1", ""), ("2", ""), ("3", "")]}


def test_a_text_that_differs_in_blanks_at_its_ends_alone_never_stands_in_two_splits(tmp_path):
    words = [f"u\u0308ber {number}" for number in range(60)]
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("".join(f"{word}\n  {word}\n{word} \u00a0\t\n" for word in words))
    test.write_text(f"\u00fcber 3 \n\t{words[4]}\n")
    found = texts(Lines(train=train, test=test, validation_share=0.4).load())
    assert found["test"] == ["\u00fcber 3 ", "\t\u00fcber 4"]  # as they stand
    stripped = [text.strip() for split in found.values() for text in split]
    assert len(stripped) == len(set(stripped)) == 60
    held = texts(Lines(train=train).load())
    alone = train.with_name("alone")
    alone.write_text("".join(f" {word}\n" for word in words))
    for split, kept in texts(Lines(train=alone).load()).items():
        assert [text.strip() for text in kept] == [text.strip() for text in held[split]]


@pytest.mark.parametrize("what", ["folder", "nothing", "itself", "pipe"])
def test_a_link_in_a_folder_that_is_no_file_is_refused_and_not_left_out(what, tmp_path):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for each in (folder, elsewhere):
        (each / "deep").mkdir(parents=True)
        (each / "deep" / "a").write_text("a\n")
    (folder / "deep" / "b").symlink_to(elsewhere / "deep" / "a")  # a link to a file is one
    (folder / ".hidden").symlink_to(elsewhere)
    read = Lines(train=folder).found
    assert [text for text, _ in read(lambda file: [(line, "") for line in read_lines(file)])["train"]] == ["a", "a"]
    odd, words = folder / "deep" / "odd", "a link that leads to no file"
    if what == "pipe":
        os.mkfifo(odd)
        words = "neither a file nor a folder"
    else:
        odd.symlink_to({"folder": elsewhere, "nothing": tmp_path / "no", "itself": odd}[what])
    with pytest.raises(ValueError, match=rf"--task\.train: {odd} is {words}: remove it"):
        Lines(train=folder).load()
    (tmp_path / "link").symlink_to(elsewhere)  # a folder that is given by a link is one
    assert Lines(train=tmp_path / "link").found(read_lines)["train"] == ["a"]


def test_too_few_texts_to_hold_out_name_the_shares_and_the_seed(tmp_path):
    file = tmp_path / "few"
    file.write_text("a\n")
    with pytest.raises(ValueError, match="nothing to use for") as told:
        Lines(train=file, test_share=0.01, validation_share=0.02, seed=5).load()
    shares = r"--task\.test-share \(0\.01\) and --task\.validation-share \(0\.02\) .* --task\.seed \(5\)"
    assert re.search(shares + r".* separate texts with --task\.test and --task\.validation$", str(told.value))
    other = tmp_path / "other"
    other.write_text("b\n")
    with pytest.raises(ValueError, match="nothing to use for validation") as told:
        Lines(train=file, test=other, validation_share=0.02, seed=5).load()
    assert "--task.validation-share (0.02)" in str(told.value)
    assert "test-share" not in str(told.value)


def test_c7_a_split_without_examples_names_the_counts_of_all(tmp_path):
    file = tmp_path / "few"
    file.write_text("\na\na\n \n")
    with pytest.raises(ValueError, match="nothing to use for") as told:
        Lines(train=file).load()
    assert "of 4 examples kept" in str(told.value) or "of 2 examples kept" in str(told.value)
    for words in ("2 are blank", "1 are repeated", "test: ", "validation: ", "train: "):
        assert words in str(told.value)
    file.write_text("a\n")
    with pytest.raises(ValueError, match=r"nothing to use for .*train: 0 of 1 examples kept, 1 occur in another split"):
        Lines(train=file, validation=file, test=file).load()


def test_what_is_not_there_is_named_by_its_flag(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("a\n")
    with pytest.raises(ValueError, match=r"set --task\.train"):
        Lines().load()
    with pytest.raises(FileNotFoundError, match=r"--task\.train: there is no file or folder .*no"):
        Lines(train=tmp_path / "no").load()
    with pytest.raises(FileNotFoundError, match=r"--task\.test: there is no file or folder"):
        Lines(train=tmp_path / "text", test=tmp_path / "no").load()
    with pytest.raises(ValueError, match=r"--task\.validation: the folder .*empty has no file"):
        Lines(train=tmp_path / "text", validation=tmp_path / "empty").load()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match=rf"test_share \({share}\) must be in \(0, 1\)"):
        Lines(test_share=share)
    with pytest.raises(ValueError, match=r"sum of validation_share \(0.5\) and test_share \(0.5\) must be less than 1"):
        Lines(validation_share=0.5, test_share=0.5)


def test_shares_of_splits_with_files_do_not_count_in_the_sum(tmp_path):
    assert Lines(validation=tmp_path, test_share=0.95).test_share == 0.95
    assert Lines(test=tmp_path, validation_share=0.95).validation_share == 0.95


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"validation": "v", "validation_share": 0.2},
            r"validation-share \(0\.2\) .* --task\.validation:",
        ),
        ({"test": "t", "test_share": 0.2}, r"--task\.test-share \(0\.2\) has no effect with --task\.test:"),
        (
            {"validation": "v", "test": "t", "seed": 3},
            r"seed \(3\) .* --task\.validation and --task\.test:",
        ),
    ],
)
def test_settings_of_held_out_texts_beside_files_are_refused(given, words, tmp_path):
    files = {name: tmp_path / value for name, value in given.items() if isinstance(value, str)}
    with pytest.raises(ValueError, match=words):
        Lines(train=tmp_path, **given | files).check_effect()
    Lines(train=tmp_path, **files).check_effect()


def test_settings_of_held_out_texts_that_have_an_effect_are_taken(tmp_path):
    Lines(train=tmp_path, validation_share=0.2, test_share=0.3, seed=5).check_effect()
    Lines(train=tmp_path, validation=tmp_path, test_share=0.3, seed=5).check_effect()

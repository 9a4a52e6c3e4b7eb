"""Which files are read, which split each is in, and what is drawn of the examples."""

import unicodedata
from pathlib import Path

import pytest

from train.tasks.standard_library import Example, SourceFile, SourceTask, read_source


@pytest.fixture
def root(tmp_path):
    """A folder of files by their paths; bytes are written as they are."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def many(count=60):
    return {f"package/module_{number}.py": f"a = {number}\nb = {number}\n" for number in range(count)}


class Statements(SourceTask):
    """Only what all tasks of source share is asked of it."""

    def load(self):
        raise NotImplementedError


def statements(file):
    return [Example(line, file.path, key=line) for line in file.text.splitlines()]


def test_what_is_read(root):
    found = read_source(
        root(
            {
                "b.py": "b\r\n",
                "a/z.py": "a",
                "a.py": "# coding: latin-1\ny = '\u00e4'".encode("latin-1"),
                "again.py": "b\n",
                "empty.py": "",
                "wrong.py": b"x = '\xff'",
                "unknown.py": "# coding: no-such-codec\n",
                "no.pyi": "c",
                "test/d.py": "d",
                "a/tests/e.py": "e",
                "site-packages/f.py": "f",
                "encodings/g.py": "g",
                "config-3.11/h.py": "h",
                "_sysconfigdata__linux.py": "i",
                "decomposed.py": "a\u0308",
            }
        )
    )
    assert list(found) == [
        SourceFile("a.py", "# coding: latin-1\ny = '\u00e4'"),
        SourceFile("a/z.py", "a"),
        SourceFile("again.py", "b\n"),
        SourceFile("decomposed.py", "\u00e4"),
    ]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--task.root: there is no folder .*nowhere"):
        list(read_source(tmp_path / "nowhere"))


def test_the_split_is_a_function_of_the_path_alone():
    splits = {"ast.py": "train", "email/parser.py": "validation", "antigravity.py": "test", "_py_abc.py": "test"}
    assert {path: SourceFile(path, "any").split for path in splits} == splits
    shares = [SourceFile(f"{number}.py", "any").split for number in range(1000)]
    assert 70 < shares.count("test") < 130
    assert 70 < shares.count("validation") < 130


def test_the_split_of_a_path_is_one_in_all_unicode_forms():
    paths = [f"größe_{number}.py" for number in range(20)]
    composed, decomposed = (
        [SourceFile(unicodedata.normalize(form, path), "any").split for path in paths] for form in ("NFC", "NFD")
    )
    assert composed == decomposed
    assert len(set(composed)) > 1


def test_no_file_and_no_key_is_in_two_splits(root):
    files = {path: f"{text}same\n" for path, text in many().items()}
    loaded = Statements(root(files), validation_examples=None, test_examples=None).cut(statements)
    for split, rows in loaded.items():
        assert {SourceFile(path, "").split for path in rows["target"]} == {split}
    sources = [source for rows in loaded.values() for source in rows["source"]]
    assert len(sources) == len(set(sources)) == 121
    assert "same" in loaded["test"]["source"][:]


def test_fewer_examples_are_some_of_those_of_more_and_the_other_splits_stay(root):
    folder = root(many())
    few = Statements(folder, train_examples=7, validation_examples=3, test_examples=2).cut(statements)
    more = Statements(folder, train_examples=19, validation_examples=3, test_examples=2).cut(statements)
    assert {split: len(rows) for split, rows in few.items()} == {"train": 7, "validation": 3, "test": 2}
    assert more["train"]["source"][:7] == few["train"]["source"][:]
    assert more["validation"]["source"][:] == few["validation"]["source"][:]
    other = Statements(folder, train_examples=7, seed=-1).cut(statements)
    assert other["train"]["source"][:] != few["train"]["source"][:]


def test_counts_below_one_and_empty_splits_are_refused(root):
    with pytest.raises(ValueError, match=r"train_examples \(0\) must be an integer of at least 1, or None"):
        Statements(train_examples=0)
    with pytest.raises(ValueError, match="every split needs an example: train has 0"):
        Statements(root({"a.py": ""})).cut(statements)


def test_the_standard_library_itself_has_all_splits():
    found = list(read_source())
    assert sum(len(file.text) for file in found) > 3_000_000
    assert {file.split for file in found} == {"train", "validation", "test"}
    assert not any(Path(file.path).is_absolute() for file in found)

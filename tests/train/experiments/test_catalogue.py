"""Experiments by name and from files, and what is wrong with a file."""

import re
from pathlib import Path

import pytest

from train.experiments import catalogue

MINE = """from train.experiments.reverse import REVERSE
import dataclasses
SIZES = {"steps": 3}
EXPERIMENT = dataclasses.replace(REVERSE, **SIZES)
"""


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One.", "One."),
        ("On two\nlines. Second.\n\nThird.", "On two lines."),
        ("By A. b of 2.5 (e.g. this one). `Code` follows", "By A. b of 2.5 (e.g. this one)."),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, sentence):
    assert catalogue.first_sentence(docstring) == sentence


def written(folder, text):
    file = folder / "mine.py"
    file.write_text(text)
    return file


def test_every_file_of_the_folder_is_an_experiment_named_after_it():
    folder = Path(catalogue.__file__).parent
    assert catalogue.names() == sorted({file.stem for file in folder.glob("[a-z]*.py")} - {"catalogue"})
    with pytest.raises(ValueError, match="no experiment 'date'; --list"):
        catalogue.named("date")


def test_an_experiment_is_a_file_and_what_it_imports_does_not_count(tmp_path):
    file = written(tmp_path, MINE)
    assert catalogue.from_file(file).steps == 3
    file.write_text(MINE.replace("3", "5").replace("EXPERIMENT =", "EXPERIMENT: object ="))
    assert catalogue.from_file(file).steps == 5


def test_a_file_imports_from_its_folder_which_hides_no_library(tmp_path):
    (tmp_path / "beside_mine.py").write_text("STEPS = 7\n")
    (tmp_path / "json.py").write_text("raise SystemExit\n")
    file = written(tmp_path, "from beside_mine import STEPS\nimport json\n" + MINE.replace("3", "STEPS"))
    assert catalogue.from_file(file).steps == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must bind exactly one upper-case name to an Experiment, but it defines none"),
        ("from train.experiments.reverse import REVERSE", "it defines none"),
        (MINE.replace("EXPERIMENT", "experiment"), "it defines none"),
        (MINE + "OTHER = EXPERIMENT", "it defines EXPERIMENT, OTHER"),
        ("\nx = 1 / 0", "mine.py:2: ZeroDivisionError: division by zero"),
        (MINE.replace("3", "0"), "mine.py:4: ValueError: steps (0) must be an integer of at least 1"),
        ("import nothing_of_this_name", "mine.py:1: ModuleNotFoundError: No module named"),
        ("x = 1\ny = (", "mine.py:2: SyntaxError: '(' was never closed"),
        ("x = '\\ud800'.encode()", "mine.py:1: UnicodeEncodeError"),
        ("\n\nx = 1\ny = )", "mine.py:4: SyntaxError: unmatched ')'"),
        ("\nraise SystemExit(0)", "mine.py:2: SystemExit: 0"),
        ("import sys\n\nsys.exit()", "mine.py:3: SystemExit"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(text, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        catalogue.from_file(written(tmp_path, text))


@pytest.mark.parametrize("name", ["mine.py", "./mine.py", "../folder/mine.py", "link.py"])
def test_a_line_is_named_however_the_file_is_named(name, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.py").symlink_to(written(folder, "\n\n\ny = )"))
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"\.py:4: SyntaxError"):
        catalogue.from_file(Path(name))
    written(folder, "\n\n\ny = 1 / 0")
    with pytest.raises(ValueError, match=r"\.py:4: ZeroDivisionError"):
        catalogue.from_file(Path(name))


def test_a_file_that_is_missing_or_no_python(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*no\.py"):
        catalogue.from_file(tmp_path / "no.py")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        catalogue.from_file(tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"mine\.txt is not a Python file: its name must end in \.py"):
        catalogue.from_file(tmp_path / "mine.txt")

"""Exact match by length: each source counts at its own, and the picture shows what is printed."""

from collections import Counter

import matplotlib.image
import pytest

from train import by_length, run
from train.by_length import Arguments, main


class RightWhenShort:
    """A translator that reverses what has at most three letters, and of longer texts only those that begin with "a"."""

    def __init__(self, model, tokenizer):
        del model, tokenizer

    def __call__(self, texts):
        return [text[::-1] if len(text) <= 3 or text[0] == "a" else "?" for text in texts]


@pytest.fixture
def run_of_reverse(finished, monkeypatch):
    monkeypatch.setattr(by_length, "Translator", RightWhenShort)
    sources = ["ab", "bc", "cde", "bcda", "abcd", "acdb", "cdab", "bbbbb"]
    split = {"source": sources, "target": [source[::-1] for source in sources]}
    monkeypatch.setattr(run.Run, "splits", lambda self: {"test": split})
    return finished


def test_the_share_of_each_length(run_of_reverse):
    assert by_length.by_length(run_of_reverse) == {2: 1.0, 3: 1.0, 4: 0.5, 5: 0.0}


def test_rows_and_picture(run_of_reverse, tmp_path, capsys):
    main(Arguments((run_of_reverse,), tmp_path / "lengths.png"))
    printed = capsys.readouterr().out.splitlines()
    rows = [f"{length}\t{share}" for length, share in ((2, "1.000"), (3, "1.000"), (4, "0.500"), (5, "0.000"))]
    assert printed == [f"length\t{run_of_reverse.name}", *rows, f"{tmp_path}/lengths.png {tmp_path}/lengths.svg"]
    assert matplotlib.image.imread(tmp_path / "lengths.png").std() > 0.01
    assert run_of_reverse.name in (tmp_path / "lengths.svg").read_text()


def test_the_test_split_of_a_run(finished):
    """By its own model, on all examples that were kept from training."""
    trained = run.load(finished)
    lengths = Counter(map(len, trained.splits()["test"]["source"]))
    found = by_length.by_length(finished)
    assert found.keys() == lengths.keys()
    assert all(share * lengths[length] % 1 == 0 and 0 <= share <= 1 for length, share in found.items())


def test_two_runs_of_one_name_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="two runs of a/x, b/x have the same name"):
        main(Arguments((by_length.Path("a/x"), by_length.Path("b/x")), tmp_path / "y"))

"""Exact match by length: each source counts at its own, and the picture shows what is printed."""

import json
from collections import Counter
from pathlib import Path

import matplotlib.image
import pytest

from seqattn.models import Transformer
from train import by_length
from train.by_length import Arguments, main
from train.checkpoints import run


class RightWhenShort:
    """A translator that reverses what has at most three letters, and of longer texts only those that begin with "a"."""

    def __init__(self, model, tokenizer):
        assert isinstance(model, Transformer)
        assert tokenizer.decode(tokenizer.encode("abc")) == "abc"

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


def test_two_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    """Their lengths need not be the same."""
    shares = {"first-run": {2: 1.0, 3: 0.25}, "second-run": {3: 0.5, 7: 0.0}}
    monkeypatch.setattr(by_length, "by_length", lambda folder: shares[folder.name])
    main(Arguments((Path("a/first-run"), Path("b/second-run")), tmp_path / "both"))
    rows = capsys.readouterr().out.splitlines()[:-1]
    assert rows == ["length\tfirst-run\tsecond-run", "2\t1.000\tnan", "3\t0.250\t0.500", "7\tnan\t0.000"]
    drawn = (tmp_path / "both.svg").read_text()
    assert all(name in drawn for name in ("first-run", "second-run", "characters of the source", "exact match"))


def test_the_whole_test_split_by_the_weights_of_the_run(finished):
    """The mean over all lengths is the exact match that the run ended with."""
    lengths = Counter(map(len, run.load(finished).splits()["test"]["source"]))
    shares = by_length.by_length(finished)
    assert shares.keys() == lengths.keys()
    mean = sum(shares[length] * count for length, count in lengths.items()) / lengths.total()
    assert mean == pytest.approx(json.loads((finished / run.RESULTS).read_text())["exact_match"])


def test_two_runs_of_one_name_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="two runs of a/x, b/x have the same name"):
        main(Arguments((Path("a/x"), Path("b/x")), tmp_path / "y"))

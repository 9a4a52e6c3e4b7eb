"""Texts in a file are the texts that were written, in any piece."""

import pytest

from train.data import texts
from train.data.texts import Texts, write_texts

PAIRS = [(f"süß {number}", "x" * (number % 5)) for number in range(23)]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 7)
    file = tmp_path / "texts.arrow"
    assert write_texts(iter(PAIRS), file) == 23
    return file


def test_columns_and_pieces_are_those_of_the_pairs(file):
    found = Texts(file)
    assert len(found) == 23
    assert list(zip(found["source"], found["target"], strict=True)) == PAIRS
    assert [len(piece) for piece in found.pieces()] == [7, 7, 7, 2]


@pytest.mark.parametrize(("first", "last"), [(0, 23), (0, 1), (6, 8), (7, 14), (22, 23), (5, 5)])
def test_a_piece_begins_and_ends_anywhere(first, last, file):
    piece = Texts(file).piece(first, last)
    assert list(zip(piece["source"], piece["target"], strict=True)) == PAIRS[first:last]


def test_no_pairs_are_a_file_too(tmp_path):
    assert write_texts([], tmp_path / "none") == 0
    assert len(Texts(tmp_path / "none")) == 0
    assert list(Texts(tmp_path / "none")["source"]) == []

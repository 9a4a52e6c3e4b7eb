from collections import Counter
from string import ascii_lowercase

import pytest

from train.tasks.reverse import Reverse

SMALL = Reverse(min_length=2, max_length=5, train_examples=300, validation_examples=20, test_examples=20)


def test_targets_are_the_sources_backwards():
    for rows in SMALL.load().values():
        assert rows["target"][:] == ["".join(reversed(source)) for source in rows["source"]]


def test_no_string_occurs_twice():
    sources = [source for rows in SMALL.load().values() for source in rows["source"]]
    assert len(sources) == len(set(sources)) == 340


def test_every_length_is_about_equally_likely():
    lengths = Counter(len(source) for source in SMALL.load()["train"]["source"])
    assert sorted(lengths) == [2, 3, 4, 5]
    assert min(lengths.values()) > 50


def test_all_strings_there_are():
    every = Reverse(min_length=1, max_length=1, train_examples=24, validation_examples=1, test_examples=1).load()
    assert sorted(letter for rows in every.values() for letter in rows["source"]) == list(ascii_lowercase)


def test_more_examples_than_strings():
    with pytest.raises(ValueError, match="lengths 1 to 1 give 26 strings, fewer than 27 examples"):
        Reverse(min_length=1, max_length=1, train_examples=25, validation_examples=1, test_examples=1).load()


def test_a_seed_decides():
    def sources(seed):
        task = Reverse(train_examples=10, validation_examples=1, test_examples=1, seed=seed)
        return task.load()["train"]["source"][:]

    assert sources(2**70) == sources(2**70)
    assert sources(2**70) != sources(-(2**70))


@pytest.mark.parametrize(("min_length", "max_length"), [(0, 3), (4, 3)])
def test_lengths_that_make_no_sense(min_length, max_length):
    with pytest.raises(ValueError, match=rf"min_length \({min_length}\) must be an integer from 1 to max_length"):
        Reverse(min_length=min_length, max_length=max_length).load()

from itertools import combinations_with_replacement

import pytest

from train.tasks.addition import Addition, _operands

SMALL = Addition(digits=2, train_examples=700, validation_examples=50, test_examples=50)


def operands(source):
    return tuple(int(number) for number in source.split("+"))


def test_targets_are_the_sums():
    for rows in SMALL.load().values():
        assert rows["target"][:] == [str(sum(operands(source))) for source in rows["source"]]


def test_no_sum_occurs_twice_in_either_order():
    asked = [tuple(sorted(operands(source))) for rows in SMALL.load().values() for source in rows["source"]]
    assert len(asked) == len(set(asked)) == 800


def test_every_sum_can_be_asked_for_in_both_orders():
    every = Addition(digits=1, train_examples=53, validation_examples=1, test_examples=1).load()
    asked = [operands(source) for rows in every.values() for source in rows["source"]]
    assert {tuple(sorted(pair)) for pair in asked} == set(combinations_with_replacement(range(10), 2))
    assert any(first < second for first, second in asked)
    assert any(first > second for first, second in asked)


def test_pairs_of_operands_have_numbers():
    assert [_operands(number) for number in range(6)] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    largest = 10**9 * (10**9 + 1) // 2 - 1
    assert _operands(largest) == (10**9 - 1, 10**9 - 1)


def test_nine_digits():
    rows = Addition(digits=9, train_examples=30, validation_examples=1, test_examples=1).load()["train"]
    assert max(len(source) for source in rows["source"]) == 19
    assert rows["target"][:] == [str(sum(operands(source))) for source in rows["source"]]


def test_a_seed_decides():
    def sources(seed):
        task = Addition(train_examples=10, validation_examples=1, test_examples=1, seed=seed)
        return task.load()["train"]["source"][:]

    assert sources(-1) == sources(-1)
    assert sources(-1) != sources(1)


@pytest.mark.parametrize("digits", [0, 10])
def test_digits_out_of_range(digits):
    with pytest.raises(ValueError, match=rf"digits \({digits}\) must be an integer from 1 to 9"):
        Addition(digits=digits).load()


def test_more_examples_than_sums():
    with pytest.raises(ValueError, match=r"digits \(1\) gives 55 different sums, fewer than 56 examples"):
        Addition(digits=1, train_examples=54, validation_examples=1, test_examples=1).load()

import pytest

from train.tasks.task import DrawnTask, generator, splits


class Drawn(DrawnTask):
    """Only what all drawn tasks share is asked of it."""

    def load(self):
        raise NotImplementedError


def test_an_empty_split_is_refused_with_all_counts():
    with pytest.raises(ValueError, match="train has 2, validation has 0, test has 1"):
        splits([("a", "b"), ("c", "d")], [], [("e", "f")])


def test_fewer_than_one_example_is_refused():
    with pytest.raises(ValueError, match=r"test_examples \(-1\) must be an integer of at least 1"):
        Drawn(test_examples=-1)


def test_every_integer_is_a_seed_with_a_stream_of_its_own():
    seeds = [0, 1, -1, 5, -5, 5 + 2**32, 5 + 2**64, 2**70, -(2**70)]
    streams = [tuple(generator(seed).integers(2**63, size=3).tolist()) for seed in seeds]
    assert len(set(streams)) == len(seeds)
    assert streams == [tuple(generator(seed).integers(2**63, size=3).tolist()) for seed in seeds]


def test_more_training_examples_leave_the_other_splits_as_they_are():
    pairs = [(str(number), "") for number in range(20)]
    few, more = (Drawn(train_examples=count, validation_examples=3, test_examples=2) for count in (5, 7))
    assert (few.examples, more.examples) == (10, 12)
    small, large = few.cut(pairs[:10]), more.cut(pairs[:12])
    assert [len(small[split]) for split in ("train", "validation", "test")] == [5, 3, 2]
    assert small["validation"][:] == large["validation"][:]
    assert small["test"][:] == large["test"][:]
    assert small["train"][:]["source"] == large["train"][:]["source"][:5]

"""Batches hold every example, in few shapes, in an order that depends on seed and step alone."""

import itertools
from collections import Counter

import numpy as np
import pytest
from absl import flags

from train.data import batches
from train.data.batches import Batches, collate, group_by_length, iterate, measure, once, stream

ROWS = [([10 + index] * (1 + index % 7), [1, *[10 + index] * (1 + index % 5), 2]) for index in range(53)]
CONFIG = Batches(tokens=64, max_length=16, buckets=3)


def identities(batch):
    return [int(row[0]) for row in batch["source"]]


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_collate_pads_on_the_right_and_counts():
    batch = collate([([5, 2], [1, 6, 2]), ([2], [1, 2])], (3, 4, 4))
    np.testing.assert_array_equal(batch["source"], [[5, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["target"], [[1, 6, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    assert batch["source_length"].tolist() == [2, 1, 0]
    assert batch["target_length"].tolist() == [3, 2, 1]


def test_c11_a_step_has_one_batch_whatever_came_before():
    order = stream(CONFIG, ROWS, seed=3)
    resumed = itertools.islice(iterate(stream(CONFIG, ROWS, seed=3), start=7), 5)
    assert all(same(batch, order[step]) for step, batch in enumerate(resumed, 7))


def test_another_seed_gives_another_order():
    first, second = (stream(CONFIG, ROWS, seed=seed)[0] for seed in (0, 1))
    assert not same(first, second)


def test_every_example_comes_equally_often():
    order = stream(CONFIG, ROWS, seed=0)
    seen = Counter(number for step in range(400) for number in identities(order[step]))
    assert len(seen) == len(ROWS)
    assert max(seen.values()) - min(seen.values()) <= 0.1 * max(seen.values())


def test_shapes_are_as_few_as_buckets_and_within_the_budget():
    order = stream(CONFIG, ROWS, seed=0, multiple=2)
    shapes = {(order[step]["source"].shape, order[step]["target"].shape) for step in range(50)}
    assert 1 < len(shapes) <= CONFIG.buckets
    for (rows, source), (_, target) in shapes:
        assert rows % 2 == 0
        assert rows * (source + target) <= CONFIG.tokens


def test_evaluation_takes_fewer_long_texts_at_a_time(monkeypatch):
    monkeypatch.setattr(batches, "_TOKENS", 400)
    rows = [([7] * length, [1, 2]) for length in [5] * 9 + [190] * 3]
    found = list(once(rows, size=4))
    assert sorted(index for chosen, _ in found for index in chosen) == list(range(12))
    assert {batch["source"].shape for _, batch in found} == {(4, 64), (2, 190)}


def grouped(rows, count, tokens):
    """The examples of each group."""
    return [[rows[index] for index in group] for group in group_by_length(measure(rows), count, tokens)]


def padded(groups):
    """Tokens of all examples, each as long as the longest of its group on either side."""
    return sum(len(group) * sum(max(len(row[side]) for row in group) for side in (0, 1)) for group in groups)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_groups_need_least_padding_of_all_that_fill_their_batches(count):
    random, tokens = np.random.default_rng(0), 40
    lengths = np.stack([random.geometric(0.1, 31), random.integers(1, 5, 31)], axis=1)
    rows = sorted(
        ([([index] * s, [index] * t) for index, (s, t) in enumerate(lengths)]), key=lambda row: sum(map(len, row))
    )

    def fills(group):
        return len(group) >= tokens // sum(max(len(row[side]) for row in group) for side in (0, 1))

    def size(row):
        return sum(map(len, row))

    def best(start, left):
        """The least padding of the rows from here on in so many groups, by trying all."""
        ends = [end for end in range(start + 1, 32) if end == 31 or size(rows[end - 1]) < size(rows[end])]
        ends = ends if left > 1 else [31]
        parts = [(padded([rows[start:end]]), end) for end in ends if fills(rows[start:end])]
        return min((cost + (best(end, left - 1) if end < 31 else 0) for cost, end in parts), default=np.inf)

    groups = grouped([rows[index] for index in random.permutation(31)], count, tokens)
    assert 1 <= len(groups) <= count
    assert all(map(fills, groups))
    assert [size(row) for group in groups for row in group] == [size(row) for row in rows]
    assert padded(groups) == best(0, count)


def test_lengths_beyond_those_that_are_tried_are_still_grouped():
    rows = [([7] * length, [1, 2]) for length in [1] * 701 + list(range(1, 700))]
    groups = grouped(rows, 5, 700)
    assert [row for group in groups for row in group] == rows
    equal = [rows[start : start + 280] for start in range(0, 1400, 280)]
    assert padded(groups) < 0.9 * padded(equal)


def test_empty_examples_are_grouped_with_others_and_batched():
    rows = [([], []), ([], []), *ROWS[:20]]
    assert sum(map(len, grouped(rows, 4, 30))) == 22
    order = stream(Batches(tokens=30, max_length=16, buckets=4), rows, seed=0)
    assert all(order[step]["source_length"].sum() > 0 for step in range(20))


def test_batches_of_one_example():
    rows = [([7] * 5, [1, 2]), ([8] * 5, [1, 2]), ([9], [1, 2])]
    order = stream(Batches(tokens=7, max_length=9, buckets=2), rows, seed=0)
    assert {tuple(order[step]["source_length"]) for step in range(12)} >= {(5,)}
    assert {int(order[step]["source"][0, 0]) for step in range(30)} == {7, 8, 9}


def test_c9_too_few_examples_to_fill_a_batch_are_one_group():
    assert [len(group) for group in grouped(ROWS[:3], 2, 1000)] == [3]


@pytest.mark.parametrize("count", [1, 3])
def test_c9_too_few_examples_to_fill_a_batch_come_more_than_once_in_it(count):
    """No batch has fewer rows, and there is no end to them."""
    order = stream(Batches(tokens=100, max_length=16), ROWS[:count], seed=3)
    rows = 100 // sum(max(len(row[side]) for row in ROWS[:count]) for side in (0, 1))
    assert rows > 2 * count
    for batch in itertools.islice(iterate(order, start=0), 5):
        times = Counter(identities(batch))
        assert len(times) == count
        assert sum(times.values()) == rows
        assert max(times.values()) - min(times.values()) <= 2  # a batch begins and ends within a pass


def test_c9_too_few_examples_to_fill_a_packed_batch_come_more_than_once_in_it():
    order = stream(Batches(tokens=200, max_length=16, packed=True), ROWS[:3], seed=3)
    for batch in itertools.islice(iterate(order, start=0), 5):
        assert len(batch["source"]) > 3
        assert all({10, 11, 12} <= {*row} for row in batch["source"])


def test_c21_a_batch_that_cannot_be_made_is_an_error_in_its_place(monkeypatch):
    """Though a thread makes it ahead of time."""
    seventh = stream(CONFIG, ROWS, seed=3)[7]

    def broken(*arguments):
        batch = collate(*arguments)
        if same(batch, seventh):
            raise ZeroDivisionError("batch 7")
        return batch

    monkeypatch.setattr(batches, "collate", broken)
    found = iterate(stream(CONFIG, ROWS, seed=3), start=0)
    assert len(list(itertools.islice(found, 7))) == 7
    with pytest.raises(ZeroDivisionError, match="batch 7"):
        next(found)


def test_e16_batches_are_made_though_nobody_parsed_the_flags_of_absl():
    """Processes of grain, in place of its threads, would ask for these flags."""
    assert not flags.FLAGS.is_parsed()
    assert same(next(iterate(stream(CONFIG, ROWS, seed=3), start=2)), stream(CONFIG, ROWS, seed=3)[2])


@pytest.mark.parametrize("packed", [False, True])
def test_e17_any_seed_of_32_bits_gives_an_order_of_its_own(packed):
    config = Batches(tokens=200, max_length=16, buckets=3, packed=packed)
    found = [
        [array.tolist() for step in range(3) for array in stream(config, ROWS, seed=seed)[step].values()]
        for seed in (0, 1, 2**31, 2**32 - 1)
    ]
    assert all(first != second for first, second in itertools.combinations(found, 2))


def test_training_batches_hold_no_empty_rows():
    order = stream(CONFIG, ROWS, seed=0)
    assert all(order[step]["source_length"].min() > 0 for step in range(20))


def test_c8_long_examples_are_left_out_and_counted(caplog):
    order = stream(Batches(tokens=64, max_length=6, buckets=1), ROWS, seed=0)
    long = sum(max(len(source), len(target)) > 6 for source, target in ROWS)
    assert f"left out {long} of 53" in caplog.text
    assert order[0]["source"].shape[1] <= 6


def test_no_example_short_enough_is_an_error():
    with pytest.raises(ValueError, match=r"all 53 training examples are longer than max_length \(2\)"):
        stream(Batches(tokens=64, max_length=2), ROWS, seed=0)


def test_a_budget_without_room_for_every_device_is_an_error():
    with pytest.raises(ValueError, match="no room for 8 rows"):
        stream(Batches(tokens=64, max_length=16, buckets=1), ROWS, seed=0, multiple=8)


def test_evaluation_sees_every_example_once_in_one_shape():
    batches = list(once(ROWS, size=8))
    assert sorted(itertools.chain.from_iterable(chosen for chosen, _ in batches)) == list(range(53))
    assert len({batch["source"].shape for _, batch in batches}) == 1
    for chosen, batch in batches:
        assert identities(batch)[: len(chosen)] == [10 + index for index in chosen]
        assert batch["source_length"][len(chosen) :].sum() == 0


def test_evaluation_pads_short_sources_little_beside_long_ones():
    lengths = [0, 3, 63, 64, 65, 128, 130, 301]
    shapes = {}
    for chosen, batch in once([([7] * length, [1, 2]) for length in lengths], size=1):
        assert len(chosen) == 1
        assert batch["source_length"].tolist() == [lengths[index] for index in chosen]
        shapes[lengths[chosen[0]]] = batch["source"].shape[1]
    assert shapes == {0: 64, 3: 64, 63: 64, 64: 64, 65: 128, 128: 128, 130: 256, 301: 301}


@pytest.mark.parametrize("count", [2, 3])
def test_c10_the_parts_of_processes_are_the_batch_of_one(count):
    config, settings = Batches(tokens=200, buckets=2), {"seed": 5, "multiple": 2}
    rows = ROWS
    whole = stream(config, rows, **settings | {"multiple": 2 * count})
    parts = [stream(config, rows, **settings, part=(index, count)) for index in range(count)]
    for step in range(9):
        batches = [part[step] for part in parts]
        assert len({len(batch["source"]) for batch in batches}) == 1
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), array)


def test_lengths_are_multiples_of_what_devices_share():
    batches = stream(Batches(tokens=200, buckets=2), ROWS, seed=5, lengths=7)
    for step in range(9):
        assert {batches[step][name].shape[1] % 7 for name in ("source", "target")} == {0}
        assert sum(batches[step][name].size for name in ("source", "target")) <= 200

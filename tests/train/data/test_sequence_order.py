"""Batches in zigzag order hold the same tokens, labels and coordinates."""

import numpy as np
import pytest

from train.data.batches import collate
from train.data.packing import pack
from train.data.sequence_order import zigzagged

EXAMPLES = [([5, 6, 7], [1, 8, 9, 10, 2]), ([11], [1, 12, 2]), ([13, 14], [1, 15, 16, 17, 18, 19, 2])]


def pairs(batch):
    """Where each input stands in each row, what it is and what its label is, without padding."""
    names = ("target_segment", "target_position", "target", "label")
    rows = zip(*(batch[name] for name in names), strict=True)
    return [sorted(place for place in zip(*row, strict=True) if place[0]) for row in rows]


def test_each_input_keeps_its_place_and_its_label():
    batch = collate(EXAMPLES, (3, 4, 8))
    found = pairs(zigzagged(batch, devices=2))
    expected = [[(1, i, target[i], target[i + 1]) for i in range(len(target) - 1)] for _, target in EXAMPLES]
    assert found == expected


def test_sources_stay_as_they_are():
    batch = collate(EXAMPLES, (3, 4, 8))
    ordered = zigzagged(batch, devices=2)
    np.testing.assert_array_equal(ordered["source"], batch["source"])
    np.testing.assert_array_equal(ordered["source_segment"].sum(axis=1), batch["source_length"])


def test_a_packed_batch_keeps_its_texts_apart():
    rows = pack(EXAMPLES, 8, 16, seed=0)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert pairs(zigzagged(batch, devices=4)) == pairs(batch)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"length \(8\) must be a multiple of twice the devices \(2 \* 3\)"):
        zigzagged(collate(EXAMPLES, (3, 4, 8)), devices=3)

"""The lists of tiles that a block visits."""

import numpy as np

from seqattn.kernels import blocks
from seqattn.kernels.hopper.walk import Walk


def test_a_kind_decides_the_place_in_the_list():
    kinds = np.array([[[blocks.PARTIAL, blocks.EMPTY, blocks.FULL, blocks.PARTIAL]]], np.int32)
    walk = Walk.of(kinds)
    assert walk.counts.tolist() == [[[1, 2]]]
    assert walk.tiles.tolist() == [[[2, 0, 3, 1]]]

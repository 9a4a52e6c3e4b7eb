"""What the pairs of a tile read: arrays, or numbers that the kernel counts itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.plan import prepare
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mods import Alibi
from tests import hopper_plain
from tests.contract import Shape, arrays

SHAPE = Shape(batch=(2,), T=100, S=150, N=2, K=1, H=64, V=64)
POSITIONS = {"q_at": Coordinates.range(SHAPE.T, start=50), "kv_at": Coordinates.range(SHAPE.S)}


def call(located, mask, score_mod=None):
    x = {name: jnp.asarray(each) for name, each in arrays(SHAPE, "bfloat16").items()}
    return Call.of(**x, mask=mask, bias=None, score_mod=score_mod, **located, scale=None, dropout=None)


def test_positions_that_count_are_no_arrays_of_the_kernel():
    _, counted = prepare(call(POSITIONS, Causal() & SlidingWindow(40), Alibi()))
    assert counted.mask == []
    # The slope of each head.
    assert [x.shape for x in counted.mod] == [(1, 2, 1)]
    _, read = prepare(call(jax.tree.map(jnp.asarray, POSITIONS), Causal() & SlidingWindow(40)))
    assert [x.shape for x in read.mask] == [(1, 1, SHAPE.T), (1, 1, SHAPE.S)]


@pytest.mark.parametrize("gap", [0, 7])
def test_positions_that_do_not_count_are_read(gap):
    skipped = {
        name: Coordinates(np.where(at.position < 60, at.position, at.position + np.int32(gap)), at.segment)
        for name, at in POSITIONS.items()
    }
    _, operands = prepare(call(skipped, Causal()))
    assert len(operands.mask) == (2 if gap else 0)


def test_counted_positions_give_the_same_as_positions_that_are_read():
    mask = Causal() & SlidingWindow(40) & SameSegment()
    counted, read = (
        hopper_plain.attend(call(located, mask, Alibi()))
        for located in (POSITIONS, jax.tree.map(jnp.asarray, POSITIONS))
    )
    jax.tree.map(np.testing.assert_array_equal, counted, read)

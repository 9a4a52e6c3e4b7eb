"""What is computed: inputs and work."""

import numpy as np
import pytest

from benchmarks.attention import patterns
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import named

(SHAPE,) = named("b2-t37-n6-k3-d5")


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_useful_work_is_that_of_the_visible_pairs(pattern):
    visible = patterns.dense_mask(pattern, SHAPE)
    forward = 0
    for b, _, t, s in np.ndindex(SHAPE.batch, SHAPE.num_heads, SHAPE.length, SHAPE.size):
        if visible[b % len(visible), 0, t, s]:
            forward += 2 * SHAPE.head_dim + 2 * SHAPE.head_dim  # query . key, weight * value: multiply and add
    assert AttentionCase(SHAPE, pattern, "fwd", "float32").flops == forward
    assert AttentionCase(SHAPE, pattern, "bwd", "float32").flops == 3.5 * forward


def test_inputs_are_the_same_every_time_and_for_both_passes():
    forward, backward = (
        list(AttentionCase(SHAPE, "full", direction, "float32").inputs()) for direction in ("fwd", "bwd")
    )
    assert [x.shape for x in backward] == [(2, 37, 6, 5), (2, 37, 3, 5), (2, 37, 3, 5), (2, 37, 6, 5)]
    assert len(forward) == 3
    for a, b in zip(forward, backward, strict=False):
        np.testing.assert_array_equal(a, b)
    assert len({x.flat[0].item() for x in backward}) == 4


def test_inputs_have_the_dtype():
    assert {x.dtype.name for x in AttentionCase(SHAPE, "full", "bwd", "bfloat16").inputs()} == {"bfloat16"}

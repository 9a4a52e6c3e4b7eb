"""The measured masks, against the library's masks pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention import patterns
from benchmarks.attention.shapes import named
from benchmarks.bench import machine
from seqattn import Alibi, Causal, Coordinates, Prefix, SameSegment, SlidingWindow

(SHAPE,) = named("b3-t547-n5-d2")


def by_pairs(pattern: str) -> np.ndarray:
    """`[B or 1, T, S]`: the mask in the library's words, over coordinates."""
    at = Coordinates.range(SHAPE.length)
    if pattern == "documents":
        at = Coordinates.from_segments(jnp.asarray(patterns.segments(SHAPE)))
    mask = {"documents": Causal() & SameSegment(), "prefix": Causal() | Prefix(SHAPE.length // 4)}
    mask |= {name: Causal() & SlidingWindow(patterns.window(name)) for name in ("window", "window-512")}
    if pattern == "full":
        return np.ones((1, SHAPE.length, SHAPE.length), bool)
    return np.asarray(mask.get(pattern, Causal()).dense(at, at)).reshape(-1, SHAPE.length, SHAPE.length)


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_spans_and_dense_masks_are_the_masks(pattern):
    expected = by_pairs(pattern)
    spans = patterns.spans(pattern, SHAPE)
    np.testing.assert_array_equal(spans.visible(SHAPE.size), expected)
    np.testing.assert_array_equal(patterns.dense_mask(pattern, SHAPE)[:, 0], expected)
    assert spans.pairs(SHAPE.batch) == np.broadcast_to(expected, (SHAPE.batch, *expected.shape[1:])).sum()


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_dense_biases_hide_and_lower_scores(pattern):
    bias = patterns.dense_bias(pattern, SHAPE)
    np.testing.assert_array_equal(bias[:, 0] > -np.inf, by_pairs(pattern))
    if pattern == "alibi":
        np.testing.assert_allclose(bias[0, :, 7, 4], -3 * Alibi.geometric(SHAPE.num_heads), rtol=1e-6)
    else:
        assert set(np.unique(bias)) <= {-np.inf, 0}


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12])
def test_slopes_are_those_of_the_library(num_heads):
    (shape,) = named(f"b1-t1-n{num_heads}-d1")
    np.testing.assert_allclose(patterns.slopes("alibi", shape), Alibi.geometric(num_heads), rtol=1e-6)
    assert not patterns.slopes("causal", shape).any()


def test_documents_are_as_many_as_said_and_the_same_in_every_run():
    segment = patterns.segments(SHAPE)
    np.testing.assert_array_equal(segment, patterns.segments(SHAPE))
    assert all(set(row) == set(range(1, patterns.DOCUMENTS + 1)) for row in segment)
    assert (np.diff(segment) >= 0).all()
    assert patterns.segments(named("b2-t3-n1-d1")[0]).tolist() == [[1, 2, 3]] * 2


def test_between_two_sequences_only_full_has_a_meaning():
    (cross,) = named("b1-t3-s5-n1-d1")
    assert [pattern for pattern in patterns.PATTERNS if patterns.fits(pattern, cross)] == ["full"]
    assert patterns.spans("full", cross).visible(5).shape == (1, 3, 5)


def test_a_mask_that_the_memory_does_not_hold_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    with pytest.raises(NotImplementedError, match="dense mask"):
        patterns.dense_mask("causal", SHAPE)

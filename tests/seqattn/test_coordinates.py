"""Coordinates against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from seqattn.coordinates import Coordinates, Tile


def _same(at, position, segment):
    np.testing.assert_array_equal(at.position, position)
    np.testing.assert_array_equal(at.segment, segment)
    assert at.position.dtype == at.segment.dtype == jnp.int32


def test_range_counts_from_its_start():
    _same(Coordinates.range(3, start=5), [5, 6, 7], [1, 1, 1])
    _same(jax.jit(lambda start: Coordinates.range(3, start=start))(5), [5, 6, 7], [1, 1, 1])
    assert Coordinates.range(0).shape == (0,)
    with pytest.raises(ValueError, match=r"length \(-1\)"):
        Coordinates.range(-1)


@pytest.mark.parametrize("lengths", [[0, 3, 5], [[2], [5]], 4])
def test_from_lengths_pads_on_the_right(lengths):
    shape = (*np.shape(lengths), 5)
    expected = [[int(i < length) for i in range(5)] for length in np.ravel(lengths)]
    at = Coordinates.from_lengths(jnp.array(lengths), 5)
    _same(at, np.broadcast_to(np.arange(5), shape), np.reshape(expected, shape))


def test_from_lengths_takes_a_list_and_an_array_inside_jit():
    """An array from outside is no tracer inside `jit`, but what is computed from it there is."""
    known = jnp.array([1, 3])
    for given_lengths in ([1, 3], known):
        at = jax.jit(lambda given_lengths=given_lengths: Coordinates.from_lengths(given_lengths, 3))()
        _same(at, [[0, 1, 2]] * 2, [[1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(("lengths", "message"), [([1, 4], r"\(4\) exceeds max_length \(3\)"), ([-1, 2], "negative")])
def test_from_lengths_refuses_what_does_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        Coordinates.from_lengths(lengths, 3)


def test_from_lengths_of_a_tracer_counts_a_long_row_as_full():
    _same(jax.jit(lambda lengths: Coordinates.from_lengths(lengths, 2))(jnp.array([7])), [[0, 1]], [[1, 1]])


@given(arrays.arrays(np.bool_, (3, 7)))
def test_from_present_numbers_the_tokens(present):
    at = Coordinates.from_present(jnp.asarray(present))
    np.testing.assert_array_equal(at.segment, present)
    for row in range(3):
        np.testing.assert_array_equal(at.position[row][present[row]], np.arange(present[row].sum()))
        assert at.position[row].min() >= 0


@given(arrays.arrays(np.int32, (2, 11), elements=st.integers(-1, 4)))
def test_from_segments_counts_earlier_tokens_of_the_same_segment(segment):
    expected = [[list(row[:i]).count(row[i]) for i in range(len(row))] for row in segment]
    _same(Coordinates.from_segments(jnp.asarray(segment)), expected, segment)


def test_from_segments_of_any_rank():
    segment = np.array([[[1, 1, 2], [2, 0, 2]], [[0, 0, 0], [3, 3, 3]]])
    expected = [[[0, 1, 0], [0, 0, 1]], [[0, 1, 2], [0, 1, 2]]]
    _same(jax.jit(Coordinates.from_segments)(jnp.asarray(segment)), expected, segment)
    _same(Coordinates.from_segments(jnp.asarray(segment[0, 0])), expected[0][0], segment[0, 0])
    _same(Coordinates.from_segments(jnp.zeros((2, 0), jnp.int32)), np.zeros((2, 0)), np.zeros((2, 0)))


@given(arrays.arrays(np.int32, (3, 7), elements=st.integers(0, 3)))
def test_next_follows_the_last_token(segment):
    at = Coordinates.from_segments(jnp.asarray(segment))
    position, expected = np.zeros((3, 1), int), np.ones((3, 1), int)
    for row in range(3):
        real = np.flatnonzero(segment[row])
        if real.size:
            position[row], expected[row] = np.asarray(at.position)[row, real[-1]] + 1, segment[row, real[-1]]
    _same(at.next(), position, expected)


def test_next_of_nothing_is_a_first_token():
    _same(Coordinates.from_lengths([0, 0], 0).next(), [[0], [0]], [[1], [1]])


def test_next_of_a_text_padded_on_the_left():
    _same(Coordinates.from_present(jnp.array([False, True, True])).next(), [2], [1])


def test_appending_next_continues_the_range():
    at = Coordinates.range(1)
    for _ in range(3):
        at = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), at, at.next())
    _same(at, [0, 1, 2, 3], [1, 1, 1, 1])


def test_a_tile_holds_the_extremes_of_each_row():
    tile = Tile.of(Coordinates(np.array([[3, 1, 2], [4, 4, 4]]), np.array([[1, 0, 5], [2, 2, 2]])))
    fields = (tile.position_min, tile.position_max, tile.segment_min, tile.segment_max)
    np.testing.assert_array_equal(np.stack(fields), [[1, 4], [3, 4], [0, 2], [5, 2]])

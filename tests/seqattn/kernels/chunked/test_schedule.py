"""Which tiles a call visits: every pair that may attend is in exactly one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from seqattn.coordinates import Coordinates
from seqattn.kernels.chunked import schedule as tiles
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Prefix, SameSegment, SlidingWindow
from tests.mask_trees import coordinates, mask_trees

T, S = 13, 17


def _row(at):
    return jax.tree.map(lambda x: x[None], at)


def _visits(grid, schedule):
    """How often each pair is computed without asking the mask, and with: `[2, T, S]` of the first row."""
    counts = np.zeros((2, grid.padded[0], grid.padded[1]), int)
    for kind, steps in enumerate((schedule.full, schedule.partial)):
        number = steps.size if steps.count is None else int(steps.count)
        for lanes, i, block in np.asarray([] if steps.at is None else steps.at)[:number]:
            if lanes == 0:
                queries = slice(i * grid.queries, (i + 1) * grid.queries)
                counts[kind, queries, block * grid.block : block * grid.block + grid.keys] += 1
    return counts[:, : grid.length, : grid.size]


def _check(grid, schedule, dense):
    full, partial = _visits(grid, schedule)
    assert (full + partial).max(initial=0) <= 1, "no pair is computed twice"
    assert (full + partial)[dense].all(), "every pair that may attend is computed"
    assert dense[full > 0].all(), "where the mask is not asked every pair may attend"


@settings(deadline=None, max_examples=60)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_every_visible_pair_is_in_one_tile(mask, q_at, kv_at):
    dense = np.asarray(mask[0].dense(q_at, kv_at))
    for columns in tiles._QUERIES:
        grid = tiles._cut(1, 1, 1, T, S, columns)
        _check(grid, tiles.schedule(grid, mask[0], False, _row(q_at), _row(kv_at)), dense)


@settings(deadline=None, max_examples=20)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_known_at_run_time_is_known_at_trace_time(mask, q_at, kv_at):
    """The same steps in the same order, whether the coordinates are NumPy or traced."""
    grid = tiles._cut(1, 1, 1, T, S, 4)
    static = tiles.schedule(grid, mask[0], False, _row(q_at), _row(kv_at))
    traced = tiles.schedule(grid, mask[0], False, *jax.tree.map(jnp.asarray, (_row(q_at), _row(kv_at))))
    np.testing.assert_array_equal(_visits(grid, static), _visits(grid, traced))


@pytest.mark.parametrize("pairs_shape", [(2, 3, T, S), (1, 1, T, 1), (1, 1, 1, S), (2, 1, 1, 1)])
def test_an_array_of_pairs_is_looked_at_as_well(pairs_shape):
    """A tile in which no row and no head may attend is skipped, whatever the mask is made of."""
    pairs = np.random.default_rng(0).random(pairs_shape) < 0.9
    pairs[:, :, :, : S // 2 if pairs_shape[3] > 1 else None] &= pairs_shape[3] == 1
    at = _row(Coordinates.range(T)), _row(Coordinates.range(S))
    grid = tiles._cut(2, 3, 1, T, S, 4)
    schedule = tiles.schedule(grid, jnp.asarray(pairs), False, *at)
    dense = np.broadcast_to(pairs[0].any(axis=0), (T, S))
    full, partial = _visits(grid, schedule)
    assert (full + partial)[dense].all()
    if pairs_shape[3] > 1:
        assert not (full + partial)[:, : S // 2 // 2 * 2 - grid.keys + 2].any()


def test_a_causal_mask_visits_half_and_asks_on_the_diagonal_only():
    length = 64
    at = _row(Coordinates.range(length))
    grid = tiles._cut(1, 1, 1, length, length, 4)
    full, partial = _visits(grid, tiles.schedule(grid, Causal(), False, at, at))
    index = np.arange(length)
    assert not (full + partial)[index[:, None] + grid.queries + grid.keys <= index].any()
    assert not partial[index[:, None] - grid.queries - grid.keys >= index].any()


def test_tiles_follow_the_edge_of_a_window_and_of_a_text():
    """Tiles of keys begin at any block, so that a window takes no more keys than its own and less than a tile."""
    length = 64
    at = _row(Coordinates.range(length))
    grid = tiles._cut(1, 1, 1, length, length, 4)
    window = _visits(grid, tiles.schedule(grid, Causal() & SlidingWindow(6), False, at, at)).sum(axis=(0, 2))
    assert window.max() <= 6 + grid.queries + grid.keys
    packed = _row(Coordinates.from_segments(jnp.repeat(jnp.arange(1, 5), 16)))
    texts = _visits(grid, tiles.schedule(grid, SameSegment(), False, packed, packed)).sum(axis=(0, 2))
    assert (texts == 16).all()


def test_a_bias_and_a_mask_without_reach_leave_no_tile_full():
    at = _row(Coordinates.range(T)), _row(Coordinates.range(S))
    grid = tiles._cut(1, 1, 1, T, S, 4)
    for mask, biased in ((None, True), (MaskMod(lambda query, key: query.position >= key.position), False)):
        schedule = tiles.schedule(grid, mask, biased, *at)
        # None, and no array without entries: see `Steps`.
        assert (schedule.full.size, schedule.full.at) == (0, None)
    assert tiles.schedule(grid, None, False, *at).partial.size > 0, "the tiles that hold padding"


def test_a_length_known_at_run_time_is_followed():
    """The number of steps depends on the data, the shapes do not."""
    at = _row(Coordinates.range(64))
    grid = tiles._cut(1, 1, 1, 64, 64, 4)
    steps = [
        int(jax.jit(lambda n: tiles.schedule(grid, Prefix(n), False, at, at).full.count)(length))
        for length in (0, 8, 64)
    ]
    assert steps == [0, 2 * 16, 16 * 16]


@pytest.mark.parametrize("shape", [(3, 2, 5, 7, 11), (1, 6, 1, 5, 64), (5, 4, 2, 64, 3), (2, 1, 1, 1, 1)])
@pytest.mark.parametrize("limit", [1, 3, 4, 100])
def test_lanes_divide_the_heads_or_whole_rows(shape, limit, monkeypatch):
    monkeypatch.setattr(tiles, "_LANES", limit)
    grid = tiles._cut(*shape, 4)
    batch, num_kv_heads = shape[:2]
    assert grid.lanes % num_kv_heads == 0 or num_kv_heads % grid.lanes == 0
    assert batch * num_kv_heads % grid.lanes == 0
    assert grid.rows * grid.heads == grid.lanes
    assert grid.padded[0] >= grid.length
    assert grid.padded[1] >= grid.size


def test_short_texts_are_one_step(monkeypatch):
    monkeypatch.setattr(tiles, "_AT_ONCE", 10_000)
    at = _row(Coordinates.range(3))
    grid, schedule = tiles.plan((5, 2, 1, 3, 3), Causal(), False, at, at)
    assert grid.lanes == 10
    assert [steps.size for steps in (schedule.full, schedule.partial)] == [0, 1]

"""The tiles that a mask reaches, and the lists of them: every visible pair is in one step, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from seqattn.coordinates import Coordinates
from seqattn.kernels.blocks import EMPTY, FIRST, FULL, KIND, LAST, PARTIAL, Steps, kinds_of_tiles, reach_of_tiles
from seqattn.masks import Causal, SameSegment, SlidingWindow
from tests.mask_trees import coordinates, mask_trees

T, S, QUERIES, KEYS = 13, 17, 4, 3


def _row(at):
    return jax.tree.map(lambda x: x[None], at)


def _pairs(kinds, kind):
    """Which pairs are in a tile of a kind."""
    return np.repeat(np.repeat(np.asarray(kinds[0]) == kind, QUERIES, 0), KEYS, 1)[:T, :S]


@settings(deadline=None, max_examples=60)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_no_visible_pair_is_in_an_empty_tile_and_no_hidden_one_in_a_full_tile(mask, q_at, kv_at):
    dense = np.asarray(mask[0].dense(q_at, kv_at))
    kinds = kinds_of_tiles(mask[0], _row(q_at), _row(kv_at), QUERIES, KEYS)
    assert not dense[_pairs(kinds, EMPTY)].any()
    assert dense[_pairs(kinds, FULL)].all()


def test_a_tile_with_padding_is_never_full():
    at = Coordinates.range(13), Coordinates.range(17)
    kinds = kinds_of_tiles(None, *map(_row, at), QUERIES, KEYS)
    assert (kinds[0, :3, :5] == FULL).all()
    assert (kinds[0, 3] == PARTIAL).all()
    assert (kinds[0, :, 5] == PARTIAL).all()


@pytest.mark.parametrize("shape", [(2, 3, T, S), (1, 1, T, 1), (1, 1, 1, S), (2, 1, 1, 1)])
def test_the_kinds_of_a_boolean_array_are_those_of_its_pairs(shape):
    mask = np.random.default_rng(0).random(shape) < 0.1
    mask[..., :1] |= np.random.default_rng(1).random((*shape[:3], 1)) < 0.5
    kinds = np.asarray(kinds_of_tiles(jnp.asarray(mask), _row(Coordinates.range(T)), _row(Coordinates.range(S)), 4, 3))
    whole = np.broadcast_to(mask, (*shape[:2], T, S)).any(axis=1)
    for row, i, j in np.ndindex(kinds.shape):
        tile = whole[row, i * 4 : i * 4 + 4, j * 3 : j * 3 + 3]
        assert (kinds[row, i, j] != EMPTY) == tile.any()


def _visits(steps):
    """The steps as rows of (row, outer, inner, kind), and the flags of first and last."""
    number = steps.size if steps.count is None else int(steps.count)
    columns = [np.asarray(x)[:number] for x in (steps.row, steps.outer, steps.inner, steps.flags)]
    assert not np.asarray(steps.flags)[number:].any()
    return np.stack([*columns[:3], columns[3] // KIND], axis=1), columns[3] & FIRST != 0, columns[3] & LAST != 0


@pytest.mark.parametrize("traced", [False, True])
def test_steps_visit_each_tile_once_and_mark_the_ends_of_each_outer_tile(traced):
    kinds = np.random.default_rng(3).integers(0, 3, (2, 5, 7)).astype(np.int32)
    kinds[1, 2] = EMPTY
    visits, first, last = _visits(Steps.of(jnp.asarray(kinds) if traced else kinds))
    seen = np.zeros_like(kinds)
    for row, outer, inner, kind in visits:
        seen[row, outer, inner] += 1
        assert kinds[row, outer, inner] == kind
    assert (seen[kinds != EMPTY] == 1).all()
    # An outer tile without a visible pair has one step, which writes its result.
    assert seen[1, 2].sum() == 1
    assert seen.sum() == (kinds != EMPTY).sum() + 1
    ends = np.flatnonzero(np.any(visits[1:, :2] != visits[:-1, :2], axis=1))
    np.testing.assert_array_equal(np.flatnonzero(last), [*ends, len(visits) - 1])
    np.testing.assert_array_equal(np.flatnonzero(first), [0, *(ends + 1)])


@pytest.mark.parametrize(("mask", "most"), [(Causal(), 136), (Causal() & SlidingWindow(512), 31)])
def test_a_known_mask_visits_the_fewest_tiles(mask, most):
    """T = 8,192 in tiles of 512: the tiles on and below the diagonal, or those that a window touches."""
    at = _row(Coordinates.range(8192))
    assert Steps.of(kinds_of_tiles(mask, at, at, 512, 512)).size == most


def test_texts_that_are_packed_at_run_time_visit_few_tiles_more_than_they_need():
    """Ranges of whole tiles would reach 52 of 256: those where a text ends and the next begins say nothing."""
    starts = np.sort(np.random.default_rng(0).choice(np.arange(1, 8192), 15, replace=False))
    segment = 1 + np.isin(np.arange(8192), starts).cumsum()
    at = _row(Coordinates.from_segments(jnp.asarray(segment)))
    mask = Causal() & SameSegment()
    visited = int((kinds_of_tiles(mask, at, at, 512, 512) != EMPTY).sum())
    same = segment[:, None] == segment[None]
    needed = int((np.tril(same).reshape(16, 512, 16, 512).any(axis=(1, 3))).sum())
    whole = int((jnp.asarray(reach_of_tiles(mask, at, at, 512, 512).some)).sum())
    assert needed <= visited <= 1.1 * needed < whole

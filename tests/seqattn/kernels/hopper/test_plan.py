"""The lists of tiles: complete, without repetition, full tiles first, and no longer than they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call
from seqattn.kernels.hopper.plan import prepare
from seqattn.masks import Causal, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreMod
from seqattn.score_mods import RelativeBuckets

LENGTH, DIM = 1000, 64
GIVEN = {"bias": None, "scale": None, "dropout": None}


def visible_tiles(pairs, queries, keys):
    """For each tile, whether a pair is visible and whether all are and there is no padding."""
    padded = [-(-n // tile) * tile for n, tile in zip(pairs.shape, (queries, keys), strict=True)]
    whole = np.zeros(padded, bool)
    whole[: pairs.shape[0], : pairs.shape[1]] = pairs
    tiles = whole.reshape(-1, queries, padded[1] // keys, keys)
    return tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))


@pytest.mark.parametrize("mask", [Causal(), Causal() & SlidingWindow(300), SlidingWindow(130, ahead=7)], ids=str)
def test_the_lists_hold_the_tiles_that_hold_a_visible_pair(mask):
    at = Coordinates.range(LENGTH)
    x = jnp.zeros((1, LENGTH, 1, DIM), jnp.bfloat16)
    plan, operands = prepare(Call.of(x, x, x, mask=mask, q_at=at, kv_at=at, score_mod=None, **GIVEN))
    some, every = visible_tiles(np.asarray(mask.dense(at, at)), plan.tiling.together, plan.tiling.keys)
    for i, (full, partial) in enumerate(operands.walk.counts[0]):
        listed = list(operands.walk.tiles[0, i])
        assert set(listed[:full]) == set(np.flatnonzero(every[i]))
        assert set(listed[full : full + partial]) == set(np.flatnonzero(some[i] & ~every[i]))
        assert sorted(listed) == list(range(some.shape[1]))


def test_lists_that_are_made_at_run_time_are_those_that_are_known_before():
    rng = np.random.default_rng(0)
    segment = np.sort(rng.integers(1, 9, size=(2, LENGTH)), axis=1).astype(np.int32)
    at = Coordinates.from_segments(jnp.asarray(segment))
    known = jax.tree.map(np.asarray, at)
    x = jnp.zeros((2, LENGTH, 1, DIM), jnp.bfloat16)

    def made(at):
        mask = Causal() & SameSegment()
        operands = prepare(Call.of(x, x, x, mask=mask, q_at=at, kv_at=at, score_mod=None, **GIVEN))[1]
        return operands.walk.counts, operands.walk.tiles

    counts, tiles = made(known)
    assert isinstance(counts, np.ndarray)
    for here, there in zip((counts, tiles), jax.jit(made)(at), strict=True):
        np.testing.assert_array_equal(here, there)


def test_tables_take_smaller_tiles_and_are_refused_at_head_dim_256():
    x = jnp.zeros((1, 5, 2, 128), jnp.bfloat16)
    at = Coordinates.range(5)
    mod = ScoreMod.of(RelativeBuckets(jnp.zeros((32, 2))))
    plain = prepare(Call.of(x, x, x, mask=None, q_at=None, kv_at=None, score_mod=None, **GIVEN))[0]
    searching = prepare(Call.of(x, x, x, mask=None, q_at=at, kv_at=at, score_mod=mod, **GIVEN))[0]
    assert searching.tiling.keys < plain.tiling.keys
    wide = jnp.zeros((1, 5, 2, 256), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"a table of 32 entries .* at head dim 256"):
        prepare(Call.of(wide, wide, wide, mask=None, q_at=at, kv_at=at, score_mod=mod, **GIVEN))


def test_dropout_takes_smaller_tiles_and_is_refused_at_head_dim_256():
    given = {"mask": None, "bias": None, "score_mod": None, "q_at": None, "kv_at": None, "scale": None}
    dropped = Dropout(0.5, jax.random.key(0))
    x, wide = (jnp.zeros((1, 5, 2, dim), jnp.bfloat16) for dim in (128, 256))
    plain, drawing = (prepare(Call.of(x, x, x, **given, dropout=each))[0] for each in (None, dropped))
    assert drawing.tiling.keys < plain.tiling.keys
    with pytest.raises(NotImplementedError, match="dropout leaves too few registers at head dim 256"):
        prepare(Call.of(wide, wide, wide, **given, dropout=dropped))

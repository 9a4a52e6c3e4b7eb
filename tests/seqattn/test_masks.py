"""Masks mean what they say for every pair, and `reach` never lies about a tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqattn.coordinates import Coordinates, Tile
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Dilated, Neighborhood, NotPadding, Prefix, SameBlock, SameSegment, SlidingWindow
from tests import oracle
from tests.mask_trees import coordinates, mask_trees

T, S, QUERY_TILE, KEY_TILE = 7, 11, 3, 2


def _tiles(at, size):
    """Runs of `size` tokens (the last may be shorter) with their slices."""
    slices = [slice(i, i + size) for i in range(0, at.shape[-1], size)]
    return [(part, jax.tree.map(lambda x, part=part: x[part], at)) for part in slices]


def _reaches(mask, q_at, kv_at):
    """For each pair of tiles: the slices and the reach, as Python booleans."""
    for rows, query in _tiles(q_at, QUERY_TILE):
        for columns, key in _tiles(kv_at, KEY_TILE):
            reach = mask.reach(Tile.of(query), Tile.of(key))
            yield (rows, columns), bool(reach.some), bool(reach.every)


@given(mask_trees(), coordinates(T), coordinates(S))
def test_dense_is_the_predicate_of_each_pair(tree, q_at, kv_at):
    mask, predicate = tree
    np.testing.assert_array_equal(mask.dense(q_at, kv_at), oracle.pairs(predicate, q_at, kv_at))


@settings(max_examples=100)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_reach_is_sound_where_coordinates_are_known(tree, q_at, kv_at):
    mask, predicate = tree
    whole = oracle.pairs(predicate, q_at, kv_at)
    for tile, some, every in _reaches(mask, q_at, kv_at):
        assert some or not whole[tile].any()
        assert not every or whole[tile].all()


@settings(max_examples=8)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_reach_is_the_same_where_coordinates_are_traced(tree, q_at, kv_at):
    mask, _ = tree

    @jax.jit
    def traced(mask, q_at, kv_at):
        return [
            (jnp.asarray(reach.some), jnp.asarray(reach.every))
            for _, query in _tiles(q_at, QUERY_TILE)
            for _, key in _tiles(kv_at, KEY_TILE)
            for reach in [mask.reach(Tile.of(query), Tile.of(key))]
        ]

    known = [(some, every) for _, some, every in _reaches(mask, q_at, kv_at)]
    assert [(bool(some), bool(every)) for some, every in traced(mask, q_at, kv_at)] == known


CONTIGUOUS = [
    Causal(),
    ~Causal(),
    SlidingWindow(3),
    SlidingWindow(2, ahead=1),
    SameSegment(),
    NotPadding(),
    Prefix(5),
    Dilated(1),
    Dilated(5),
    SameBlock(3),
]


@pytest.mark.parametrize("mask", CONTIGUOUS, ids=repr)
@given(data=st.data())
def test_reach_is_tight_on_contiguous_tiles(mask, data):
    """For packed texts without padding a kernel skips and leaves unmasked exactly the tiles that it may."""
    segments = st.lists(st.booleans(), min_size=S, max_size=S).map(lambda ends: 1 + np.cumsum(ends).astype(np.int32))
    start = data.draw(st.integers(0, 9))
    at = Coordinates(np.arange(start, start + S, dtype=np.int32), data.draw(segments))
    whole = np.asarray(mask.dense(at, at))
    for tile, some, every in _reaches(mask, at, at):
        assert some == whole[tile].any()
        assert every == whole[tile].all() or mask == Dilated(5)


@pytest.mark.parametrize("mask", [*CONTIGUOUS, Dilated(2), ~Dilated(2), ~SameSegment(), ~NotPadding()], ids=repr)
def test_reach_is_sound_for_every_pair_of_small_tiles(mask):
    """Two queries and two keys, each at any of four positions in any of four segments: all 65,536 cases at once."""
    tokens = np.stack(np.meshgrid(*[np.arange(16, dtype=np.int32)] * 4), axis=-1).reshape(-1, 4)
    q_at, kv_at = (Coordinates(part // 4, part % 4 - 1) for part in (tokens[:, :2], tokens[:, 2:]))
    whole, reach = np.asarray(mask.dense(q_at, kv_at)), mask.reach(Tile.of(q_at), Tile.of(kv_at))
    assert np.all(reach.some | ~whole.any(axis=(1, 2)))
    assert np.all(~reach.every | whole.all(axis=(1, 2)))


def test_reach_of_batched_tiles_is_that_of_each_row():
    segment = np.array([[1, 1, 2], [2, 2, 2], [0, 0, 0]], np.int32)
    at = Coordinates(np.array([[0, 1, 0], [5, 6, 7], [0, 0, 0]], np.int32), segment)
    mask = Causal() & SameSegment() | ~SlidingWindow(4)
    together = mask.reach(Tile.of(at), Tile.of(at))
    for row in range(3):
        tile = Tile.of(Coordinates(at.position[row], at.segment[row]))
        alone = mask.reach(tile, tile)
        assert (alone.some, alone.every) == (together.some[row], together.every[row])


@pytest.mark.parametrize("batches", [((), (3,)), ((3,), ()), ((2, 1), (2, 3)), ((2, 3), (3,)), ((), ())])
def test_batches_of_queries_and_keys_broadcast(batches):
    random = np.random.default_rng(0)

    def at(batch, length):
        return Coordinates(*(jnp.asarray(random.integers(0, 4, (*batch, length)), jnp.int32) for _ in range(2)))

    q_at, kv_at = at(batches[0], T), at(batches[1], S)
    expected = oracle.pairs(lambda qp, qs, kp, ks: kp <= qp and qs == ks and qs != 0, q_at, kv_at)
    np.testing.assert_array_equal((Causal() & SameSegment()).dense(q_at, kv_at), expected)


def test_a_mask_is_a_pytree_through_jit_and_vmap():
    at = Coordinates.range(5)
    lengths = jnp.array([0, 2, 5])
    masks = jax.vmap(lambda length: Causal() | Prefix(length))(lengths)
    dense = jax.jit(jax.vmap(lambda mask: mask.dense(at, at)))(masks)
    for row, length in enumerate([0, 2, 5]):
        expected = oracle.pairs(lambda qp, qs, kp, ks, length=length: kp <= qp or kp < length, at, at)
        np.testing.assert_array_equal(dense[row], expected)


def test_sizes_are_static_and_arrays_are_leaves():
    assert jax.tree.leaves(Causal() & SlidingWindow(3, ahead=2) | ~Dilated(2)) == []
    assert jax.tree.leaves(MaskMod(lambda query, key, size: query.position < size, 7) & Prefix(3)) == [7, 3]


def test_a_jitted_function_compiles_once_for_equal_masks():
    traces = []

    @jax.jit
    def dense(mask, at):
        traces.append(mask)
        return mask.dense(at, at)

    dense(Causal() & SlidingWindow(2), Coordinates.range(3))
    dense(Causal() & SlidingWindow(2), Coordinates.range(3, start=4))
    dense(Causal() & SlidingWindow(3), Coordinates.range(3))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlidingWindow(0), r"sliding window \(0\) must be an integer of at least 1"),
        (lambda: SlidingWindow(-2), r"sliding window \(-2\)"),
        (lambda: SlidingWindow(3, ahead=-1), r"keys ahead \(-1\)"),
        (lambda: Dilated(0), r"dilated mask \(0\)"),
        (lambda: Prefix(-1), r"prefix \(-1\)"),
        (lambda: Prefix(jnp.array([2, -1])), r"prefix \(-1\) must be an integer of at least 0"),
        (lambda: Prefix(jnp.array(1.5)), "prefix must be an integer, got float32"),
    ],
)
def test_a_size_that_means_nothing_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("other", [True, np.ones((2, 2), bool), None])
def test_only_masks_combine(other):
    with pytest.raises(TypeError, match="a Mask combines with another Mask"):
        Causal() & other
    with pytest.raises(TypeError, match="a Mask combines with another Mask"):
        Causal() | other


@pytest.mark.parametrize("result", [jnp.array(1), jnp.array([True])], ids=["integer", "vector"])
def test_a_predicate_must_return_a_scalar_boolean(result):
    at = Coordinates.range(2)
    with pytest.raises(TypeError, match="must return a scalar boolean"):
        MaskMod(lambda query, key: result).dense(at, at)


def _window_of_head(sizes):
    return MaskMod(lambda query, key: query.position - key.position < sizes[query.head])


def _length_of_row(lengths):
    return MaskMod(lambda query, key: key.position < lengths[query.batch])


def test_a_mask_may_read_head_and_row():
    """Also below `&`, `|` and `~`; only what is read makes the matrix larger."""
    at, sizes, lengths = Coordinates.range(5), jnp.array([1, 3, 2]), jnp.array([2, 4])
    q, k = np.arange(5)[:, None], np.arange(5)
    near = np.stack([q - k < n for n in (1, 3, 2)])
    real = np.stack([np.broadcast_to(k < n, (5, 5)) for n in (2, 4)])
    one = jax.tree.map(lambda x: x[None], at)
    by_head, by_row = _window_of_head(sizes), _length_of_row(lengths)
    for mask, expected in (
        (Causal(), (q >= k)[None, None]),
        (Causal() & by_head, ((q >= k) & near)[None]),
        (~by_row | Causal(), (~real | (q >= k))[:, None]),
        (by_row & ~by_head, real[:, None] & ~near[None]),
    ):
        found = jax.jit(lambda mask=mask: mask.over(one, one, batch=2, num_heads=3))()
        np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal((Causal() & by_head).dense(at, at, num_heads=3), (q >= k) & near)


def test_a_prefix_may_have_a_length_for_each_row():
    lengths = jnp.array([1, 3])
    rows = jax.tree.map(lambda x: np.stack([x, x]), Coordinates.range(4))
    np.testing.assert_array_equal(
        (Causal() | Prefix(lengths)).dense(rows, rows),
        jax.vmap(lambda n: (Causal() | Prefix(n)).dense(Coordinates.range(4), Coordinates.range(4)))(lengths),
    )
    with pytest.raises(ValueError, match=r"lengths \(2,\) of a prefix must be one for each of the 3 rows"):
        Prefix(lengths).check(3, 1)


GRIDS = [(Coordinates.grid(5, 7), Coordinates.grid(5, 7)), (Coordinates.grid(3, 2), Coordinates.grid(4, 3))]


@pytest.mark.parametrize(("query", "key"), GRIDS, ids=["alike", "apart"])
@pytest.mark.parametrize("radius", [0, 1, (2, 1), (0, 9)], ids=str)
def test_a_neighborhood_is_near_along_every_axis(query, key, radius):
    expected = np.ones((query.shape[0], key.shape[0]), bool)
    for a, b, r in zip(query.axes, key.axes, radius if isinstance(radius, tuple) else (radius,) * 2, strict=True):
        expected &= np.abs(a[:, None] - b[None]) <= r
    mask = Neighborhood(radius)
    np.testing.assert_array_equal(mask.dense(query, key), expected)
    for combined in (mask, ~mask, mask & Causal(), mask | SameSegment()):
        whole = np.asarray(combined.dense(query, key))
        for size in (1, 3, 6):
            for first in range(0, query.shape[0] - size, size):
                for at in range(0, key.shape[0] - size, size):
                    rows, columns = slice(first, first + size), slice(at, at + size)
                    tiles = (Tile.of(jax.tree.map(lambda x, s=s: x[s], y)) for y, s in ((query, rows), (key, columns)))
                    reach = combined.reach(*tiles)
                    assert reach.some or not whole[rows, columns].any()
                    assert not reach.every or whole[rows, columns].all()
    tight = mask.reach(Tile.of(query), Tile.of(jax.tree.map(lambda x: x + 99, key)))
    assert not tight.some


def test_a_neighborhood_without_as_many_axes_is_refused():
    with pytest.raises(ValueError, match=r"needs coordinates with as many axes, .* got 0 of the queries"):
        Neighborhood(1).dense(Coordinates.range(3), Coordinates.range(3))
    with pytest.raises(ValueError, match=r"radius \(1, 2, 3\) needs .* got 2"):
        Neighborhood((1, 2, 3)).dense(*GRIDS[0])
    with pytest.raises(ValueError, match=r"radius of a neighborhood \(-1\)"):
        Neighborhood((1, -1))

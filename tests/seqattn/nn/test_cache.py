"""Caches: whatever the pieces, a query sees what it would see without a cache; hypotheses see their own tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from seqattn.coordinates import Coordinates
from seqattn.hypotheses import branch, select
from seqattn.kernels.dispatch import IMPLEMENTATIONS
from seqattn.mask import MaskMod
from seqattn.masks import Causal, NotPadding, SameSegment, SlidingWindow
from seqattn.nn import KeyColumns, KeyValue, MultiHeadAttention, PagedCache, RingCache, Rotary, StaticCache
from tests.contract import OVER_A_CACHE

B, T, D, N, K, H, WINDOW = 3, 11, 6, 4, 2, 2, 3
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@functools.cache
def _attention(window: int | None = None) -> MultiHeadAttention:
    mask = (Causal() if window is None else SlidingWindow(window)) & SameSegment()
    sizes = {"num_heads": N, "num_kv_heads": K, "head_dim": H}
    return MultiHeadAttention(D, mask=mask, rotary=Rotary(50.0), **sizes, rngs=nnx.Rngs(0))


@jax.jit
def _full(attention, x) -> jax.Array:
    at = Coordinates.range(x.shape[1])
    return attention(x, at, attention.project(x, at))


@jax.jit
def _append(attention, cache, x, at):
    cache, seen = cache.append(attention.project(x, at))
    return cache, attention(x, at, seen)


def _empty(window: int | None):
    return StaticCache.empty(B, 2 * T, K, H) if window is None else RingCache.empty(B, window, K, H)


def _piece(lengths, start) -> tuple[jax.Array, Coordinates, np.ndarray]:
    """Of row b the tokens from `start[b]` on, `lengths[b]` of them, and NaN behind: tokens, coordinates, which."""
    longest = max(lengths)
    x, real = np.full((B, longest, D), np.nan, np.float32), np.arange(longest) < np.asarray(lengths)[:, None]
    for row, (count, first) in enumerate(zip(lengths, start, strict=True)):
        x[row, :count] = X[row, first : first + count]
    position = np.where(real, np.arange(longest) + np.asarray(start)[:, None], 0)
    return jnp.asarray(x), Coordinates(jnp.asarray(position, jnp.int32), jnp.asarray(real, jnp.int32)), real


PIECES = {
    "tokens": [(1, 1, 1)] * T,
    "at_once": [(T, T, T)],
    "ragged": [(5, 1, 3), (2, 7, 1), (1, 1, 1), (1, 1, 4)],
    "with_nothing": [(4, 0, 2), (0, 3, 2), (1, 1, 1)],
    "longer_than_the_window": [(1, 2, 3), (9, 4, 5)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [None, WINDOW], ids=["static", "ring"])
def test_cached_is_full_for_ragged_pieces_of_any_size(window, pieces):
    attention, cache, start = _attention(window), _empty(window), np.zeros(B, int)
    expected = _full(attention, X)
    for lengths in pieces:
        x, at, real = _piece(lengths, start)
        cache, output = _append(attention, cache, x, at)
        for row in range(B):
            wanted = expected[row, start[row] : start[row] + lengths[row]]
            np.testing.assert_allclose(np.asarray(output)[row, real[row]], wanted, atol=1e-5)
        start += np.asarray(lengths)
    assert not np.any(cache.overflowed)


def test_a_ring_holds_the_window_alone():
    cache = RingCache.empty(B, WINDOW, K, H)
    sizes = [leaf.shape for leaf in jax.tree.leaves(cache)]
    for _ in range(2 * WINDOW):
        tokens = KeyValue(jnp.ones((B, 5, K, H)), jnp.ones((B, 5, K, H)), Coordinates.range(5))
        cache, _ = cache.append(tokens)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == sizes
    assert cache.columns.size == WINDOW


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match=r"window \(0\) must be an integer of at least 1"):
        RingCache.empty(B, 0, K, H)


PARENTS = [(0, 0), (1, 0), (1, 1), (0, 1), (1, 0)]


@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["paged", "ring"])
def test_each_hypothesis_sees_its_own_history(window, prompt):
    """Two hypotheses a row that part and take each other's place, against each history on its own without a cache."""
    attention, cache = _attention(window), _empty(window)
    random = np.random.default_rng(1)
    if prompt:
        x, at, _ = _piece((prompt,) * B, (0,) * B)
        cache, _ = cache.append(attention.project(x, at))
    cache = branch(cache, 2)
    assert isinstance(cache, PagedCache if window is None else RingCache)

    choose = jax.jit(select)
    histories = [[X[row, :prompt] for _ in range(2)] for row in range(B)]
    for count, parent in enumerate(PARENTS):
        tokens = random.normal(size=(B, 2, D)).astype(np.float32)
        position = jnp.full((B, 2), prompt + count, jnp.int32)
        cache, output = _append(attention, cache, jnp.asarray(tokens), Coordinates(position, jnp.ones_like(position)))
        for row, hypotheses in enumerate(histories):
            for beam in range(2):
                hypotheses[beam] = np.concatenate([hypotheses[beam], tokens[row, beam][None]])
                padded = np.zeros((1, T, D), np.float32)  # one shape for all lengths: what follows is not seen
                padded[0, : len(hypotheses[beam])] = hypotheses[beam]
                wanted = _full(attention, padded)[0, len(hypotheses[beam]) - 1]
                np.testing.assert_allclose(output[row, beam], wanted, atol=1e-5)
        by_row = [parent if row else parent[::-1] for row in range(B)]
        cache = choose(cache, jnp.asarray(by_row, jnp.int32))
        histories = [[histories[row][j] for j in by_row[row]] for row in range(B)]


def _token(bad: float = 1.0) -> KeyValue:
    at = Coordinates(jnp.zeros((B, 2), jnp.int32), jnp.ones((B, 2), jnp.int32))
    key = jnp.ones((B, 2, K, H)).at[0, 1].set(bad)
    return KeyValue(key, jnp.ones((B, 2, K, H)), at)


def test_the_pages_move_no_key():
    cache = branch(StaticCache.empty(B, 4, K, H), 2)
    cache, _ = cache.append(_token())
    moved = select(cache, jnp.array([[1, 1], [0, 1], [1, 0]]))
    for a, b in zip(jax.tree.leaves(moved.columns), jax.tree.leaves(cache.columns), strict=True):
        assert a is b
    np.testing.assert_array_equal(moved.table[:, :, 0], [[1, 1], [0, 1], [1, 0]])


def test_a_hypothesis_that_is_not_finite_leaves_no_trace_in_the_others():
    attention, outputs = _attention(), []
    x = jnp.ones((B, 2, D))
    for bad in (1.0, np.nan):
        _, seen = branch(StaticCache.empty(B, 4, K, H), 2).append(_token(bad))
        outputs.append(np.asarray(attention(x, _token().at, seen)))
    assert np.all(np.isnan(outputs[1][0, 1]))
    np.testing.assert_array_equal(outputs[1][0, 0], outputs[0][0, 0])
    np.testing.assert_array_equal(outputs[1][1:], outputs[0][1:])


@pytest.mark.parametrize("beams", [1, 2], ids=["static", "paged"])
def test_a14_past_the_end_is_an_error_and_inside_jit_a_flag_and_nan(beams):
    attention, room = _attention(), 2
    cache = StaticCache.empty(B, room, K, H)
    cache = cache if beams == 1 else branch(cache, beams)
    at = Coordinates(jnp.zeros((B, beams), jnp.int32), jnp.ones((B, beams), jnp.int32))
    x = jnp.ones((B, beams, D))

    for _ in range(room):
        cache, output = _append(attention, cache, x, at)
        assert np.all(np.isfinite(output))
        assert not np.any(cache.overflowed)
    with pytest.raises(ValueError, match="do not fit at slot"):
        cache.append(attention.project(x, at))
    cache, output = _append(attention, cache, x, at)
    assert np.all(np.isnan(output))
    assert np.all(cache.overflowed)
    assert np.all(_append(attention, cache, x, at)[0].overflowed), "the flag stays"


def test_a_cache_of_a_length_that_is_not_known_at_trace_time_branches_too():
    """All its slots count as the prompt then."""
    attention = _attention()
    x, at, _ = _piece((4,) * B, (0,) * B)
    cache, _ = StaticCache.empty(B, 6, K, H).append(attention.project(x, at))
    later, later_at, _ = _piece((1,) * B, (4,) * B)

    @jax.jit
    def step(cache):
        both = [jnp.repeat(a, 2, axis=1) for a in (later, later_at.position, later_at.segment)]
        two_at = Coordinates(*both[1:])
        _, seen = branch(cache, 2).append(attention.project(both[0], two_at))
        return attention(both[0], two_at, seen)

    wanted = _full(attention, X)[:, 4]
    for beam in range(2):
        np.testing.assert_allclose(step(cache)[:, beam], wanted, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    cache = branch(StaticCache.empty(B, 4, K, H), 2)
    with pytest.raises(NotImplementedError, match="a PagedCache already has 2 beams, got 3 more"):
        branch(cache, 3)
    with pytest.raises(ValueError, match="the cache has 2 hypotheses per row, got tokens or parents for 3"):
        select(cache, jnp.zeros((B, 3), jnp.int32))
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], axis=1), _token())
    with pytest.raises(ValueError, match="the cache has 2 hypotheses per row, got tokens or parents for 3"):
        cache.append(three)
    with pytest.raises(ValueError, match="does not fit the cache's"):
        RingCache.empty(B, 3, K + 1, H).append(_token())


def test_columns_of_more_queries_than_are_few_are_read_in_tiles():
    """A long prompt after a short one: the tiled kernel gets the same tokens."""
    attention, length = _attention(), 70
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, length + 3, D)), jnp.float32)
    at = jax.tree.map(lambda field: field[None], Coordinates.range(length + 3))
    cache, outputs = StaticCache.empty(1, length + 3, K, H), []
    for piece in (slice(0, 3), slice(3, None)):
        here, here_at = x[:, piece], jax.tree.map(lambda field, piece=piece: jnp.asarray(field[:, piece]), at)
        cache, seen = cache.append(attention.project(here, here_at))
        assert isinstance(seen, KeyColumns)
        outputs.append(attention(here, here_at, seen))
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), _full(attention, x), atol=1e-5)


def test_what_the_dtype_of_a_cache_cannot_hold_is_not_finite_and_leaves_no_trace():
    cache = StaticCache.empty(B, 4, K, H, dtype=jnp.float16)
    at = jax.tree.map(lambda field: jnp.broadcast_to(jnp.asarray(field), (B, 3)), Coordinates.range(3))
    ones = jnp.ones((B, 3, K, H))
    _, seen = cache.append(KeyValue(ones, ones.at[:, 2].set(1e6), at))
    output = np.asarray(_attention()(jnp.ones((B, 3, D)), at, seen))
    assert np.all(np.isfinite(output[:, :2]))
    assert np.all(np.isnan(output[:, 2]))


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="a cache must have at least 0 slots, got -1"):
        StaticCache.empty(B, -1, K, H)


BEAMS = 2


def _branched(attention, x, lengths, room):
    """What one more token of each hypothesis finds in a cache with `room` for more than `x`; and what was lost."""
    at = Coordinates.from_lengths(lengths, x.shape[1])
    cache, _ = StaticCache.empty(B, x.shape[1] + room, K, H).append(attention.project(x, at))
    position = jnp.broadcast_to(at.next().position, (B, BEAMS))
    after, token = Coordinates(position, jnp.ones_like(position)), jnp.broadcast_to(x[:, :1], (B, BEAMS, D))
    cache, seen = branch(cache, BEAMS).append(attention.project(token, after))
    return attention(token, after, seen), cache.overflowed


def test_a_cache_of_a_symbolic_length_branches_as_any_other(as_users_call_it):
    attention, (length,) = _attention(), export.symbolic_shape("length")
    shapes = jax.ShapeDtypeStruct((B, length, D), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    program = export.export(jax.jit(lambda x, lengths: _branched(attention, x, lengths, 2)))(*shapes)
    for size in (T, 4):
        given = jnp.asarray(X[:, :size]), jnp.array([size, 2, 0], jnp.int32)
        for ours, theirs in zip(program.call(*given), _branched(attention, *given, 2), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_whether_tokens_fit_behind_a_symbolic_length_shows_when_they_do(as_users_call_it):
    """The program cannot be refused, as it is right for some lengths; the others are as inside `jit`."""
    (length,) = export.symbolic_shape("length", constraints=("length <= 5",))

    def fill(x):
        cache, _ = StaticCache.empty(B, 5, K, H).append(_tokens(x))
        cache, seen = cache.append(_tokens(x[:, :2]))
        return cache.overflowed, seen.finite

    def _tokens(x):
        heads = x[..., : K * H].reshape(*x.shape[:2], K, H)
        return KeyValue(heads, heads, Coordinates.from_lengths(jnp.full(B, 2), x.shape[1]))

    program = export.export(jax.jit(fill))(jax.ShapeDtypeStruct((B, length, D), jnp.float32))
    for size in (3, 4):
        overflowed, finite = program.call(jnp.asarray(X[:, :size]))
        assert np.all(np.asarray(overflowed) == (size == 4))
        assert np.all(np.asarray(finite).all(axis=1) == (size == 3))
    (length,) = export.symbolic_shape("length", constraints=("length >= 4", "length <= 5"))
    with pytest.raises(ValueError, match="2 tokens do not fit at slot length into a cache of 5"):
        export.export(jax.jit(fill))(jax.ShapeDtypeStruct((B, length, D), jnp.float32))


ANY_MASK = {
    "none": None,
    "causal": Causal(),
    "window": SlidingWindow(3, ahead=2),
    "not_padding": NotPadding(),
    "all_but_none": ~MaskMod(lambda query, key: jnp.asarray(False)),
}


@pytest.mark.parametrize("few", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("mask", ANY_MASK.values(), ids=ANY_MASK)
def test_unwritten_slots_of_a_cache_are_hidden_whatever_the_mask(mask, few):
    """A step sees what it would see of the written tokens alone, by the kernel of steps and by any other one."""
    implementation = None if few else "reference"
    attention = MultiHeadAttention(
        D, N, num_kv_heads=K, head_dim=H, mask=mask, implementation=implementation, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(X[:, :5])
    expected = attention(x[:, 3:], Coordinates.range(2, start=3), attention.project(x, Coordinates.range(5)))
    for cache in (StaticCache.empty(B, T, K, H), RingCache.empty(B, T, K, H)):
        cache, _ = _append(attention, cache, x[:, :3], Coordinates.range(3))
        _, output = _append(attention, cache, x[:, 3:], Coordinates.range(2, start=3))
        np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [None, Causal()], ids=["none", "causal"])
def test_unwritten_slots_are_hidden_from_hypotheses_that_branch_inside_jit(mask):
    """Where the cache cannot say how much of it is taken, all its slots become pages."""
    attention = MultiHeadAttention(D, N, num_kv_heads=K, head_dim=H, mask=mask, rngs=nnx.Rngs(0))
    x, at = jnp.asarray(X[:, :3]), Coordinates.range(3)

    @jax.jit
    def step(attention, cache, x):
        now = Coordinates(jnp.full((B, 2), 3, jnp.int32), jnp.ones((B, 2), jnp.int32))
        return _append(attention, cache.branch(2), x, now)[1]

    cache, _ = _append(attention, StaticCache.empty(B, T, K, H), x, at)
    output = step(attention, cache, jnp.asarray(X[:, 3:5]))
    for beam in range(2):
        own = jnp.concatenate([x, jnp.asarray(X[:, 3 + beam : 4 + beam])], axis=1)
        expected = attention(own[:, 3:], Coordinates.range(1, start=3), attention.project(own, Coordinates.range(4)))
        np.testing.assert_allclose(output[:, beam : beam + 1], expected, atol=1e-5)


def test_unwritten_slots_are_hidden_in_rows_and_in_weights():
    attention = MultiHeadAttention(D, N, num_kv_heads=K, head_dim=H, mask=Causal(), rngs=nnx.Rngs(0))
    x, at = jnp.asarray(X[:, :5]), Coordinates.range(5)
    _, seen = StaticCache.empty(B, T, K, H).append(attention.project(x, at))
    np.testing.assert_allclose(attention(x, at, seen.rows()), attention(x, at, seen), atol=1e-5)
    expected = attention.weights(x, at, attention.project(x, at))
    for kv in (seen, seen.rows()):
        weights = attention.weights(x, at, kv)
        np.testing.assert_allclose(weights[..., :5], expected, atol=1e-6)
        assert not np.any(weights[..., 5:])


def _beams_of(implementation, **options):
    """A step of two hypotheses a row that branched from three tokens."""
    attention = MultiHeadAttention(
        D, N, num_kv_heads=K, head_dim=H, mask=Causal(), implementation=implementation, rngs=nnx.Rngs(0), **options
    )
    cache, _ = StaticCache.empty(B, T, K, H).append(attention.project(jnp.asarray(X[:, :3]), Coordinates.range(3)))
    now = Coordinates(jnp.full((B, 2), 3, jnp.int32), jnp.ones((B, 2), jnp.int32))
    x = jnp.asarray(X[:, 3:5])
    return attention, x, now, cache.branch(2).append(attention.project(x, now))[1]


@pytest.mark.parametrize("implementation", ["reference", "chunked", *OVER_A_CACHE])
def test_hypotheses_attend_by_the_implementation_that_is_named(implementation, monkeypatch):
    expected, *same = _beams_of(None)
    expected = expected(*same)
    ran, kernel = [], IMPLEMENTATIONS[implementation]
    run = OVER_A_CACHE.get(implementation, kernel.attend)
    spied = dataclasses.replace(kernel, attend=lambda call: ran.append(implementation) or run(call))
    monkeypatch.setitem(IMPLEMENTATIONS, implementation, spied)
    attention, *given = _beams_of(implementation)
    np.testing.assert_allclose(attention(*given), expected, atol=1e-5)
    assert ran == [implementation]


def test_weights_of_hypotheses_are_dropped_by_a_key_or_refused():
    attention, *given = _beams_of(None, dropout_rate=0.5)
    dropped = attention(*given, dropout_key=jax.random.key(0))
    assert np.abs(dropped - attention(*given)).max() > 1e-3
    named, *given = _beams_of("cached", dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match="cached: attention to a cache has no dropout"):
        named(*given, dropout_key=jax.random.key(0))

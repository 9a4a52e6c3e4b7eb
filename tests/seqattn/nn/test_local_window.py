"""The window of local attention against a loop over single queries and keys in NumPy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.nn.local_window import LocalWindow, Monotonic, Predictive
from tests.parameters import drawn

B, T, S, Q, F = 3, 5, 11, 4, 7
RADIUS = 2
QUERY = 2 * np.random.default_rng(0).normal(size=(B, T, Q)).astype(np.float32)
AT = Coordinates(jnp.array([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [9, 9, 10, 11, 40]]), jnp.ones((B, T), jnp.int32))
PRESENT = np.array([[True] * S, [False, True, True, False, False, True, True, True, False, False, True], [False] * S])
SOURCE_AT = Coordinates.from_present(jnp.asarray(PRESENT))
each_kind = pytest.mark.parametrize("local", [Monotonic(RADIUS), Predictive(RADIUS)], ids=["monotonic", "predictive"])


@functools.cache
def _window(local: Monotonic | Predictive) -> LocalWindow:
    return drawn(lambda: LocalWindow(local, Q, F, rngs=nnx.Rngs(0)))


@jax.jit
def _look(window, query, at, source_at):
    return *window(query, at, source_at), window.center(query, at, source_at)


def _by_hand(window: LocalWindow, query: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who is seen, the share of each and the center: Luong 2015, equation 9 and the second factor of equation 10."""
    seen, share, centers = np.zeros((B, T, S), bool), np.ones((B, T, S)), np.zeros((B, T))
    for row in range(B):
        for t in range(T):
            center = float(AT.position[row, t])
            if window.weight is not None:
                hidden = np.tanh(np.asarray(window.weight[...], np.float64) @ query[row, t])
                logit = np.asarray(window.projection[...], np.float64) @ hidden
                center = PRESENT[row].sum() / (1 + np.exp(-logit))
            for s in range(S):
                distance = float(SOURCE_AT.position[row, s]) - center
                seen[row, t, s] = abs(distance) <= RADIUS
                if window.weight is not None:
                    share[row, t, s] = np.exp(-(distance**2) / (2 * (RADIUS / 2) ** 2))
            centers[row, t] = center
    return seen, share, centers


@each_kind
def test_the_window_is_a_loop_over_pairs(local):
    seen, share, center = _look(_window(local), jnp.asarray(QUERY), AT, SOURCE_AT)
    expected = _by_hand(_window(local), QUERY.astype(np.float64))
    np.testing.assert_array_equal(seen, expected[0])
    assert 0 < np.mean(expected[0][:2]) < 1
    np.testing.assert_allclose(center, expected[2], atol=1e-5)
    if isinstance(local, Monotonic):
        assert share is None
    else:
        np.testing.assert_allclose(share, expected[1], atol=1e-5)


@each_kind
def test_any_number_of_leading_dims_and_coordinates_of_one_row(local):
    expected = _look(_window(local), jnp.asarray(QUERY), AT, SOURCE_AT)
    one = jax.tree.map(lambda x: x[1], (jnp.asarray(QUERY), AT, SOURCE_AT))
    more = jax.tree.map(lambda x: x[None, :, None], (jnp.asarray(QUERY), AT, SOURCE_AT))
    shared = (jnp.asarray(QUERY), one[1], one[2])
    for given, pick in ((one, lambda x: x[1]), (more, lambda x: x[None, :, None])):
        for ours, theirs in zip(_look(_window(local), *given), expected, strict=True):
            if theirs is not None:
                np.testing.assert_allclose(ours, pick(theirs), atol=1e-6)
    np.testing.assert_allclose(_look(_window(local), *shared)[2][1], expected[2][1], atol=1e-6)


def test_positions_of_small_floats_are_exact():
    """In bfloat16 positions 256 and 257 would be the same."""
    source_at, at = Coordinates.range(300), Coordinates.range(1, start=257)
    for dtype in (jnp.bfloat16, jnp.float16):
        seen, _, center = _look(_window(Monotonic(RADIUS)), jnp.ones((1, Q), dtype), at, source_at)
        np.testing.assert_array_equal(np.flatnonzero(seen[0]), np.arange(255, 260))
        assert center.dtype == jnp.float32
        half = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), _window(Predictive(RADIUS)))
        _, share, _ = _look(half, jnp.ones((1, Q), dtype), at, source_at)
        assert (share.dtype, share.shape) == (jnp.float32, (1, 300))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), _window(Predictive(RADIUS)))
        _, share, center = _look(double, jnp.asarray(QUERY, jnp.float64), AT, SOURCE_AT)
    assert share.dtype == center.dtype == np.float64
    np.testing.assert_allclose(center, _by_hand(_window(Predictive(RADIUS)), QUERY.astype(np.float64))[2], atol=1e-12)


def test_monotonic_has_no_parameters():
    assert not jax.tree.leaves(_window(Monotonic(RADIUS)))
    assert sorted(x.shape for x in jax.tree.leaves(_window(Predictive(RADIUS)))) == [(F,), (F, Q)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Monotonic(-1), r"the radius of local attention \(-1\) must be an integer of at least 0"),
        (lambda: Predictive(0), r"\(0\) must be an integer of at least 1"),
        (lambda: Predictive(2.5), r"\(2.5\) must be an integer"),
    ],
    ids=["negative", "no width", "fraction"],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_a_radius_that_is_none_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

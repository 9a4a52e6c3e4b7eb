"""Batch normalisation against NumPy in float64, with padding and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn.normalization import BatchNorm, BatchStatistics, Statistic, measurements, move_statistics
from tests.parameters import drawn

B, T, D = 3, 5, 7
X = (10 + 3 * np.random.default_rng(0).normal(size=(B, T, D))).astype(np.float32)
REAL = np.random.default_rng(1).uniform(size=(B, T)) < 0.6
NORM = drawn(lambda: BatchNorm(D, epsilon=1e-3, rngs=nnx.Rngs(0)))
_normalise = jax.jit(lambda norm, x, real, statistics=None: norm(x, real, statistics=statistics))


def _expected(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    scale, shift = (np.asarray(parameter[...], np.float64) for parameter in (NORM.scale, NORM.shift))
    return np.where(REAL[..., None], (x - mean) / np.sqrt(variance + 1e-3) * scale + shift, 0)


def test_a_batch_is_normalised_by_what_is_real_in_it():
    real = X[REAL].astype(np.float64)
    y, statistics = _normalise(NORM, jnp.asarray(X), jnp.asarray(REAL))
    np.testing.assert_allclose(statistics.mean, real.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, real.var(axis=0), rtol=1e-5)
    np.testing.assert_allclose(y, _expected(X, real.mean(axis=0), real.var(axis=0)), atol=1e-5)


def test_given_statistics_are_used_and_given_back():
    given = BatchStatistics(jnp.arange(1.0, D + 1), jnp.arange(2.0, D + 2))
    y, statistics = _normalise(NORM, jnp.asarray(X), jnp.asarray(REAL), given)
    np.testing.assert_allclose(y, _expected(X, np.asarray(given.mean), np.asarray(given.variance)), atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(statistics), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_padding_holds_changes_nothing_forward_and_backward():
    @jax.jit
    def gradients(norm, x):
        def total(norm, x):
            y, statistics = norm(x, jnp.asarray(REAL))
            return jnp.sum(jnp.sin(jnp.arange(1.0, y.size + 1)) * y.ravel()) + statistics.variance.sum()

        return jax.value_and_grad(total, argnums=(0, 1))(norm, x)

    expected = jax.tree.leaves(gradients(NORM, jnp.asarray(X)))
    for filling in (1e6, np.inf, np.nan):
        spoilt = jnp.asarray(np.where(REAL[..., None], X, np.float32(filling)))
        for ours, theirs in zip(jax.tree.leaves(gradients(NORM, spoilt)), expected, strict=True):
            assert np.all(np.isfinite(theirs))
            np.testing.assert_array_equal(ours, theirs)
    assert not np.any(np.asarray(expected[-1])[~REAL])


def test_a_batch_of_padding_gives_zeros():
    y, statistics = _normalise(NORM, jnp.full((B, T, D), jnp.nan), jnp.zeros((B, T), bool))
    assert not np.any(y)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(statistics))


def test_batches_of_several_devices_count_as_one():
    whole, statistics = _normalise(NORM, jnp.asarray(X), jnp.asarray(REAL))
    mapped = jax.vmap(lambda x, real: NORM(x, real, axis_name="devices"), axis_name="devices")
    parts, shared = mapped(jnp.asarray(X), jnp.asarray(REAL))
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    np.testing.assert_allclose(shared.mean, np.tile(statistics.mean, (B, 1)), rtol=1e-5)


def test_running_statistics_move_towards_each_batch():
    old, new = (BatchStatistics(jnp.full(D, value), jnp.full(D, 2 * value)) for value in (1.0, 5.0))
    moved = old.moved(new, momentum=0.75)
    np.testing.assert_allclose(moved.mean, 2.0)
    np.testing.assert_allclose(moved.variance, 4.0)


def test_any_dtype_and_any_number_of_batch_dims():
    with jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float64):
            norm = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), NORM)
            y, statistics = _normalise(norm, jnp.asarray(X[0], dtype), jnp.asarray(REAL[0]))
            assert y.dtype == dtype
            assert statistics.mean.dtype == (jnp.float32 if dtype == jnp.bfloat16 else jnp.float64)
            np.testing.assert_allclose(statistics.mean, X[0][REAL[0]].mean(axis=0), rtol=1e-2)


def _train(norm, x, real):
    return norm(x, real)[0]


def test_a_call_changes_no_statistic_and_measurements_move_them():
    norm = BatchNorm(D, momentum=0.75, rngs=nnx.Rngs(0))
    _, sums = jax.jit(measurements, static_argnums=0)(_train, norm, jnp.asarray(X), jnp.asarray(REAL))
    np.testing.assert_array_equal(norm.mean[...], np.zeros(D))
    real = X[REAL].astype(np.float64)
    for number in range(1, 4):
        before = norm
        norm = move_statistics(norm, sums)
        _, sums = measurements(_train, norm, jnp.asarray(X), jnp.asarray(REAL))
        assert np.all(before.mean[...] != norm.mean[...]), "the model of before stays what it was"
        left = 0.75**number
        np.testing.assert_allclose(norm.mean[...], (1 - left) * real.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(norm.variance[...], left + (1 - left) * real.var(axis=0), rtol=1e-4)


def test_sums_of_parts_are_those_of_the_whole():
    """About a running mean that is far away, too, and with parts of which one has no element."""
    norm = BatchNorm(D, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.full(D, -50.0)
    real = REAL.copy()
    real[1] = False
    whole, *parts = (
        measurements(_train, norm, jnp.asarray(X[part]), jnp.asarray(real[part]))[1][0]
        for part in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3))
    )
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for ours, theirs in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_norms_measure_in_their_order_and_add_up_what_several_calls_do():
    norms = nnx.List([BatchNorm(D, rngs=nnx.Rngs(0)) for _ in range(3)])
    ones = jnp.ones((B, D))

    def call(norms):
        evaluated, _ = norms[1](ones, jnp.ones(B, bool), statistics=norms[1].running)
        return [norms[2](x, jnp.ones(B, bool))[0] for x in (ones, 3 * ones)], evaluated

    _, sums = measurements(call, norms)
    assert [int(each.count[0]) for each in sums] == [0, 0, 2 * B]
    moved = move_statistics(norms, sums)
    for norm in moved[:2]:
        np.testing.assert_array_equal(norm.variance[...], np.ones(D))
    np.testing.assert_allclose(moved[2].mean[...], 0.01 * 2, rtol=1e-5)
    np.testing.assert_allclose(moved[2].variance[...], 0.99 + 0.01, rtol=1e-5)
    with pytest.raises(ValueError, match="2 sums were given for the 3 batch norms"):
        move_statistics(norms, sums[1:])


def test_measurements_that_are_lost_are_an_error():
    x, real = jnp.asarray(X), jnp.asarray(REAL)
    for lossy in (jax.jit, jax.checkpoint):
        with pytest.raises(ValueError, match="none of the 1 batch norms gave its sums"):
            jax.eval_shape(lambda x, lossy=lossy: measurements(lossy(_train), NORM, x, real)[1], x)
    with pytest.raises(ValueError, match="none of the 1 batch norms gave its sums: none was called"):
        measurements(lambda norm, x: x, NORM, x)
    _, sums = measurements(lambda norm, x: norm(x, real, statistics=norm.running), NORM, x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(sums))
    assert measurements(lambda network, x: x, nnx.List([]), 7) == (7, [])


def test_no_gradient_reaches_running_statistics():
    def total(norm):
        return jnp.sum(norm(jnp.asarray(X), jnp.asarray(REAL), statistics=norm.running)[0] ** 2)

    gradients = nnx.state(jax.grad(total)(NORM), Statistic)
    assert len(jax.tree.leaves(gradients)) == 2
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_norm_starts_as_one_and_its_statistics_are_parameters():
    norm = BatchNorm(D, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale[...], np.ones(D))
    np.testing.assert_array_equal(norm.shift[...], np.zeros(D))
    np.testing.assert_array_equal(norm.mean[...], np.zeros(D))
    np.testing.assert_array_equal(norm.variance[...], np.ones(D))
    assert not jax.tree.leaves(nnx.state(norm, nnx.Not(nnx.Param)))
    assert BatchNorm(D, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).mean.dtype == jnp.float32
    for momentum in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=rf"momentum \({momentum}\) must be in \[0, 1\)"):
            BatchNorm(D, momentum=momentum, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dim \(0\) must be an integer of at least 1"):
        BatchNorm(0, rngs=nnx.Rngs(0))
    for epsilon in (-1e-6, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"epsilon \({epsilon}\) must be at least 0 and finite"):
            BatchNorm(D, epsilon=epsilon, rngs=nnx.Rngs(0))

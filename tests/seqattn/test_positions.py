"""Sinusoidal positions and rotations against NumPy float64; a rotation there is a complex product."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.positions import angular_frequencies, rotate, sinusoidal

B, T, N, H = 2, 5, 3, 14
FAR = np.array([255, 256, 257, 4094, 4095])


def _normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def _speeds(dim, base):
    return np.array([base ** (-2 * i / dim) for i in range(dim // 2)])


def _turn(x, position, speeds):
    """`x [*batch, T, N, H]` with feature pairs (i, i + H / 2) as complex numbers, turned by `position * speeds`."""
    x = np.asarray(x, np.float64)
    pairs = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    turned = pairs * np.exp(1j * np.asarray(position)[..., None, None] * speeds)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_sinusoidal_is_vaswanis_formula(base):
    position = np.array([[0, 1, 2], [77, 4094, 4095]])
    expected = np.zeros((2, 3, 6))
    for index in np.ndindex(2, 3):
        for i, speed in enumerate(_speeds(6, base)):
            expected[index][2 * i : 2 * i + 2] = np.sin(position[index] * speed), np.cos(position[index] * speed)
    result = jax.jit(lambda position: sinusoidal(position, 6, base=base))(position)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=5e-4)
    np.testing.assert_allclose(result[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(sinusoidal(jnp.array(2), 6, base=base), expected[0, 2], atol=1e-6)


@pytest.mark.parametrize("batch", [(), (B,), (3, B)])
def test_rotate_is_a_complex_product(batch):
    x, position = _normal(*batch, T, N, H), jnp.asarray(np.random.default_rng(1).integers(0, 50, (*batch, T)))
    result = jax.jit(rotate)(x, position)
    np.testing.assert_allclose(result, _turn(x, position, _speeds(H, 1e4)), atol=2e-5)
    shared = jax.jit(functools.partial(rotate, base=100.0))(x, jnp.arange(T))
    np.testing.assert_allclose(shared, _turn(x, np.arange(T), _speeds(H, 100.0)), atol=2e-5)


def test_a20_rotation_in_bfloat16_is_exact_at_position_4095():
    """Phases in bfloat16 would make 256 and 257 equal and be off by many turns at 4095."""
    x = _normal(len(FAR), N, H, dtype=ml_dtypes.bfloat16)
    result = jax.jit(rotate)(x, FAR)
    assert result.dtype == jnp.bfloat16
    error = np.abs(np.asarray(result, np.float64) - _turn(x, FAR, _speeds(H, 1e4)))
    assert error.max() < 2**-8 * np.abs(np.asarray(x, np.float64)).max() * 2**0.5
    turned = np.asarray(rotate(jnp.broadcast_to(x[:1], x.shape), jnp.asarray(FAR)), np.float64)
    assert np.abs(turned[1] - turned[2]).max() > 0.5


def test_products_of_rotated_vectors_depend_on_the_difference_of_positions_only():
    query, key = _normal(1, 1, H), _normal(1, 1, H, seed=1)

    @jax.jit
    @jax.vmap
    def product(query_position, key_position):
        return jnp.sum(rotate(query, query_position[None]) * rotate(key, key_position[None]))

    start = np.array([0, 3, 500, 4000])
    for difference in (0, 1, 6):
        products = np.asarray(product(start + difference, start))
        np.testing.assert_allclose(products, products[0], atol=3e-3)
    assert np.ptp(product(np.arange(4), np.zeros(4, int))) > 0.1


def test_position_0_changes_nothing_and_lengths_are_kept():
    x = _normal(T, N, H)
    np.testing.assert_array_equal(rotate(x, jnp.zeros(T, jnp.int32)), x)
    lengths = np.linalg.norm(rotate(x, jnp.arange(T)), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    x, direction, position = _normal(T, N, H), _normal(T, N, H, seed=1), jnp.arange(T)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(rotate(x, position) * direction)))(x)
    np.testing.assert_allclose(gradient, _turn(direction, -position, _speeds(H, 1e4)), atol=2e-5)


def test_scaled_frequencies_stretch_positions():
    x, speeds = _normal(T, N, H), angular_frequencies(H)
    stretched = rotate(x, 4 * jnp.arange(T), frequencies=speeds / 4)
    np.testing.assert_allclose(stretched, rotate(x, jnp.arange(T)), atol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = _normal(T, N, H, dtype=np.float64)
        result = rotate(x, jnp.arange(T))
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, _turn(x, np.arange(T), _speeds(H, 1e4)), atol=1e-6)


@pytest.mark.parametrize("dim", [7, 1])
def test_a21_odd_dims_are_refused(dim):
    with pytest.raises(ValueError, match=rf"dim \({dim}\) must be even"):
        rotate(jnp.ones((T, N, dim)), jnp.arange(T))
    with pytest.raises(ValueError, match=rf"dim \({dim}\) must be even"):
        sinusoidal(jnp.arange(T), dim)


@pytest.mark.parametrize("base", [0.0, -2.0, float("nan"), float("inf")])
def test_a_base_must_be_positive(base):
    with pytest.raises(ValueError, match=r"base .* must be positive and finite"):
        angular_frequencies(H, base=base)


def test_frequencies_must_be_half_the_dim():
    with pytest.raises(ValueError, match=r"head_dim \(14\) must be twice the number of frequencies, got .*\(3,\)"):
        rotate(jnp.ones((T, N, H)), jnp.arange(T), frequencies=jnp.ones(3))


def test_only_floating_vectors_are_rotated():
    with pytest.raises(TypeError, match="x must be floating"):
        rotate(jnp.ones((T, N, H), jnp.int32), jnp.arange(T))


@pytest.mark.parametrize("shape", [(1,), (T + 1,), (2, T), ()])
def test_positions_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"position .* must be"):
        rotate(jnp.ones((3, T, N, H)), jnp.zeros(shape, jnp.int32))

"""Rotations with scaled frequencies, of a part of each head, and of neighbouring features."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn import LinearScaling, Llama3Scaling, MultiHeadAttention, Rotary, YarnScaling
from seqattn.positions import rotate

H, T, N = 10, 7, 3
X = np.random.default_rng(0).standard_normal((2, T, N, H)).astype(np.float32)
AT = np.random.default_rng(1).integers(0, 50, (2, T))


def oracle(x: np.ndarray, at: np.ndarray, frequencies: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Turns each pair of features by its angle, in float64."""
    turned = x.astype(np.float64)
    for speed, (i, j) in zip(frequencies, pairs, strict=True):
        angle = at[..., None] * speed
        turned[..., i] = x[..., i] * np.cos(angle) - x[..., j] * np.sin(angle)
        turned[..., j] = x[..., j] * np.cos(angle) + x[..., i] * np.sin(angle)
    return turned


def halves(dim: int) -> list[tuple[int, int]]:
    return [(i, i + dim // 2) for i in range(dim // 2)]


def plain(dim: int, base: float = 10_000.0) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2) / dim)


def test_the_default_is_rotate():
    x, at = jnp.asarray(X), jnp.asarray(AT)
    np.testing.assert_array_equal(Rotary(500.0)(x, at), rotate(x, at, base=500.0))


def test_the_first_part_of_a_head_is_rotated_and_the_rest_is_not():
    turned = np.asarray(Rotary(fraction=0.6)(jnp.asarray(X), jnp.asarray(AT)))
    np.testing.assert_allclose(turned, oracle(X, AT, plain(6), halves(6)), atol=2e-5)
    np.testing.assert_array_equal(turned[..., 6:], X[..., 6:])


def test_neighbours_are_pairs():
    turned = Rotary(50.0, interleaved=True)(jnp.asarray(X), jnp.asarray(AT))
    pairs = [(i, i + 1) for i in range(0, H, 2)]
    np.testing.assert_allclose(turned, oracle(X, AT, plain(H, 50.0), pairs), atol=2e-5)


def test_linear_scaling_divides_positions():
    scaled = Rotary(50.0, LinearScaling(4.0))(jnp.asarray(X), jnp.asarray(4 * AT))
    np.testing.assert_allclose(scaled, oracle(X, AT, plain(H, 50.0), halves(H)), atol=2e-4)


def by_wavelength(frequencies: np.ndarray, scaling: Llama3Scaling) -> list[float]:
    """The rule as the Llama 3.1 report's program states it, by wavelengths."""
    scaled = []
    for speed in frequencies:
        wavelength = 2 * np.pi / speed
        if wavelength < scaling.original_length / scaling.high:
            scaled.append(speed)
        elif wavelength > scaling.original_length / scaling.low:
            scaled.append(speed / scaling.factor)
        else:
            smooth = (scaling.original_length / wavelength - scaling.low) / (scaling.high - scaling.low)
            scaled.append((1 - smooth) * speed / scaling.factor + smooth * speed)
    return scaled


def test_llama_3_keeps_short_waves_and_stretches_long_ones():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    found = np.asarray(Rotary(500.0, scaling).frequencies(64))
    expected = np.array(by_wavelength(plain(64, 500.0), scaling))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    ratio = plain(64, 500.0) / found
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(8)
    assert ((ratio > 1.01) & (ratio < 7.9)).any()


def test_yarn_keeps_short_waves_stretches_long_ones_and_sharpens():
    scaling = YarnScaling(4.0, 64, slow=1.0, fast=8.0)
    rotary = Rotary(500.0, scaling)
    ratio = plain(64, 500.0) / np.asarray(rotary.frequencies(64))
    rotations = 64 * plain(64, 500.0) / (2 * np.pi)
    # The ramp ends at whole indices, so frequencies at its ends belong to it.
    np.testing.assert_allclose(ratio[rotations > 9], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[rotations < 0.8], 4, rtol=1e-5)
    assert (np.diff(ratio) > -1e-4).all()
    turned = np.asarray(rotary(jnp.asarray(X), jnp.asarray(AT)))
    factor = 0.1 * np.log(4) + 1
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), factor * np.linalg.norm(X, axis=-1), rtol=1e-5)
    assert YarnScaling(4.0, attention_factor=1.0).magnitude == 1


@pytest.mark.parametrize(
    ("rotary", "message"),
    [
        (Rotary(0.0), r"base \(0.0\) must be positive"),
        (Rotary(1.0, YarnScaling()), r"base \(1.0\) must be"),
        (Rotary(fraction=0.0), r"fraction \(0.0\) must be"),
        (Rotary(fraction=1.5), r"fraction \(1.5\) must be"),
        (Rotary(fraction=0.5), r"the rotated 0.5 of head_dim \(10\) \(5\) must be even"),
        (Rotary(fraction=0.05), r"the rotated 0.05 of head_dim \(10\) must be at least 2, got 0"),
    ],
)
def test_heads_that_cannot_be_rotated_are_refused(rotary, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(20, 2, rotary=rotary, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(0.5), r"factor \(0.5\) must be"),
        (lambda: Llama3Scaling(high=1.0), r"high \(1.0\) must be"),
        (lambda: Llama3Scaling(original_length=0), r"original_length \(0\) must be"),
        (lambda: YarnScaling(fast=0.5), r"fast \(0.5\) must be"),
        (lambda: YarnScaling(attention_factor=0.0), r"attention_factor \(0.0\) must be positive"),
    ],
)
def test_numbers_that_scale_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

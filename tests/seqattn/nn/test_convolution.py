"""Encoders of images against plain loops over pixels in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from seqattn.nn.convolution import ConvolutionalEncoder, OverBatch, PatchEncoder, sinusoidal_grid
from seqattn.positions import sinusoidal
from tests.parameters import drawn

B, C, D = 2, 3, 8
GREY = np.random.default_rng(0).normal(size=(B, 13, 22)).astype(np.float32)
COLOUR = np.random.default_rng(1).normal(size=(B, 15, 14, C)).astype(np.float32)
_encode = jax.jit(lambda encoder, images: encoder(images))


@functools.cache
def _convolutional(image_channels: int = 1, param_dtype=jnp.float32) -> ConvolutionalEncoder:
    options = {"channels": (5, 7), "image_channels": image_channels, "param_dtype": param_dtype}
    return drawn(lambda: ConvolutionalEncoder(D, **options, rngs=nnx.Rngs(0)))


@functools.cache
def _patches() -> PatchEncoder:
    return drawn(lambda: PatchEncoder(D, patch=(5, 7), image_channels=C, rngs=nnx.Rngs(0)))


def _array(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def _convolve(layer: nnx.Conv, x: np.ndarray) -> np.ndarray:
    """3 x 3 with stride 2, padded on both sides alike, or more behind: half as many places as pixels, rounded up."""
    size = [-(-n // 2) for n in x.shape[1:3]]
    padding = [max(2 * (n - 1) + 3 - length, 0) for n, length in zip(size, x.shape[1:3], strict=True)]
    x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in padding), (0, 0)))
    kernel, out = _array(layer.kernel), np.zeros((len(x), *size, layer.out_features))
    for i, j in np.ndindex(*size):
        out[:, i, j] = np.einsum("bhwc,hwcd->bd", x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return out + _array(layer.bias)


def _expected(encoder: ConvolutionalEncoder, images: np.ndarray) -> np.ndarray:
    x = images.astype(np.float64).reshape(*images.shape[:3], -1)
    for convolution, norm in zip(encoder.convolutions, encoder.norms, strict=True):
        x = _convolve(convolution, x)
        axes = (1, 2, 3)
        x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-6)
        x = np.maximum(x * _array(norm.scale) + _array(norm.bias), 0)
    return x @ _array(encoder.output.kernel) + _array(encoder.output.bias)


def _grid(rows: int, columns: int) -> np.ndarray:
    """Each place's row and column, as section 3 of the Image Transformer has them."""
    row, column = (np.asarray(sinusoidal(jnp.arange(n), D // 2)) for n in (rows, columns))
    return np.stack([np.concatenate([row[i], column[j]]) for i in range(rows) for j in range(columns)])


def test_places_are_told_by_row_and_column():
    np.testing.assert_allclose(sinusoidal_grid(3, 5, D), _grid(3, 5), atol=1e-6)
    assert sinusoidal_grid(0, 0, D).shape == (0, D)


@pytest.mark.parametrize("by_batch", [False, True])
def test_batch_norm_is_by_running_statistics_or_those_of_the_real_images(by_batch):
    encoder = drawn(lambda: ConvolutionalEncoder(D, channels=(5, 7), norm=OverBatch(), rngs=nnx.Rngs(0)))
    for norm in encoder.norms:
        norm.variance[...] = jnp.abs(norm.variance[...]) + 0.5
    images = np.concatenate([GREY, 9 + GREY[:1]])
    x = images.astype(np.float64)[..., None]
    for convolution, norm in zip(encoder.convolutions, encoder.norms, strict=True):
        x = _convolve(convolution, x)
        batch = x[:B].mean((0, 1, 2)), x[:B].var((0, 1, 2))
        mean, variance = batch if by_batch else (_array(norm.mean), _array(norm.variance))
        x = np.maximum((x - mean) / np.sqrt(variance + 1e-5) * _array(norm.scale) + _array(norm.shift), 0)
    expected = (x @ _array(encoder.output.kernel) + _array(encoder.output.bias)).reshape(3, 24, D) + _grid(4, 6)
    run = jax.jit(lambda encoder, images, real: encoder(images, real=real, by_batch=by_batch))
    found = run(encoder, jnp.asarray(images), jnp.array([True, True, False]))
    np.testing.assert_allclose(found[:B], expected[:B], atol=5e-5)


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_convolutions_are_loops_over_places(images):
    encoder = _convolutional(1 if images.ndim == 3 else C)
    rows, columns = encoder.grid(*images.shape[1:3])
    assert (rows, columns) == (4, 6 if images.ndim == 3 else 4)
    expected = _expected(encoder, images).reshape(B, rows * columns, D) + _grid(rows, columns)
    np.testing.assert_allclose(_encode(encoder, jnp.asarray(images)), expected, atol=2e-5)


def test_patches_are_products_with_their_pixels():
    encoder = _patches()
    assert encoder.grid(*COLOUR.shape[1:3]) == (3, 2)
    kernel, bias = _array(encoder.output.kernel), _array(encoder.output.bias)
    pieces = [COLOUR[:, 5 * i : 5 * i + 5, 7 * j : 7 * j + 7].reshape(B, -1) for i in range(3) for j in range(2)]
    expected = np.stack([piece @ kernel + bias for piece in pieces], axis=1) + _grid(3, 2)
    np.testing.assert_allclose(_encode(encoder, jnp.asarray(COLOUR)), expected, atol=2e-5)


@pytest.mark.parametrize("make", [lambda: _convolutional(C), _patches], ids=["convolutional", "patches"])
def test_an_image_is_read_as_it_is_alone(make):
    """No image of a batch depends on another, NaN or not; `vmap` gives what a batch gives."""
    encoder = make()
    whole = np.asarray(_encode(encoder, jnp.asarray(COLOUR)))
    spoilt = np.asarray(_encode(encoder, jnp.asarray(COLOUR).at[0].set(jnp.nan)))
    np.testing.assert_array_equal(spoilt[1], whole[1])
    assert np.isnan(spoilt[0]).all()
    mapped = jax.jit(jax.vmap(encoder))(jnp.asarray(COLOUR)[:, None])
    np.testing.assert_allclose(mapped[:, 0], whole, atol=1e-6)


def test_every_pixel_and_every_parameter_counts():
    def total(encoder, images):
        output = encoder(images)
        return jnp.sum(jnp.sin(jnp.arange(1.0, output.size + 1)) * output.ravel())

    for encoder in (_convolutional(C), _patches()):
        for gradient in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(encoder, jnp.asarray(COLOUR))):
            assert np.all(np.isfinite(gradient))
            assert np.count_nonzero(gradient) > 0.5 * gradient.size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_any_dtype(dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax's norms mix dtypes
        for encoder in (_convolutional(C), _patches()):
            cast = jax.tree.map(lambda x: x.astype(dtype), encoder)
            output = _encode(cast, jnp.asarray(COLOUR, dtype))
            assert output.dtype == dtype
            tolerance = 0.15 if dtype == jnp.bfloat16 else 2e-5
            expected = np.asarray(_encode(encoder, jnp.asarray(COLOUR)))
            np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance)


def test_modules_hold_parameters_alone():
    for encoder in (_convolutional(), _patches()):
        assert not jax.tree.leaves(nnx.state(encoder, nnx.Not(nnx.Param)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: ConvolutionalEncoder(6, rngs=rngs), r"model_dim \(6\) must be a multiple of 4"),
        (lambda rngs: PatchEncoder(2, rngs=rngs), r"model_dim \(2\) must be a multiple of 4"),
        (lambda rngs: ConvolutionalEncoder(8, channels=(), rngs=rngs), r"channels must name at least one"),
        (
            lambda rngs: ConvolutionalEncoder(8, channels=(3, 0), rngs=rngs),
            r"channels\[1\] \(0\) must be an integer of at least 1",
        ),
        (lambda rngs: PatchEncoder(8, patch=(0, 3), rngs=rngs), r"patch\[0\] \(0\) must be an integer of at least 1"),
        (lambda _: _patches()(jnp.zeros((B, 15, 15, C))), r"15 x 15 pixels must be a whole number of patches \(5, 7\)"),
        (lambda _: _patches()(jnp.zeros((B, 15, 14))), r"images \(2, 15, 14\) must be \[B, height, width, 3\]"),
        (
            lambda _: _convolutional()(jnp.zeros((B, 5, 5, 2))),
            r"must be \[B, height, width, 1\] or \[B, height, width\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


@pytest.mark.parametrize("make", [_convolutional, _patches])
def test_an_encoder_is_exported_once_for_images_of_any_size(make, as_users_call_it):
    rows, height, width = export.symbolic_shape("rows, height, width")
    patches = make is _patches
    shape = (rows, 5 * height, 7 * width, C) if patches else (rows, height, width)
    program = export.export(jax.jit(make()))(jax.ShapeDtypeStruct(shape, jnp.float32))
    images = COLOUR if patches else GREY
    for part in (images, images[:1, :10, :7]):
        np.testing.assert_allclose(program.call(jnp.asarray(part)), _encode(make(), jnp.asarray(part)), atol=1e-5)


def test_images_that_may_not_be_whole_patches_are_refused_before_they_come(as_users_call_it):
    shape = export.symbolic_shape("rows, 5 * height, width, 3")
    with pytest.raises(ValueError, match="must be a whole number of patches"):
        export.export(jax.jit(_patches()))(jax.ShapeDtypeStruct(shape, jnp.float32))

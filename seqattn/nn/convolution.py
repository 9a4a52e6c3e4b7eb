"""Image encoders: convolutions or patches turn an image into a sequence of vectors."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from seqattn.checks import check_sizes
from seqattn.nn.initializers import lecun_normal
from seqattn.nn.linear import Linear
from seqattn.nn.normalization import BatchNorm
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule
from seqattn.positions import sinusoidal

RULES = (
    # `[height, width, in, out]`: too small to split.
    ParameterRule("*convolutions/*/kernel", Kind.MATRIX),
    ParameterRule("image/output/kernel", Kind.MATRIX, INTO),
)

_STRIDE = 2


def sinusoidal_grid(rows: int, columns: int, dim: int) -> Float[Array, "S dim"]:
    """Sinusoidal vectors of the cells of a grid, row by row (Parmar 2018, "Image Transformer", section 3).

    The first half of a vector encodes the row, the second half the column.

    Args:
        rows: number of rows.
        columns: number of columns.
        dim: size of a vector. Must be a multiple of 4.

    Returns:
        Float32 vectors `[rows * columns, dim]`.

    Raises:
        ValueError: `dim` is not a multiple of 4.

    >>> import numpy as np
    >>> print(np.asarray(sinusoidal_grid(2, 3, 4)).round(2))
    [[ 0.    1.    0.    1.  ]
     [ 0.    1.    0.84  0.54]
     [ 0.    1.    0.91 -0.42]
     [ 0.84  0.54  0.    1.  ]
     [ 0.84  0.54  0.84  0.54]
     [ 0.84  0.54  0.91 -0.42]]
    """
    _check_grid_dim(dim)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    places = jnp.concatenate([sinusoidal(row, dim // 2), sinusoidal(column, dim // 2)], axis=-1)
    return places.reshape(rows * columns, dim)


@dataclasses.dataclass(frozen=True)
class OverImage:
    """Layer norm over all places and channels of an image (Ba 2016). Images of a batch stay independent.

    A separate norm for each place would amplify the noise of blank paper to the strength of the drawing.
    """


@dataclasses.dataclass(frozen=True)
class OverBatch:
    """Batch norm of each channel over all places of all images of a batch (Ioffe 2015, section 3.2).

    In training the images of a batch are not independent. Each device and each micro-batch has its own statistics.
    Evaluation uses running statistics.
    """

    momentum: float = 0.9
    """Fraction of the running statistics kept at each update, in [0, 1)."""


class ConvolutionalEncoder(nnx.Module):
    """Encodes an image of any size by 3 x 3 convolutions with stride 2.

    Each convolution halves height and width. A norm and a ReLU follow it. A linear layer maps each remaining place to a
    vector, and sinusoidal vectors of its row and column are added (the encoder of Xu 2015, section 3.1.1, trained from
    scratch).

    Args:
        model_dim: D, the size of the vectors. Must be a multiple of 4.
        channels: output channels of each convolution.
        image_channels: channels of the images; 1 for grey.
        norm: the norm after each convolution.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: a size is below 1, `channels` is empty, `model_dim` is not a multiple of 4, or the momentum is not
            in [0, 1).

    >>> encoder = ConvolutionalEncoder(8, channels=(3, 5), rngs=nnx.Rngs(0))
    >>> encoder.grid(13, 30), encoder(jnp.ones((2, 13, 30))).shape
    ((4, 8), (2, 32, 8))
    """

    def __init__(
        self,
        model_dim: int,
        *,
        channels: Sequence[int] = (32, 64, 128),
        image_channels: int = 1,
        norm: OverImage | OverBatch = OverImage(),
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_grid_dim(model_dim)
        if not channels:
            raise ValueError("channels must name at least one convolution, got ()")
        check_sizes(image_channels=image_channels, **{f"channels[{i}]": size for i, size in enumerate(channels)})
        self.image_channels = image_channels
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        convolution = {"strides": _STRIDE, "padding": "SAME", "kernel_init": lecun_normal, **sizes}
        inputs = (image_channels, *channels[:-1])
        self.convolutions = nnx.List(
            [
                nnx.Conv(before, after, kernel_size=(3, 3), **convolution)
                for before, after in zip(inputs, channels, strict=True)
            ]
        )

        def made(size: int) -> nnx.Module:
            if isinstance(norm, OverBatch):
                return BatchNorm(size, momentum=norm.momentum, **sizes)
            return nnx.LayerNorm(size, reduction_axes=(1, 2, 3), **sizes)

        self.norms = nnx.List(map(made, channels))
        self.output = Linear(channels[-1], model_dim, **sizes)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of places for an image of this size in pixels."""
        scale = _STRIDE ** len(self.convolutions)
        return -(-height // scale), -(-width // scale)

    def __call__(
        self,
        images: Float[Array, "B height width *channels"],
        *,
        real: Bool[Array, " B"] | None = None,
        by_batch: bool = False,
    ) -> Float[Array, "B S D"]:
        """Encodes images.

        Args:
            images: `[B, height, width, channels]`, or `[B, height, width]` for grey images.
            real: `[B]`, True for images that are not padding and count in batch statistics. Defaults to all.
            by_batch: if True, batch norm uses the statistics of these images, as in training. If False, running
                statistics.

        Returns:
            Vectors `[B, S, D]` of S = rows * columns places, row by row.

        Raises:
            ValueError: the images do not have `image_channels` channels.
        """
        x = _with_channels(images, self.image_channels)
        real = jnp.ones(x.shape[:1], bool) if real is None else real
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x)
            if isinstance(norm, BatchNorm):
                present = jnp.broadcast_to(real[:, None, None], x.shape[:-1])
                x, _ = norm(x, present, statistics=None if by_batch else norm.running)
            else:
                x = norm(x)
            x = jax.nn.relu(x)
        return _placed(self.output(x))


class PatchEncoder(nnx.Module):
    """Encodes each patch of an image by one linear layer over its pixels (Dosovitskiy 2020, equation 1).

    Patches do not overlap. Sinusoidal vectors of row and column are added, instead of the paper's learned ones, so
    images may have any size.

    Args:
        model_dim: D, the size of the vectors. Must be a multiple of 4.
        patch: height and width of a patch in pixels.
        image_channels: channels of the images; 1 for grey.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: a size is below 1, or `model_dim` is not a multiple of 4.

    >>> encoder = PatchEncoder(8, patch=(4, 5), rngs=nnx.Rngs(0))
    >>> encoder.grid(12, 30), encoder(jnp.ones((2, 12, 30))).shape
    ((3, 6), (2, 18, 8))
    """

    def __init__(
        self,
        model_dim: int,
        *,
        patch: tuple[int, int] = (8, 8),
        image_channels: int = 1,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check_grid_dim(model_dim)
        check_sizes(image_channels=image_channels, **{f"patch[{i}]": size for i, size in enumerate(patch)})
        self.patch, self.image_channels = tuple(patch), image_channels
        pixels = math.prod(patch) * image_channels
        self.output = Linear(pixels, model_dim, param_dtype=param_dtype, rngs=rngs)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches for an image of this size in pixels.

        Raises:
            ValueError: the image is not a whole number of patches.
        """
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(f"an image of {height} x {width} pixels must be a whole number of patches {self.patch}")
        return height // self.patch[0], width // self.patch[1]

    def __call__(self, images: Float[Array, "B height width *channels"]) -> Float[Array, "B S D"]:
        """Encodes images.

        Args:
            images: `[B, height, width, channels]`, or `[B, height, width]` for grey images.

        Returns:
            Vectors `[B, S, D]` of S = rows * columns patches, row by row.

        Raises:
            ValueError: the images are not a whole number of patches, or do not have `image_channels` channels.
        """
        x = _with_channels(images, self.image_channels)
        rows, columns = self.grid(*x.shape[1:3])
        height, width = self.patch
        x = x.reshape(x.shape[0], rows, height, columns, width * self.image_channels)
        # Bring the pixels of a patch together: [B, rows, columns, height, width * channels].
        x = jnp.swapaxes(x, 2, 3)
        return _placed(self.output(x.reshape(x.shape[0], rows, columns, height * width * self.image_channels)))


def _check_grid_dim(dim: int) -> None:
    if dim < 4 or dim % 4:
        raise ValueError(f"model_dim ({dim}) must be a multiple of 4: sine and cosine, for row and column")


def _with_channels(images: Array, channels: int) -> Float[Array, "B height width C"]:
    x = images[..., None] if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[-1] != channels:
        grey = " or [B, height, width]" if channels == 1 else ""
        raise ValueError(f"images {images.shape} must be [B, height, width, {channels}]{grey}")
    return x


def _placed(x: Float[Array, "B rows columns D"]) -> Float[Array, "B S D"]:
    """Flattens the grid to a sequence and adds the vector of each place's row and column."""
    batch, rows, columns, dim = x.shape
    places = sinusoidal_grid(rows, columns, dim).astype(x.dtype)
    return x.reshape(batch, rows * columns, dim) + places[None]

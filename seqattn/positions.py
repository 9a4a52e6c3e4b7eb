"""Position encodings: sinusoidal vectors and rotations (RoPE)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from seqattn.checks import check_number
from seqattn.precision import accumulator


def angular_frequencies(dim: int, *, base: float = 10_000.0) -> Float[Array, "half"]:
    """Returns the angular frequencies `base ** (-2 i / dim)` for i in `[0, dim / 2)`, in radians per position.

    Args:
        dim: the number of features, even and at least 2.
        base: about the ratio of the longest to the shortest wavelength. Must be positive.

    Returns:
        `[dim / 2]` float32.

    Raises:
        ValueError: `dim` is odd or below 2, or `base` is not positive.

    >>> angular_frequencies(4)
    Array([1.  , 0.01], dtype=float32)
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim ({dim}) must be even and at least 2: each frequency takes a pair of features")
    check_number("base", base, above=0)
    return jnp.exp(jnp.arange(0, dim, 2, dtype=jnp.float32) * (-math.log(base) / dim))


def sinusoidal(
    position: Int[Array, "*shape"],
    dim: int,
    *,
    base: float = 10_000.0,
    frequencies: Float[Array, "half"] | None = None,
    interleaved: bool = True,
) -> Float[Array, "*shape dim"]:
    """Returns the sine and cosine of positions at `dim / 2` wavelengths, interleaved (Vaswani 2017, section 3.5).

    `PE(pos, 2i) = sin(pos / base ** (2i / dim))` and `PE(pos, 2i + 1) = cos(pos / base ** (2i / dim))`.

    Args:
        position: integers of any shape.
        dim: the number of features, even and at least 2.
        base: see `angular_frequencies`.
        frequencies: `[dim / 2]`, in radians per position, used instead of `base`.
        interleaved: if False, all sines come before all cosines.

    Returns:
        `[*shape, dim]` float32.

    Raises:
        ValueError: `dim` is odd or below 2, `base` is not positive, or `frequencies` is not `[dim / 2]`.

    For d_model 6 at positions 0, 1 and 2:

    >>> import numpy as np
    >>> print(np.asarray(sinusoidal(jnp.arange(3), 6)).round(4))
    [[ 0.      1.      0.      1.      0.      1.    ]
     [ 0.8415  0.5403  0.0464  0.9989  0.0022  1.    ]
     [ 0.9093 -0.4161  0.0927  0.9957  0.0043  1.    ]]
    """
    speed = angular_frequencies(dim, base=base) if frequencies is None else frequencies
    if speed.shape != (dim // 2,) or dim % 2:
        raise ValueError(f"dim ({dim}) must be twice the number of frequencies, got frequencies {speed.shape}")

    def one(index: Int[Array, ""]) -> Float[Array, "dim"]:
        phase = index.astype(jnp.float32) * speed
        return jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=-1 if interleaved else 0).reshape(dim)

    return jnp.vectorize(one, signature="()->(d)")(jnp.asarray(position))


def rotate(
    x: Shaped[Array, "*batch T N H"],
    position: Int[Array, "..."],
    *,
    base: float = 10_000.0,
    frequencies: Float[Array, "half"] | None = None,
) -> Shaped[Array, "*batch T N H"]:
    """Applies rotary position embeddings (RoFormer: Su 2021).

    Rotates pairs of features by angles proportional to the position. The product of a rotated query and a rotated key
    depends only on the difference of their positions. Feature i is paired with feature i + H / 2, as in GPT-NeoX, Llama
    and Gemma. Angles are computed in float32 for every dtype of `x`: in bfloat16, positions 256 and 257 would be equal.

    Args:
        x: queries or keys `[*batch, T, N, H]`, floating, H even.
        position: integers `[*batch, T]` or `[T]`.
        base: the longest wavelength is about `2 pi base` positions.
        frequencies: `[H / 2]`, in radians per position, used instead of `base`, for example scaled frequencies
            (position interpolation, NTK).

    Returns:
        The rotated vectors `[*batch, T, N, H]`, in the dtype of `x`.

    Raises:
        TypeError: `x` is not floating.
        ValueError: H is odd, `frequencies` is not `[H / 2]`, or the shape of `position` does not fit.
    """
    dim = x.shape[-1]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating to be rotated, got {x.dtype}")
    speed = angular_frequencies(dim, base=base) if frequencies is None else frequencies
    if dim % 2 or speed.shape != (dim // 2,):
        raise ValueError(f"head_dim ({dim}) must be twice the number of frequencies, got frequencies {speed.shape}")
    if position.shape not in (x.shape[:-2], x.shape[-3:-2]):
        raise ValueError(f"position {position.shape} must be {x.shape[:-2]} or {x.shape[-3:-2]} for x {x.shape}")
    high = accumulator(x.dtype)

    def one(vector: Float[Array, "H"], index: Int[Array, ""]) -> Float[Array, "H"]:
        angle = index.astype(jnp.float32) * speed.astype(jnp.float32)
        cosine, sine = jnp.cos(angle).astype(high), jnp.sin(angle).astype(high)
        left, right = jnp.split(vector.astype(high), 2)
        return jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine]).astype(x.dtype)

    over_heads = jax.vmap(one, in_axes=(0, None))
    # Under `jax_numpy_rank_promotion="raise"`, `[T]` does not broadcast to `[*batch, T]` by itself.
    position = position.reshape((1,) * (x.ndim - 2 - position.ndim) + position.shape)
    return jnp.vectorize(over_heads, signature="(n,h),()->(n,h)")(x, position)

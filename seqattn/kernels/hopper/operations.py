"""The operations that the Hopper kernel computes for each pair, and how those that its compiler lacks are rewritten."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.kernels import on_tile

LOG2_E = math.log2(math.e)
"""Exponentials are powers of 2, which is what the hardware computes."""


def _sqrt(x: Array, **_: Any) -> Array:
    """Returns the square root as x / sqrt(x), and 0 for 0."""
    return jnp.where(x == 0, jnp.zeros_like(x), x * lax.rsqrt(x))


def _floor(x: Array, **_: Any) -> Array:
    """Returns the largest integer that is not above x. Numbers of 2^23 and more are integers."""
    whole = x.astype(jnp.int32).astype(x.dtype)
    whole = jnp.where(whole > x, whole - 1, whole)
    return jnp.where(jnp.abs(x) < 2.0**23, whole, x)


def _tanh(x: Array, **_: Any) -> Array:
    """Returns tanh(x) = (1 - t) / (1 + t) with t = exp(-2 |x|): the instruction for tanh has 11 bits."""
    t = jnp.exp2(jnp.abs(x) * (-2 * LOG2_E))
    size = (1 - t) / (1 + t)
    return jnp.where(x < 0, -size, size)


def _logistic(x: Array, **_: Any) -> Array:
    """Returns 1 / (1 + exp(-x))."""
    return 1 / (1 + jnp.exp2(x * -LOG2_E))


def _pow(x: Array, y: Array, **_: Any) -> Array:
    """Returns x to the power of y, for x >= 0."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise NotImplementedError("the Hopper kernel has no power with an exponent that differs by pair")
    return jnp.exp2(y * jnp.log2(x))


def _log1p(x: Array, **_: Any) -> Array:
    """Returns log(1 + x); near 0 the quotient (Kahan) undoes the rounding of 1 + x."""
    near = 1 + x
    rest = near - 1
    exact = jnp.log(near) * (x / jnp.where(rest == 0, jnp.ones_like(rest), rest))
    return jnp.where(rest == 0, x, exact)


_PLAIN = (
    "add sub mul div rem neg abs max min integer_pow square eq ne lt le gt ge and or not xor shift_left "
    "shift_right_logical shift_right_arithmetic exp exp2 log rsqrt sin cos erf sign convert_element_type"
)

HOPPER = on_tile.Device(
    "the Hopper kernel",
    frozenset(_PLAIN.split()),
    {
        "sqrt": _sqrt,
        "floor": _floor,
        "tanh": _tanh,
        "logistic": _logistic,
        "pow": _pow,
        "log1p": _log1p,
        "one_minus_square": on_tile.one_minus_square,
        "add_any": lambda x, y, **_: x + y,  # sums of derivatives
        "stop_gradient": lambda x, **_: x,
        "copy": lambda x, **_: x,
    },
    # Derivatives are operations of their own: see `slope`. The compiler has no primitive for a derivative rule.
    differentiated=False,
)
"""What Pallas Mosaic GPU accepts (jax 0.10.2, compiled for H200), and what is rewritten for it."""


def kept(words: Sequence[Array], rate: float, row: Array, column: Array) -> Array:
    """Returns the same as `seqattn.dropout.kept`, for tiles of 32-bit counters.

    The compiler lacks JAX's primitive for Threefry-2x32 with 20 rounds (Salmon 2011), so the rounds are written out.
    """
    keys = [words[0], words[1], words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA)]
    x, y = row + keys[0], column + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = (y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))
            y = x ^ y
        x, y = x + keys[(group + 1) % 3], y + (keys[(group + 2) % 3] + jnp.uint32(group + 1))
    return (x ^ y) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))

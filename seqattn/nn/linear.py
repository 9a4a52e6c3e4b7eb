"""Linear layers whose gradients a CPU computes without transposing what it need not.

Which of the two forms is compiled follows the platform that a program is compiled for.

XLA's CPU products read their left side by columns only where it has two dims, and sums over rows are slow there. The
gradients of parameters are both: so leading dims become one, and the gradient of a bias is a product with ones. On two
cores that takes a seventh off an update of a Transformer of 3 + 3 layers of 256 and a vocabulary of 8,000 (64 texts of
32 tokens), and a quarter off one of 4 + 4 layers of 128 and a vocabulary of 10,000 (256 texts of 16).

Several CPU devices are there to try what a mesh of others will do, and get the same program as these.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from seqattn.nn.initializers import drawn_wide, lecun_normal
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule
from seqattn.platforms import all_platforms, by_platform, platform_of

RULES = (
    ParameterRule("*bias", Kind.VECTOR),
    ParameterRule("*output/kernel", Kind.MATRIX, INTO),
    ParameterRule("*hidden/kernel", Kind.MATRIX, INTO),
    ParameterRule("*input/kernel", Kind.MATRIX, INTO),
)
"""Of linear layers by their usual names, and of every bias."""


class Linear(nnx.Linear):
    """`nnx.Linear`: its parameters, its values and its derivatives, of which those of parameters are faster on a CPU.

    Its arguments are those of `nnx.Linear`. Parameters below float32 are drawn in float32 and rounded.

    >>> layer = Linear(3, 5, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 7, 3))).shape
    (2, 7, 5)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = nnx.initializers.zeros,
        **options: Any,
    ) -> None:
        options |= {"kernel_init": drawn_wide(kernel_init), "bias_init": drawn_wide(bias_init)}
        super().__init__(in_features, out_features, **options)

    def __call__(self, inputs: Float[Array, "*batch D"], out_sharding: object = None) -> Float[Array, "*batch F"]:
        """`inputs @ kernel + bias`; `out_sharding` as in `nnx.Linear`."""
        asked = (self.precision, self.preferred_element_type, out_sharding)
        plain = self.dot_general is jax.lax.dot_general and asked == (None, None, None)
        if not (plain and _has_rows(inputs)):
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = product(x, kernel)
        return y if bias is None else _shifted(y, bias)


def product(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """`x @ kernel`."""
    if x.ndim < 3 or not _has_rows(x):
        return x @ kernel
    if (platform := platform_of((x, kernel))) is not None:
        return _products(platform)(x, kernel)
    return _product(x, kernel)


def _has_rows(x: Array) -> bool:
    """Whether leading dims may become one: there is a lone device, and they are not split over a mesh by name."""
    return jax.device_count() == 1 and not any(jax.typeof(x).sharding.spec)


def _products(platform: str) -> Callable[[Array, Array], Array]:
    return _product_by_rows if platform == "cpu" else jnp.matmul


# Compiled apart, so that layers of one shape are traced once.
@jax.jit
def _product(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    return by_platform({name: _products(name) for name in all_platforms()}, x, kernel)


def _product_by_rows(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


@jax.custom_jvp
def _shifted(y: Float[Array, "*batch F"], bias: Float[Array, "F"]) -> Float[Array, "*batch F"]:
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@_shifted.defjvp
def _shifted_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    y, (slope, of_bias) = primals[0], tangents
    return _shifted(*primals), slope + _repeated(of_bias, y.shape[:-1])


@functools.partial(jax.jit, static_argnums=1)
def _repeated(x: Float[Array, "F"], batch: tuple[int, ...]) -> Float[Array, "*batch F"]:
    """`x` at each place of a batch. The transpose is a sum, which a CPU computes as a product."""

    def by_product(x: Array) -> Array:
        rows = math.prod(batch)
        return (jnp.ones((rows, 1), x.dtype) @ x[None]).reshape(*batch, x.shape[0])

    def plain(x: Array) -> Array:
        return jnp.broadcast_to(x, (*batch, x.shape[0]))

    return by_platform({name: by_product if name == "cpu" else plain for name in all_platforms()}, x)

"""Linear layers whose gradients a CPU computes without transposing what it need not.

XLA's CPU products read their left side by columns only where it has two dims, and sums over rows are slow there. The
gradients of parameters are both: so leading dims become one, and the gradient of a bias is a product with ones. On two
cores that takes a seventh off an update of a Transformer of 3 + 3 layers of 256 and a vocabulary of 8,000 (64 texts of
32 tokens), and a quarter off one of 4 + 4 layers of 128 and a vocabulary of 10,000 (256 texts of 16).

Several CPU devices are there to try what a mesh of others will do, and get the same program as these.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from seqattn.nn.initializers import drawn_wide, lecun_normal
from seqattn.nn.parameter_rule import INTO, Kind, ParameterRule

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
        if not (plain and _is_by_rows(inputs)):
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = product(x, kernel)
        return y if bias is None else _shifted(y, bias)


def product(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """`x @ kernel`."""
    if x.ndim < 3 or not _is_by_rows(x):
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def _is_by_rows(x: Array) -> bool:
    """Whether a lone CPU computes, and the leading dims of `x` are not split over a mesh by name."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and not any(jax.typeof(x).sharding.spec)


@jax.custom_jvp
def _shifted(y: Float[Array, "*batch F"], bias: Float[Array, "F"]) -> Float[Array, "*batch F"]:
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@_shifted.defjvp
def _shifted_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    y, (slope, of_bias) = primals[0], tangents
    ones = jnp.ones((y.size // max(1, y.shape[-1]), 1), y.dtype)
    return _shifted(*primals), slope + (ones @ of_bias[None]).reshape(y.shape)

"""Local attention: a query attends to a window of source positions (Luong 2015, section 3.2)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from seqattn.checks import check_integer, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.nn.initializers import xavier_uniform
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.precision import accumulator

RULES = (
    ParameterRule("*window/projection", Kind.VECTOR),
    ParameterRule("*window/weight", Kind.MATRIX, P(None, "fsdp"), outputs=-2),
)


@dataclasses.dataclass(frozen=True)
class Monotonic:
    """Local-m: target token t attends to a window around source position t (Luong 2015, section 3.2).

    Raises:
        ValueError: `radius` is not an integer of at least 0.
    """

    radius: int = 10
    """Number of source positions on either side of the center."""

    def __post_init__(self) -> None:
        check_integer("the radius of local attention", self.radius, 0)


@dataclasses.dataclass(frozen=True)
class Predictive:
    """Local-p: the decoder state predicts the center of the window (Luong 2015, equations 9 and 10).

    Weights are multiplied by a Gaussian around the center, with standard deviation `radius / 2`.

    Raises:
        ValueError: `radius` is not an integer of at least 1.
    """

    radius: int = 10
    """Number of source positions on either side of the center."""

    def __post_init__(self) -> None:
        check_integer("the radius of local attention with a Gaussian of half its width", self.radius, 1)


class LocalWindow(nnx.Module):
    """Computes which source positions each query may attend to, and the factor on their weights.

    The center p of a query at position t is `t` (`Monotonic`) or `S * sigmoid(v . tanh(W q))` (`Predictive`, Luong
    2015, equation 9), where S is the number of real tokens of the row's source. A query sees positions at a distance of
    at most `radius` from its center. A separate mask must hide padding.

    Args:
        local: how to find the center, and the radius.
        query_dim: Q, the size of decoder states.
        hidden_dim: F, the size of the hidden layer of `Predictive`.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform) and is not kept.

    Raises:
        ValueError: a size is below 1.

    >>> at, source_at = Coordinates.range(2), Coordinates.range(4)
    >>> window = LocalWindow(Monotonic(radius=1), 5, 7, rngs=nnx.Rngs(0))
    >>> print(window(jnp.ones((2, 5)), at, source_at)[0].astype(int))
    [[1 1 0 0]
     [1 1 1 0]]
    """

    def __init__(
        self,
        local: Monotonic | Predictive,
        query_dim: int,
        hidden_dim: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(query_dim=query_dim, hidden_dim=hidden_dim)

        def draw(*shape: int) -> Array:
            return xavier_uniform(rngs.params(), shape, param_dtype)

        self.radius, predicts = local.radius, isinstance(local, Predictive)
        self.weight = nnx.Param(draw(hidden_dim, query_dim)) if predicts else None
        self.projection = nnx.Param(draw(hidden_dim, 1)[:, 0]) if predicts else None

    def __call__(
        self, query: Float[Array, "*batch T Q"], at: Coordinates, source_at: Coordinates
    ) -> tuple[Bool[Array, "*batch T S"], Float[Array, "*batch T S"] | None]:
        """Computes the window of each query.

        Args:
            query: decoder states `[*batch, T, Q]`.
            at: their coordinates, whose positions count decoder steps.
            source_at: coordinates `[*batch, S]` of the source.

        Returns:
            `[*batch, T, S]`, True for visible positions, and the factors `[*batch, T, S]` on the attention weights
            (float32 or wider), or None for factors of 1.
        """
        position = jnp.broadcast_to(source_at.position, (*query.shape[:-2], source_at.shape[-1]))
        center = self.center(query, at, source_at)
        distance = position[..., None, :].astype(center.dtype) - center[..., :, None]
        # Luong 2015, equation 10: the window has a sharp edge, so only the Gaussian gives the center a gradient.
        share = None if self.weight is None else jnp.exp(-(distance**2) / (2 * (self.radius / 2) ** 2))
        return jnp.abs(distance) <= self.radius, share

    def center(
        self, query: Float[Array, "*batch T Q"], at: Coordinates, source_at: Coordinates
    ) -> Float[Array, "*batch T"]:
        """The center of each query's window (p_t of Luong 2015).

        Returns:
            Source positions `[*batch, T]`, float32 or wider.
        """
        high = accumulator(query.dtype)
        if self.weight is None or self.projection is None:
            return jnp.broadcast_to(at.position, query.shape[:-1]).astype(high)
        # In float32, since bfloat16 cannot represent all integers above 256.
        logits = (jnp.tanh(query @ self.weight[...].T) @ self.projection[...]).astype(high)
        # Count real tokens only, so that padding does not move the center.
        size = jnp.sum(jnp.broadcast_to(source_at.segment, (*query.shape[:-2], source_at.shape[-1])) != 0, axis=-1)
        return size[..., None].astype(high) * nnx.sigmoid(logits)

"""Local attention: a query looks at the source positions around one of them (Luong 2015, section 3.2)."""

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
    """Token t of the target looks around position t of the source: local-m (Luong 2015, section 3.2)."""

    radius: int = 10
    """Source positions to either side that it may look at."""

    def __post_init__(self) -> None:
        check_integer("the radius of local attention", self.radius, 0)


@dataclasses.dataclass(frozen=True)
class Predictive:
    """The decoder's state says around which source position to look: local-p (Luong 2015, equations 9 and 10).

    Weights are multiplied by a Gaussian around that position, of standard deviation `radius / 2`.
    """

    radius: int = 10
    """Source positions to either side that it may look at."""

    def __post_init__(self) -> None:
        check_integer("the radius of local attention with a Gaussian of half its width", self.radius, 1)


class LocalWindow(nnx.Module):
    """Which source positions each query may look at, and how much of their weights it keeps.

    The center `p` of a query at position t is `t` (`Monotonic`) or `S * sigmoid(v . tanh(W q))` (`Predictive`), where
    S is how many tokens the source of the row really has. Positions at a distance of at most the radius are seen;
    that padding is not is the matter of a mask.

    Args:
        local: which center, and the radius.
        query_dim: Q, the size of decoder states.
        hidden_dim: F, the hidden layer of `Predictive`.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform); not kept.

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
        """Who is seen, and by what to multiply the weights (float32 at least; None for 1), `[*batch, T, S]`."""
        position = jnp.broadcast_to(source_at.position, (*query.shape[:-2], source_at.shape[-1]))
        center = self.center(query, at, source_at)
        distance = position[..., None, :].astype(center.dtype) - center[..., :, None]
        share = None if self.weight is None else jnp.exp(-(distance**2) / (2 * (self.radius / 2) ** 2))
        return jnp.abs(distance) <= self.radius, share

    def center(
        self, query: Float[Array, "*batch T Q"], at: Coordinates, source_at: Coordinates
    ) -> Float[Array, "*batch T"]:
        """The source position `[*batch, T]` around which each query looks (Luong's p_t), float32 at least."""
        high = accumulator(query.dtype)
        if self.weight is None or self.projection is None:
            return jnp.broadcast_to(at.position, query.shape[:-1]).astype(high)
        # In float32, as a small float knows no integers above a few hundred.
        logits = (jnp.tanh(query @ self.weight[...].T) @ self.projection[...]).astype(high)
        size = jnp.sum(jnp.broadcast_to(source_at.segment, (*query.shape[:-2], source_at.shape[-1])) != 0, axis=-1)
        return size[..., None].astype(high) * nnx.sigmoid(logits)

"""Dropout (Srivastava 2014) as a value: a rate and the key that decides what is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Zeroes each element with probability `rate` and divides the others by `1 - rate`.

    Nothing stores random state: the same key drops the same elements, and a training step passes a new one.

    Attributes:
        rate: probability in `[0, 1)`, static.
        key: a JAX random key; a leaf, of any shape where `jax.vmap` or `jax.pmap` maps over it.

    >>> print(Dropout(0.5, jax.random.key(0))(jnp.ones(6)))
    [0. 0. 2. 2. 0. 2.]
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Array

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """`x` with some of its elements dropped; its mean is kept."""
        if self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def check_rate(rate: float) -> None:
    """Raises ValueError unless `rate` is a probability below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"the dropout rate ({rate}) must be in [0, 1)")


def drop(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """`Dropout(rate, key)(x)`, or `x` itself where there is no key: evaluation."""
    return x if key is None else Dropout(rate, key)(x)


def split(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """`count` independent keys, or as many Nones where there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))

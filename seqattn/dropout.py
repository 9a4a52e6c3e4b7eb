"""Dropout (Srivastava 2014) as a value: a rate and the key that decides what is dropped."""

import dataclasses

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from seqattn.checks import check_rate
from seqattn.precision import accumulator
from seqattn.pytrees import pytree


@pytree
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
        # In bfloat16 0.9 is 0.898, so that the mean of what is kept would be off by 0.2 %.
        scaled = (x.astype(accumulator(x.dtype)) / (1 - self.rate)).astype(x.dtype)
        return jnp.where(keep, scaled, jnp.zeros_like(x))

    def keep(self, row: Array, column: Array) -> Bool[Array, "..."]:
        """Whether each element of a matrix is kept, known by its indices alone: see `kept`."""
        return kept(self.words(), self.rate, row, column)

    def words(self) -> UInt32[Array, "2"]:
        """The key as two words: a threefry key as it is, of any other kind two that are drawn from it."""
        if str(jax.random.key_impl(self.key)) == "threefry2x32":
            return jax.random.key_data(self.key)
        return jax.random.bits(self.key, (2,), jnp.uint32)


def kept(words: UInt32[Array, "2"], rate: float, row: Array, column: Array) -> Bool[Array, "..."]:
    """Whether the elements at integers `row` and `column` are kept; True with probability `1 - rate`.

    The two are the counter of one block of Threefry (Salmon 2011), and broadcast. An element needs no other one, so
    a matrix may be made in tiles of any form: attention's weights have row `(b * N + n) * T + t` and column `s`.

    >>> words = Dropout(0.5, jax.random.key(0)).words()
    >>> print(kept(words, 0.5, jnp.arange(2)[:, None], jnp.arange(6)[None]).astype(int))
    [[1 1 0 0 1 0]
     [1 1 1 0 1 1]]
    """
    row, column = jnp.broadcast_arrays(row.astype(jnp.uint32), column.astype(jnp.uint32))
    high, low = jax.extend.random.threefry2x32_p.bind(words[0], words[1], row, column)
    return (high ^ low) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_dropout(dropout: object) -> None:
    """Raises TypeError unless it is a `Dropout` or None."""
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a rate with a random key, Dropout(rate, key), or None; got {dropout!r}")


def drop(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """`Dropout(rate, key)(x)`, or `x` itself where there is no key: evaluation."""
    return x if key is None else Dropout(rate, key)(x)


def split(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """`count` independent keys, or as many Nones where there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))

"""Dropout (Srivastava 2014) as a value: a rate and the random key that decides which elements are dropped."""

import dataclasses
from collections.abc import Sequence

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
    """Zeroes each element with probability `rate` and divides the others by `1 - rate` (Srivastava 2014).

    There is no stored random state: the same key drops the same elements. Pass a new key in each training step.

    Attributes:
        rate: the probability of dropping an element, in `[0, 1)`; static.
        key: a JAX random key; a leaf. It may have any shape if `jax.vmap` or `jax.pmap` maps over it.

    Raises:
        ValueError: the rate is not in `[0, 1)`.

    >>> print(Dropout(0.5, jax.random.key(0))(jnp.ones(6)))
    [0. 0. 2. 2. 0. 2.]
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: Array

    def __post_init__(self) -> None:
        check_rate(self.rate)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Returns `x` with some of its elements dropped. The expected value is unchanged."""
        if self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        # In bfloat16 0.9 is 0.898: dividing in that dtype would shift the mean by 0.2 %.
        scaled = (x.astype(accumulator(x.dtype)) / (1 - self.rate)).astype(x.dtype)
        return jnp.where(keep, scaled, jnp.zeros_like(x))

    def keep(self, row: Array, column: Array) -> Bool[Array, "..."]:
        """Returns whether each element of a matrix is kept, from its row and column indices alone. See `kept`."""
        return kept(self.words(), self.rate, row, column)

    def words(self) -> UInt32[Array, "2"]:
        """Returns the key as two words: the data of a threefry key, or two words drawn from any other kind of key."""
        if str(jax.random.key_impl(self.key)) == "threefry2x32":
            return jax.random.key_data(self.key)
        return jax.random.bits(self.key, (2,), jnp.uint32)


def kept(words: UInt32[Array, "2"] | Sequence[Array], rate: float, row: Array, column: Array) -> Bool[Array, "..."]:
    """Returns whether the elements at integers `row` and `column` are kept: True with probability `1 - rate`.

    The words are an array or two scalars. Row and column broadcast. Together they are the counter of one Threefry block
    (Salmon 2011), so that each element is independent of all others and a matrix can be computed in tiles of any shape.
    The attention weight of batch row b, head n, query t and key s has row `(b * N + n) * T + t` and column `s`.

    >>> words = Dropout(0.5, jax.random.key(0)).words()
    >>> print(kept(words, 0.5, jnp.arange(2)[:, None], jnp.arange(6)[None]).astype(int))
    [[1 1 0 0 1 0]
     [1 1 1 0 1 1]]
    """
    row, column = jnp.broadcast_arrays(row.astype(jnp.uint32), column.astype(jnp.uint32))
    high, low = jax.extend.random.threefry2x32_p.bind(words[0], words[1], row, column)
    return (high ^ low) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def check_dropout(dropout: object) -> None:
    """Raises TypeError unless `dropout` is a `Dropout` or None."""
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a rate with a random key, Dropout(rate, key), or None; got {dropout!r}")


def drop(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    """Returns `Dropout(rate, key)(x)`, or `x` itself without a key, as in evaluation."""
    return x if key is None else Dropout(rate, key)(x)


def split(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    """Returns `count` independent keys, or as many Nones without a key."""
    return [None] * count if key is None else list(jax.random.split(key, count))

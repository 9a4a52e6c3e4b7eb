"""How the next token is chosen among logits: the best, or drawn at random with a key for each row."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from seqattn.decoding.processors import LogitsProcessor
from seqattn.pytrees import pytree
from seqattn.top_k import top_k


class Sampling(abc.ABC):
    """A choice of tokens, as a frozen dataclass that is a pytree: base it on this class.

    Attributes:
        filters: applied to the logits, behind all other processors, before a token is chosen.
        random: whether choosing needs keys.
    """

    filters: tuple[LogitsProcessor, ...] = ()
    random: bool = True

    @abc.abstractmethod
    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """One token for each row, by the key of this row and step; int32."""


@pytree
@dataclasses.dataclass(frozen=True)
class Greedy(Sampling):
    """The most probable token, of equal ones the lowest. A key is not looked at."""

    random = False

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """The lowest token of the largest logit."""
        return top_k(logits, 1)[1][:, 0].astype(jnp.int32)


@pytree
@dataclasses.dataclass(frozen=True)
class Sample(Sampling):
    """A token at random, with the probabilities of the filtered logits: `Sample((Temperature(0.7), TopP(0.9)))`.

    It is drawn in float32 by adding Gumbel noise to the logits and taking the largest (Maddison 2014, section 2).

    Attributes:
        filters: logits processors, in order; a leaf.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5, 0.0]] * 8))
    >>> print(Sample().choose(logits, row_keys(jax.random.key(0), 8)))
    [0 1 1 1 1 0 0 0]
    """

    filters: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.filters, LogitsProcessor):
            raise TypeError(f"Sample takes a tuple of filters: Sample(({type(self.filters).__name__}(...),))")

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """One draw for each row, which depends on its own key and logits alone."""
        if keys is None:
            raise ValueError("Sample needs a key for each row, see row_keys")
        return jax.vmap(jax.random.categorical)(keys, logits.astype(jnp.float32)).astype(jnp.int32)


def row_keys(key: Shaped[Array, "..."], num_rows: int) -> Key[Array, "num_rows"]:
    """A key for each row: of one key, `fold_in(key, row)`; keys `[B]`, one for each row, are taken as they are.

    A row that is decoded with its own key `[1]` gives what it gives in a batch. So that this holds for keys of any
    implementation, they become keys of Threefry: "rbg" draws other numbers in a batch than alone.

    Args:
        key: one key or keys `[B]`; typed (`jax.random.key`) or raw (`jax.random.PRNGKey`).
        num_rows: B.

    Raises:
        TypeError: it is no random key.
        ValueError: there is neither one key nor one for each row.

    >>> key = jax.random.key(3)
    >>> print(row_keys(key, 2)[1] == jax.random.fold_in(key, 1))
    True
    """
    key = _threefry(_typed(jnp.asarray(key)))
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_rows))
    if key.shape != (num_rows,):
        raise ValueError(f"give one key, or one for each of {num_rows} rows; got keys of shape {key.shape}")
    return key


def _typed(key: Shaped[Array, "..."]) -> Key[Array, "*rows"]:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if key.dtype != jnp.uint32 or key.ndim == 0:
        raise TypeError(f"a key must come from jax.random.key, got {key.dtype} of shape {key.shape}")
    return jax.random.wrap_key_data(key)


def _threefry(key: Key[Array, "*rows"]) -> Key[Array, "*rows"]:
    """Keys of any implementation as keys of Threefry, each by its own words alone."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key)
    flat = words.reshape(-1, words.shape[-1])
    hashed = jax.random.wrap_key_data(flat[:, :2], impl="threefry2x32")
    for column in flat[:, 2:].T:
        hashed = jax.vmap(jax.random.fold_in)(hashed, column)
    return hashed.reshape(key.shape)

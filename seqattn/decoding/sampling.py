"""Choice of the next token from logits: the most probable one, or a random draw with a key per row."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from seqattn.decoding.processors import LogitsProcessor
from seqattn.pytrees import pytree
from seqattn.top_k import top_k


class Sampling(abc.ABC):
    """Base class of choices: a frozen dataclass registered with `seqattn.pytrees.pytree`.

    Attributes:
        filters: logits processors that run after all others, before the choice.
        random: whether the choice needs keys.
    """

    filters: tuple[LogitsProcessor, ...] = ()
    random: bool = True

    @abc.abstractmethod
    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """Chooses one token per row.

        Args:
            logits: `[B, V]` after all processors and filters.
            keys: `[B]` random keys, one per row for this step; None if `random` is False.

        Returns:
            `[B]` int32 tokens.
        """


@pytree
@dataclasses.dataclass(frozen=True)
class Greedy(Sampling):
    """Chooses the most probable token; ties go to the lowest. Ignores keys."""

    random = False

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """Returns the lowest token with the largest logit, `[B]` int32."""
        return top_k(logits, 1)[1][:, 0].astype(jnp.int32)


@pytree
@dataclasses.dataclass(frozen=True)
class Sample(Sampling):
    """Draws a token with the probabilities of the filtered logits: `Sample((Temperature(0.7), TopP(0.9)))`.

    Draws in float32 with the Gumbel-max trick: adds Gumbel noise to the logits and takes the largest (Maddison 2014,
    section 2).

    Attributes:
        filters: a tuple of logits processors, applied in order; a leaf.

    Raises:
        TypeError: `filters` is a single filter instead of a tuple.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5, 0.0]] * 8))
    >>> print(Sample().choose(logits, row_keys(jax.random.key(0), 8)))
    [0 1 1 1 1 0 0 0]
    """

    filters: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.filters, LogitsProcessor):
            raise TypeError(f"Sample takes a tuple of filters: Sample(({type(self.filters).__name__}(...),))")

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """Draws one token per row `[B]` int32, which depends only on the key and logits of that row.

        Raises:
            ValueError: there are no keys.
        """
        if keys is None:
            raise ValueError("Sample needs a key for each row, see row_keys")
        # A vmap over keys, not one key for the batch: a draw then does not depend on the other rows. float32, since
        # Gumbel noise in bfloat16 has so few values that improbable tokens would never win.
        return jax.vmap(jax.random.categorical)(keys, logits.astype(jnp.float32)).astype(jnp.int32)


def row_keys(key: Shaped[Array, "..."], num_rows: int) -> Key[Array, "num_rows"]:
    """Returns one key per row: `fold_in(key, row)` of a single key; keys `[B]` are kept as given.

    A row decoded alone with its own key `[1]` gives the same result as in a batch. To make this hold for keys of every
    implementation, all keys become Threefry keys: "rbg" draws different numbers in a batch than alone.

    Args:
        key: one key or keys `[B]`; typed (`jax.random.key`) or raw (`jax.random.PRNGKey`).
        num_rows: B.

    Returns:
        `[B]` Threefry keys.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: `key` is neither one key nor one per row.

    >>> key = jax.random.key(3)
    >>> print(row_keys(key, 2)[1] == jax.random.fold_in(key, 1))
    True
    """
    key = _threefry(_typed(jnp.asarray(key)))
    # Folding in the row, instead of splitting, makes a row's key independent of the size of the batch.
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
    """Converts keys of any implementation to Threefry keys, each from its own words only."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    words = jax.random.key_data(key)
    flat = words.reshape(-1, words.shape[-1])
    hashed = jax.random.wrap_key_data(flat[:, :2], impl="threefry2x32")
    # A Threefry key has two words. Folding in the rest keeps keys apart that differ only there.
    for column in flat[:, 2:].T:
        hashed = jax.vmap(jax.random.fold_in)(hashed, column)
    return hashed.reshape(key.shape)

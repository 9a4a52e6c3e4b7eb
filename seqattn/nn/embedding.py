"""Embedding tables: tokens with tied logits, and learned positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqattn.checks import check_number, check_sizes
from seqattn.nn.initializers import normal
from seqattn.nn.linear import product
from seqattn.nn.parameter_rule import OUT_OF, Kind, ParameterRule

RULES = (
    # `[V, D]`: the rows of a token table are also the columns of the logits. Learned positions have few rows, so only
    # their columns are split.
    ParameterRule("*embedding/table", Kind.TABLE, OUT_OF, outputs=-2),
    ParameterRule("*table", Kind.TABLE, P(None, "fsdp"), outputs=-2),
)


def look_up(table: Float[Array, "V D"], index: Int[Array, "*batch"], name: str) -> Float[Array, "*batch D"]:
    """Gathers rows of a table. An index outside the table is never clamped or wrapped.

    Args:
        table: `[V, D]`.
        index: `[*batch]`.
        name: what the indices are, for the error message.

    Returns:
        `[*batch, D]`.

    Raises:
        ValueError: an index is not in `[0, V)`. Inside `jit`, where nothing can be raised, its row is NaN.
    """
    if not isinstance(index, jax.core.Tracer):
        _check_inside(np.asarray(index), len(table), name)
    # A narrower integer could not hold `len(table)`, which would wrap around.
    index = index.astype(jnp.int32) if index.dtype.itemsize < 4 else index
    # `jnp.take` counts negative indices from the end. Past the end they are filled with NaN instead.
    inside = jnp.where(index < 0, len(table), index)
    return jnp.take(table, inside, axis=0, mode="fill", fill_value=jnp.nan)


def _check_inside(index: np.ndarray, size: int, name: str) -> None:
    # In NumPy: inside `jit`, `jnp.min` of a concrete array would be traced.
    if index.size and not 0 <= index.min() <= index.max() < size:
        raise ValueError(f"{name} must be in [0, {size}), got {index.min()} to {index.max()}")


class TokenEmbedding(nnx.Module):
    """Token embedding, with logits from the same table (Press 2017; Vaswani 2017, section 3.4).

    One module owns the table, so tied weights stay one parameter through `jit`, saving and loading.

    Args:
        vocab_size: V, the number of tokens.
        model_dim: D, the size of a vector. The table is drawn with variance 1 / D.
        scale: factor of the vectors of tokens. Defaults to `sqrt(D)`.
        param_dtype: dtype of the table.
        rngs: initialises the table and is not kept.

    Raises:
        ValueError: a size is below 1, or the scale is not finite.

    >>> embedding = TokenEmbedding(11, 6, rngs=nnx.Rngs(0))
    >>> x = embedding(jnp.array([[5, 8, 9]]))
    >>> x.shape, embedding.logits(x).shape
    ((1, 3, 6), (1, 3, 11))
    """

    def __init__(
        self,
        vocab_size: int,
        model_dim: int,
        *,
        scale: float | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(vocab_size=vocab_size, model_dim=model_dim)
        self.scale = math.sqrt(model_dim) if scale is None else scale
        check_number("scale", self.scale)
        init = normal(1 / math.sqrt(model_dim))
        self.table = nnx.Param(init(rngs.params(), (vocab_size, model_dim), param_dtype))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Returns the scaled vectors `[*batch, D]` of tokens `[*batch]`.

        Raises:
            ValueError: a token is not in `[0, V)`. Inside `jit`, where nothing can be raised, its vector is NaN.
        """
        table = self.table[...]
        vectors = look_up(table, tokens, "tokens")
        return vectors if self.scale == 1 else vectors * jnp.asarray(self.scale, table.dtype)

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns the product of `x` `[*batch, D]` with every vector of the table, `[*batch, V]`."""
        table = self.table[...].astype(x.dtype)
        if x.size == table.shape[1]:
            # For a single row, the CPU would transpose the whole table at every call.
            return (table @ x.reshape(-1)).reshape(*x.shape[:-1], len(table))
        return product(x, table.T)


class PositionEmbedding(nnx.Module):
    """Learned vector for each position (Gehring 2017; Vaswani 2017, table 3, row E).

    Args:
        max_length: positions 0 to `max_length - 1` exist. Any other position is an error, never clamped.
        model_dim: D, the size of a vector.
        param_dtype: dtype of the table.
        rngs: initialises the table (normal, standard deviation 0.02) and is not kept.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self, max_length: int, model_dim: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        check_sizes(max_length=max_length, model_dim=model_dim)
        init = normal(0.02)
        self.table = nnx.Param(init(rngs.params(), (max_length, model_dim), param_dtype))

    def __call__(self, position: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Returns the vectors `[*batch, D]` of positions `[*batch]`.

        Raises:
            ValueError: a position is not in `[0, max_length)`. Inside `jit`, where nothing can be raised, its vector is
                NaN.
        """
        return look_up(self.table[...], position, "positions")

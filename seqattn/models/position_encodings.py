"""Position encodings of the models: choices as config values, and the parameters and functions behind them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqattn.checks import check_even, check_integer, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.nn.embedding import PositionEmbedding, TokenEmbedding
from seqattn.nn.initializers import normal
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.nn.rotary import Rotary
from seqattn.positions import sinusoidal
from seqattn.score_mod import ScoreMod
from seqattn.score_mods import Alibi, RelativeBuckets, RelativePositions, SoftCap

RULES = (
    # `[layers, distances, (heads,) H]`: too small to split. The general rule for biases matches the bias of buckets.
    ParameterRule("*scores/tables", Kind.TABLE, outputs=1),
)


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """Adds sines and cosines of the position to token vectors (Vaswani 2017, section 3.5).

    >>> x = Sinusoidal(interleaved=False, last=True, first=1)(jnp.arange(2), 4)
    >>> print(np.asarray(x).round(2))
    [[ 0.84  0.    0.54  1.  ]
     [ 0.91  0.   -0.42  1.  ]]
    """

    interleaved: bool = True
    """If True, sines and cosines take turns (Vaswani 2017). If False, all sines come first (tensor2tensor)."""
    last: bool = False
    """If True, the lowest frequency is `1 / 10000` (tensor2tensor). If False, it is one step higher (Vaswani 2017)."""
    first: int = 0
    """Number that the first token of a text has."""

    def __call__(self, position: Int[Array, "*shape"], dim: int) -> Float[Array, "*shape dim"]:
        """Returns the vectors `[*shape, dim]` of positions, float32."""
        frequencies = None
        if self.last:
            # From 1 to 1 / 10000, both included.
            frequencies = jnp.asarray(10_000.0 ** -np.linspace(0, 1, dim // 2), jnp.float32)
        moved = position + self.first if self.first else position
        return sinusoidal(moved, dim, frequencies=frequencies, interleaved=self.interleaved)


@dataclasses.dataclass(frozen=True)
class Learned:
    """Adds a trained vector for each position to token vectors (Gehring 2017; Vaswani 2017, table 3, row E)."""

    max_length: int = 512
    """Positions 0 to `max_length - 1` exist. Any other position is an error."""


@dataclasses.dataclass(frozen=True)
class LinearBiases:
    """ALiBi: adds to scores of self-attention a penalty linear in the distance (Press 2022, section 3).

    Each head has a fixed slope. In an encoder ALiBi does not distinguish left from right: equal distances on both sides
    get equal penalties.
    """


@dataclasses.dataclass(frozen=True)
class BucketBiases:
    """T5: a trained bias for each head and bucket of distances, shared by all layers (Raffel 2020, section 2.1)."""

    num_buckets: int = 32
    """Number of buckets: half hold one distance each, the rest grow. Even in an encoder: half are for later keys."""
    max_distance: int = 128
    """All distances from here on share a bucket."""


@dataclasses.dataclass(frozen=True)
class RelativeKeys:
    """A trained key for each distance in each layer (Shaw 2018, equation 4), optionally per head (Huang 2018)."""

    max_distance: int = 16
    """All larger distances share the key of this one."""
    by_head: bool = False
    """If True, each head has its own keys (Music Transformer, Huang 2018). If False, all heads share them."""


Positions = Sinusoidal | Learned | Rotary | LinearBiases | BucketBiases | RelativeKeys | None
"""Any position encoding. None for no order: attention sees a set."""


def check_positions(positions: Positions, model_dim: int) -> None:
    """Checks that a model of this size can have these positions.

    Raises:
        ValueError: sinusoidal positions with an odd `model_dim`, or with a negative `first`.
    """
    if isinstance(positions, Sinusoidal):
        check_even("model_dim", model_dim, " for sinusoidal positions")
        check_integer("first", positions.first, 0)


def table(
    positions: Positions, model_dim: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> PositionEmbedding | None:
    """Creates the trained vectors of `Learned` positions. Returns None for all other choices."""
    if not isinstance(positions, Learned):
        return None
    return PositionEmbedding(positions.max_length, model_dim, param_dtype=param_dtype, rngs=rngs)


def limit(positions: Positions) -> int | None:
    """Returns the number of positions, or None if it is unlimited."""
    return positions.max_length if isinstance(positions, Learned) else None


def embed(
    embedding: TokenEmbedding,
    learned: PositionEmbedding | None,
    positions: Positions,
    tokens: Int[Array, "*batch T"],
    at: Coordinates,
) -> Float[Array, "*batch T D"]:
    """Looks up token vectors and adds position vectors, if the choice has any. Does not look up padding."""
    at = jax.tree.map(lambda field: jnp.broadcast_to(field, tokens.shape), at)
    real = at.segment != 0
    # Padding may hold any number, and an index outside the table would be an error.
    x = embedding(jnp.where(real, tokens, jnp.zeros_like(tokens)))
    return add(x, jnp.where(real, at.position, jnp.zeros_like(at.position)), positions, learned)


def add(
    x: Float[Array, "*batch D"],
    position: Int[Array, "*batch"],
    positions: Positions,
    learned: PositionEmbedding | None,
) -> Float[Array, "*batch D"]:
    """Adds position vectors to `x` `[*batch, D]`, if the choice has any. Returns `x` unchanged if not."""
    if learned is not None:
        return x + learned(position)
    if isinstance(positions, Sinusoidal):
        return x + positions(position, x.shape[-1]).astype(x.dtype)
    return x


def rotary(positions: Positions) -> Rotary | None:
    """Returns the rotation of queries and keys, or None if they are not rotated."""
    return positions if isinstance(positions, Rotary) else None


class PositionScores(nnx.Module):
    """Score modifications of a stack of self-attention layers: relative positions, if any, then the soft cap, if any.

    One module serves all layers, so that a table they share stays one parameter.

    Args:
        positions: the choice.
        num_layers: number of layers of the stack.
        num_heads: N, the number of heads of each attention.
        head_dim: H, the size of a head.
        bidirectional: whether queries see later keys.
        soft_cap: limits scores, as `SoftCap` does. If None, they have no limit.
        param_dtype: dtype of the tables.
        rngs: initialises the tables (normal, standard deviation 0.02; zeros for T5's biases) and is not kept.

    Raises:
        ValueError: sizes of tables do not fit each other.

    >>> scores = PositionScores(RelativeKeys(3), 2, num_heads=4, head_dim=5, bidirectional=False, rngs=nnx.Rngs(0))
    >>> scores.tables.shape, type(scores.of(1)).__name__
    ((2, 7, 5), 'RelativePositions')
    """

    def __init__(
        self,
        positions: Positions,
        num_layers: int,
        *,
        num_heads: int,
        head_dim: int,
        bidirectional: bool,
        soft_cap: float | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.positions, self.bidirectional = positions, bidirectional
        self.soft_cap = None if soft_cap is None else SoftCap(soft_cap)
        bias, tables = None, None
        if isinstance(positions, BucketBiases):
            _check_buckets(positions, 2 if bidirectional else 1)
            bias = nnx.Param(jnp.zeros((positions.num_buckets, num_heads), param_dtype))
        elif isinstance(positions, RelativeKeys):
            check_sizes(max_distance=positions.max_distance)
            heads = (num_heads,) if positions.by_head else ()
            shape = (num_layers, 2 * positions.max_distance + 1, *heads, head_dim)
            tables = nnx.Param(normal(0.02)(rngs.params(), shape, param_dtype))
        # The name matters: parameter rules exempt a `bias` from weight decay.
        self.bias: nnx.Param | None = bias
        self.tables: nnx.Param | None = tables

    def of(self, layer: int) -> ScoreMod | None:
        """Returns the score modification of the self-attention of layer `layer`, counted from 0; None for none."""
        by_position = self._by_position(layer)
        if by_position is None or self.soft_cap is None:
            return self.soft_cap if by_position is None else by_position
        return by_position.then(self.soft_cap)

    def _by_position(self, layer: int) -> ScoreMod | None:
        if isinstance(self.positions, LinearBiases):
            return Alibi()
        if isinstance(self.positions, BucketBiases) and self.bias is not None:
            return RelativeBuckets(self.bias[...], self.bidirectional, self.positions.max_distance)
        return None if self.tables is None else RelativePositions(self.tables[layer])


def _check_buckets(positions: BucketBiases, sides: int) -> None:
    """Checks in the constructor what `RelativeBuckets` would reject in a call."""
    num_buckets, exact = positions.num_buckets, positions.num_buckets // sides // 2
    if num_buckets % sides or num_buckets < 2 * sides:
        rule = "even and at least 4 in an encoder" if sides == 2 else "at least 2"
        raise ValueError(f"num_buckets ({num_buckets}) must be {rule}")
    if positions.max_distance <= exact:
        raise ValueError(
            f"max_distance ({positions.max_distance}) must exceed {exact}, the number of distances with a bucket of "
            f"their own, for {num_buckets} buckets"
        )

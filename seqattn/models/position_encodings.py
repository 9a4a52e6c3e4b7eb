"""How the order of tokens enters a model: choices as values, and the parameters and functions behind them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from seqattn.checks import check_even, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.nn.embedding import PositionEmbedding, TokenEmbedding
from seqattn.nn.initializers import normal
from seqattn.nn.parameter_rule import Kind, ParameterRule
from seqattn.positions import sinusoidal
from seqattn.score_mod import ScoreMod
from seqattn.score_mods import Alibi, RelativeBuckets, RelativePositions

RULES = (
    # `[layers, distances, (heads,) H]`, small. The bias of buckets is a bias by its name.
    ParameterRule("*scores/tables", Kind.TABLE, outputs=1),
)


@dataclasses.dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of the position, added to token vectors (Vaswani 2017, section 3.5)."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """A trained vector for each position, added to token vectors."""

    max_length: int = 512
    """Positions 0 to `max_length - 1` exist; any other is an error."""


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Queries and keys of self attention rotated by their position (Su 2021)."""

    base: float = 10_000.0
    """The longest wavelength is about `2 pi base` positions."""


@dataclasses.dataclass(frozen=True)
class LinearBiases:
    """ALiBi: scores of self attention fall with the distance, by a fixed slope for each head (Press 2022).

    An encoder does not tell left from right by it: what is as far on either side loses as much.
    """


@dataclasses.dataclass(frozen=True)
class BucketBiases:
    """T5: a trained bias for each head and bucket of distances, one table for all layers (Raffel 2020, section 2.1)."""

    num_buckets: int = 32
    """Half of them are of one distance each, the others grow; even in an encoder, where half are for keys ahead."""
    max_distance: int = 128
    """From here on all distances share a bucket."""


@dataclasses.dataclass(frozen=True)
class RelativeKeys:
    """A trained key for each distance, in each layer: Shaw 2018, equation 4; a head: Music Transformer, Huang 2018."""

    max_distance: int = 16
    """All farther distances share the key of this one."""
    by_head: bool = False
    """A key for each head, as in the Music Transformer, instead of one for all."""


Positions = Sinusoidal | Learned | Rotary | LinearBiases | BucketBiases | RelativeKeys | None
"""Any of them; None for no order at all: attention sees a set."""


def check_positions(positions: Positions, model_dim: int) -> None:
    """Refuses what a model of this size cannot have.

    Raises:
        ValueError: sines of an odd model_dim.
    """
    if isinstance(positions, Sinusoidal):
        check_even("model_dim", model_dim, " for sinusoidal positions")


def table(
    positions: Positions, model_dim: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> PositionEmbedding | None:
    """The trained vectors of `Learned` positions; None for all others."""
    if not isinstance(positions, Learned):
        return None
    return PositionEmbedding(positions.max_length, model_dim, param_dtype=param_dtype, rngs=rngs)


def limit(positions: Positions) -> int | None:
    """How many positions there are; None where there is one for every token."""
    return positions.max_length if isinstance(positions, Learned) else None


def embed(
    embedding: TokenEmbedding,
    learned: PositionEmbedding | None,
    positions: Positions,
    tokens: Int[Array, "*batch T"],
    at: Coordinates,
) -> Float[Array, "*batch T D"]:
    """Token vectors, with those of their positions where positions are added; what padding holds is not looked up."""
    at = jax.tree.map(lambda field: jnp.broadcast_to(field, tokens.shape), at)
    real = at.segment != 0
    x = embedding(jnp.where(real, tokens, jnp.zeros_like(tokens)))
    return add(x, jnp.where(real, at.position, jnp.zeros_like(at.position)), positions, learned)


def add(
    x: Float[Array, "*batch D"],
    position: Int[Array, "*batch"],
    positions: Positions,
    learned: PositionEmbedding | None,
) -> Float[Array, "*batch D"]:
    """Vectors with those of their positions, where positions are added; else as they are."""
    if learned is not None:
        return x + learned(position)
    if isinstance(positions, Sinusoidal):
        return x + sinusoidal(position, x.shape[-1]).astype(x.dtype)
    return x


def rotary_base(positions: Positions) -> float | None:
    """The base by which queries and keys are rotated; None where they are not."""
    return positions.base if isinstance(positions, Rotary) else None


class PositionScores(nnx.Module):
    """What a stack of self attentions does to its scores to know about order: nothing, but for relative positions.

    One owner for all layers, so that a table they share stays one parameter.

    Args:
        positions: the choice.
        num_layers: of the stack.
        num_heads: N of each attention.
        head_dim: H of each attention.
        bidirectional: whether queries see keys ahead of them.
        param_dtype: dtype of the tables.
        rngs: initialises the tables (normal, standard deviation 0.02; zeros for T5's biases); not kept.

    Raises:
        ValueError: sizes of tables that do not fit each other.

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
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.positions, self.bidirectional = positions, bidirectional
        bias, tables = None, None
        if isinstance(positions, BucketBiases):
            _check_buckets(positions, 2 if bidirectional else 1)
            bias = nnx.Param(jnp.zeros((positions.num_buckets, num_heads), param_dtype))
        elif isinstance(positions, RelativeKeys):
            check_sizes(max_distance=positions.max_distance)
            heads = (num_heads,) if positions.by_head else ()
            shape = (num_layers, 2 * positions.max_distance + 1, *heads, head_dim)
            tables = nnx.Param(normal(0.02)(rngs.params(), shape, param_dtype))
        # By its name an optimizer knows a bias, which it does not decay.
        self.bias: nnx.Param | None = bias
        self.tables: nnx.Param | None = tables

    def of(self, layer: int) -> ScoreMod | None:
        """The score modification of a layer's self attention, counted from 0."""
        if isinstance(self.positions, LinearBiases):
            return Alibi()
        if isinstance(self.positions, BucketBiases) and self.bias is not None:
            return RelativeBuckets(self.bias[...], self.bidirectional, self.positions.max_distance)
        return None if self.tables is None else RelativePositions(self.tables[layer])


def _check_buckets(positions: BucketBiases, sides: int) -> None:
    """What `RelativeBuckets` refuses at a call."""
    num_buckets, exact = positions.num_buckets, positions.num_buckets // sides // 2
    if num_buckets % sides or num_buckets < 2 * sides:
        rule = "even and at least 4 in an encoder" if sides == 2 else "at least 2"
        raise ValueError(f"num_buckets ({num_buckets}) must be {rule}")
    if positions.max_distance <= exact:
        raise ValueError(
            f"max_distance ({positions.max_distance}) must exceed the {exact} distances that have a bucket of their "
            f"own, of {num_buckets} buckets"
        )

"""Score modifications: ALiBi slopes, T5 buckets, learned keys for each distance, and a soft cap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqattn.checks import check_integer, check_number
from seqattn.coordinates import Coordinates
from seqattn.precision import accumulator
from seqattn.pytrees import pytree, static
from seqattn.score_mod import ScoreMod


def _distance(query: Coordinates, key: Coordinates) -> Array:
    """Returns the distance from the query to the key, negative for keys before the query."""
    return jnp.asarray(key.position) - jnp.asarray(query.position)


@pytree
@dataclasses.dataclass(frozen=True)
class Alibi(ScoreMod):
    """Subtracts a penalty proportional to the distance, with a slope for each head (ALiBi: Press 2022, section 3).

    `score - slope[head] * |query.position - key.position|`. The paper defines it for keys before the query; here it is
    the same on both sides. Inside a `jax.shard_map` that splits the heads, a call has only some of them: pass the
    device's part of `Alibi.geometric(N)`.

    Attributes:
        slopes: `[N]`, a leaf. Defaults to the slopes of the paper for the heads of the call.

    Raises:
        ValueError: in a call, if the slopes are not `[N]`.

    >>> print(Alibi.geometric(8)[:3])
    [0.5   0.25  0.125]
    """

    slopes: Array | np.ndarray | None = None

    @staticmethod
    def geometric(num_heads: int) -> np.ndarray:
        """Returns the slopes of the paper, `[num_heads]` float32.

        For n = 2^k heads they form a geometric sequence from 2^(-8/n) to 2^-8. For other numbers, they are the slopes
        of the next smaller power of two, followed by every other slope of the next larger one, as in the authors' code.

        Raises:
            ValueError: `num_heads` is not an integer of at least 1.
        """
        check_integer("num_heads", num_heads, 1)
        whole = 1 << (num_heads.bit_length() - 1)
        exponents = [8 * (i + 1) / whole for i in range(whole)]
        exponents += [8 * (2 * i + 1) / (2 * whole) for i in range(num_heads - whole)]
        return np.asarray([2.0**-exponent for exponent in exponents], np.float32)

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        if self.slopes is None:
            raise ValueError(
                "Alibi() takes its slopes from the heads of a call; by itself it needs them: Alibi(slopes)"
            )
        distance = jnp.abs(_distance(query, key)).astype(score.dtype)
        return score - jnp.asarray(self.slopes)[head].astype(score.dtype) * distance

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Returns the modification with one slope for each head."""
        num_heads = query.shape[2]
        if self.slopes is None:
            return Alibi(jnp.asarray(Alibi.geometric(num_heads)))
        if jnp.shape(self.slopes) != (num_heads,):
            raise ValueError(f"the slopes {jnp.shape(self.slopes)} of Alibi must be [N], one for each head {num_heads}")
        return self


@pytree
@dataclasses.dataclass(frozen=True)
class RelativeBuckets(ScoreMod):
    """Adds a learned bias for each head and each bucket of distances (T5: Raffel 2020, section 2.1).

    `score + table[bucket(key.position - query.position), head]`. Half of the buckets hold one distance each. The widths
    of the others grow geometrically up to `max_distance`; all larger distances share the last bucket. If bidirectional,
    the upper half of the table is for keys after the query. If not, all keys after the query share bucket 0.

    T5 does not scale its scores: use `attend(..., scale=1.0)` with T5 weights.

    Attributes:
        table: `[num_buckets, N]`, a leaf. T5 has 32 buckets.
        bidirectional: True in an encoder, False in a decoder; static. Defaults to True.
        max_distance: all distances from here on share a bucket; static. Must exceed the number of buckets with one
            distance each. Defaults to 128, as in T5.

    Raises:
        ValueError: `max_distance` is out of range; in a call, if the table does not fit.

    >>> at = Coordinates.range(6)
    >>> print(RelativeBuckets(jnp.zeros((8, 1)), max_distance=5).buckets(at.position - 3, 8))
    [2 2 1 0 5 6]
    """

    table: Array | np.ndarray
    bidirectional: bool = static(default=True)
    max_distance: int = static(default=128)

    def __post_init__(self) -> None:
        check_integer("max_distance", self.max_distance, 1)

    def buckets(
        self, distance: Int[Array, "*shape"] | Int[np.ndarray, "*shape"], num_buckets: int
    ) -> Int[Array, "*shape"]:
        """Returns the bucket of each distance `key.position - query.position`.

        Args:
            distance: integers of any shape.
            num_buckets: the number of buckets in the table.

        Returns:
            Integers of the same shape, from 0 to `num_buckets - 1`.
        """
        one_side = num_buckets // 2 if self.bidirectional else num_buckets
        behind = _buckets_behind(one_side, self.max_distance)
        ahead = behind + one_side if self.bidirectional else np.zeros_like(behind)
        by_distance = np.concatenate([behind[:0:-1], behind[:1], ahead[1:]])
        clipped = jnp.clip(distance, -self.max_distance, self.max_distance)
        return jnp.asarray(by_distance)[clipped + self.max_distance]

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        table = jnp.asarray(self.table)
        return score + table[self.buckets(_distance(query, key), table.shape[0]), head].astype(score.dtype)

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Raises ValueError unless the table has a column for each head, and enough buckets."""
        shape, sides = jnp.shape(self.table), 2 if self.bidirectional else 1
        if len(shape) != 2 or shape[1] != query.shape[2]:
            raise ValueError(
                f"the table {shape} must be [num_buckets, N] with one column for each head {query.shape[2]}"
            )
        if shape[0] % sides or shape[0] < 2 * sides:
            rule = "even and at least 4 where bidirectional" if self.bidirectional else "at least 2"
            raise ValueError(f"num_buckets ({shape[0]}) must be {rule}")
        if self.max_distance <= (exact := shape[0] // sides // 2):
            raise ValueError(
                f"max_distance ({self.max_distance}) must exceed the {exact} distances with a bucket of their own"
            )
        return self


@functools.cache
def _buckets_behind(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance from 0 to `max_distance` on one side.

    Computed in integers, because rounding of a logarithm would move the borders.
    """
    exact = num_buckets // 2
    growing = num_buckets - exact
    # Bucket exact + i starts where exact * (max_distance / exact) ** (i / growing) <= distance.
    return np.asarray(
        [
            n
            if n < exact
            else exact + sum(n**growing * exact**i >= max_distance**i * exact**growing for i in range(1, growing))
            for n in range(max_distance + 1)
        ],
        np.int32,
    )


@pytree
@dataclasses.dataclass(frozen=True)
class RelativePositions(ScoreMod):
    """Adds the product of the query with a learned key for each distance (Shaw 2018, equation 4).

    `score + scale * query . table[clip(key.position - query.position, -k, k) + k]`. The array `[T, S, H]` of the paper
    is never built: each query is multiplied by the 2k + 1 rows of the table once, and each pair picks its product.
    (Huang 2018 achieves the same by skewing.)

    Attributes:
        table: `[2k + 1, H]` for all heads, or `[2k + 1, N, H]`; a leaf. Row k is for distance 0, row 0 for keys at
            distance k or more before the query.

    Raises:
        ValueError: in a call, if the table does not fit.

    >>> query, table = jnp.ones((1, 1, 1, 2)), jnp.arange(6.0).reshape(3, 2)
    >>> print(RelativePositions(table).rows(query, 1.0)[0, 0])
    [[1. 5. 9.]]
    """

    table: Array | np.ndarray

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        if row is None:
            raise ValueError("RelativePositions needs the row that its `rows` computes for each query and head")
        farthest = row.shape[-1] // 2
        return score + row[jnp.clip(_distance(query, key), -farthest, farthest) + farthest].astype(score.dtype)

    @property
    def row_size(self) -> int:
        """2k + 1: one product for each distance."""
        return jnp.shape(self.table)[0]

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """Returns `scale * query . table` for each query and each distance."""
        table, high = jnp.asarray(self.table), accumulator(query.dtype)
        # The query of a fully masked row may hold NaN, and even NaN times a zero cotangent would reach the table.
        finite = jnp.isfinite(query).all(axis=-1, keepdims=True)
        products = jnp.einsum(
            "btnh,rh->btnr" if table.ndim == 2 else "btnh,rnh->btnr",
            jnp.where(finite, query, jnp.zeros_like(query)).astype(high),
            table.astype(high),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.where(finite, products * jnp.asarray(scale, high), jnp.nan)

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Raises ValueError unless the table fits the heads of the call."""
        shape, (num_heads, head_dim) = jnp.shape(self.table), query.shape[2:]
        if shape[1:] not in ((head_dim,), (num_heads, head_dim)) or shape[0] % 2 != 1:
            raise ValueError(
                f"the table {shape} must be [2 * max_distance + 1, H] or [2 * max_distance + 1, N, H] with N "
                f"{num_heads} and H {head_dim}"
            )
        return self


@pytree
@dataclasses.dataclass(frozen=True)
class SoftCap(ScoreMod):
    """Limits scores to (-cap, cap): `cap * tanh(score / cap)` (Gemma 2: Gemma Team 2024, section 2).

    Attributes:
        cap: a positive number, static.

    Raises:
        TypeError: the cap is not a number. Use a `ScoreFunction` for an array.
        ValueError: the cap is not positive and finite.
    """

    cap: float = static()

    def __post_init__(self) -> None:
        if not isinstance(self.cap, int | float | np.number) or isinstance(self.cap, bool):
            raise TypeError(
                f"the cap ({self.cap!r}) must be a number, because it is static; a ScoreFunction takes arrays"
            )
        check_number("the cap", self.cap, above=0)

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        return self.cap * jnp.tanh(score / self.cap)

    @property
    def uses_coordinates(self) -> bool:
        """False: the result depends on the score alone."""
        return False

"""What is done to the score of one query and one key before the softmax: relative positions, slopes, caps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.precision import accumulator


class ScoreMod:
    """A function of the score of one query and one key, lifted over whole sequences with `jax.vmap`.

    A score modification is a pytree: sizes are static, arrays are its leaves, and gradients reach them. It sees the
    score after scale and bias and before the mask. It never sees what a masked pair holds: there the score is 0, and
    what it makes of that is dropped. A result of -inf masks the pair.

    One that needs the query itself and not only its score overrides `rows` and `row_size`.

    >>> score, query, key = jnp.float32(3), Coordinates(*jnp.array([5, 1])), Coordinates(*jnp.array([3, 1]))
    >>> print(Alibi(jnp.array([0.5]))(score, query, key, head=0))
    2.0
    >>> capped = SoftCap(2.0).then(Alibi(jnp.array([0.5])))
    >>> print(f"{capped(score, query, key, head=0):.2f}")
    0.81
    """

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        """The new score of a pair; all are scalars.

        Args:
            score: `scale * query . key + bias`, float32 at least.
            query: where the query is.
            key: where the key is.
            head: which of the N query heads.
            row: what `rows` gave for this query and head, `[R]`; None where it gave nothing.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(self, score, query, key, head, row)")

    @property
    def row_size(self) -> int:
        """R, the last dim of what `rows` returns; 0 where it returns None."""
        return 0

    @property
    def uses_coordinates(self) -> bool:
        """Whether the result depends on where query and key are: then attention needs to know it."""
        return True

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """What is computed once for each query and head, before the kernel: float32 at least."""
        return None

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> "ScoreMod":
        """What a kernel gets: checked against the call, and with all that it computes with as its leaves."""
        return self

    def then(self, after: "ScoreMod | Callable[..., Any]") -> "ScoreMod":
        """Both, in this order: `after` modifies the score that this one returns."""
        return Then(self, ScoreMod.of(after))

    @staticmethod
    def of(mod: "ScoreMod | Callable[..., Any]") -> "ScoreMod":
        """A plain function `fn(score, query, key, head)` as a `ScoreMod`; one that already is stays what it is."""
        if isinstance(mod, ScoreMod):
            return mod
        if isinstance(mod, type) and issubclass(mod, ScoreMod):
            raise TypeError(f"a score_mod must be an instance, not its class: write {mod.__name__}(...)")
        if not callable(mod):
            raise TypeError(
                "a score_mod must be a ScoreMod or a function (score, query, key, head) -> score, got "
                f"{type(mod).__name__}; an array to add is a bias"
            )
        return ScoreFunction(mod)

    def over(
        self,
        scores: Float[Array, "B N T S"],
        query: Coordinates,
        key: Coordinates,
        heads: Int[Array, " N"],
        rows: Float[Array, "B T N R"] | None,
    ) -> Float[Array, "B N T S"]:
        """The new scores of all pairs of queries `[B or 1, T]` and keys `[B or 1, S]`, whole or a tile."""

        def each_row(at: Coordinates) -> tuple[Coordinates, int | None]:
            shared = at.shape[0] == 1
            return (jax.tree.map(lambda x: x[0], at) if shared else at), None if shared else 0

        def axis(i: int) -> int | None:
            return None if rows is None else i

        (query, by_query), (key, by_key) = each_row(query), each_row(key)
        lifted = jax.vmap(self, in_axes=(0, None, 0, None, None))
        lifted = jax.vmap(lifted, in_axes=(0, 0, None, None, axis(0)))
        lifted = jax.vmap(lifted, in_axes=(0, None, None, 0, axis(1)))
        lifted = jax.vmap(lifted, in_axes=(0, by_query, by_key, None, axis(0)))
        return lifted(scores, query, key, heads, rows)


def compose(*mods: ScoreMod | Callable[..., Any]) -> ScoreMod:
    """All of them, the first one first: `compose(a, b, c)` is `a.then(b).then(c)`."""
    if not mods:
        raise ValueError("compose needs at least one score modification, got none")
    return functools.reduce(ScoreMod.then, mods[1:], ScoreMod.of(mods[0]))


def for_kernel(
    mod: ScoreMod, query: Float[Array, "B T N H"], scale: float | Array, q_at: Coordinates, kv_at: Coordinates
) -> tuple[ScoreMod, Float[Array, "B T N R"] | None]:
    """The score modification as a kernel gets it, and its rows; raises where it does not fit the call."""
    mod = mod.prepare(query, q_at, kv_at)
    rows = _checked_rows(mod, query, scale)
    score, row = np.zeros((), accumulator(query.dtype)), None if rows is None else np.zeros(rows.shape[-1:], rows.dtype)
    # A lambda, as JAX hashes functions, and a ScoreMod that holds arrays has no hash.
    result = jax.eval_shape(lambda *one: mod(*one), score, *_one_pair(q_at, kv_at), np.int32(0), row)
    if result.shape != () or result.dtype != score.dtype:
        raise TypeError(f"{_name(mod)} must return one {score.dtype} score, got {result.dtype} of shape {result.shape}")
    return mod, rows


def _one_pair(*at: Coordinates) -> list[Coordinates]:
    return [jax.tree.map(lambda x: np.zeros((), x.dtype), each) for each in at]


def _name(mod: ScoreMod) -> str:
    return f"the score_mod {type(mod).__name__}"


def _checked_rows(
    mod: ScoreMod, query: Float[Array, "B T N H"], scale: float | Array
) -> Float[Array, "B T N R"] | None:
    """`mod.rows(query, scale)` in float32 at least; raises ValueError unless its shape is what `row_size` says."""
    rows, expected = mod.rows(query, scale), (*query.shape[:3], mod.row_size)
    if (None if rows is None else rows.shape) != (expected if mod.row_size else None):
        raise ValueError(
            f"the rows of {_name(mod)} must be [B, T, N, row_size] {expected}, or None where row_size is 0; "
            f"got {None if rows is None else rows.shape}"
        )
    return None if rows is None else rows.astype(accumulator(query.dtype))


def _distance(query: Coordinates, key: Coordinates) -> Array:
    """How far the key is ahead of the query; negative for what is behind it."""
    return jnp.asarray(key.position) - jnp.asarray(query.position)


def _integer(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least {minimum}")


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Then(ScoreMod):
    """Two score modifications in order: `first.then(second)`."""

    first: ScoreMod
    second: ScoreMod

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        size = self.first.row_size
        before, after = (None, None) if row is None else (row[:size], row[size:])
        score = self.first(score, query, key, head, before if size else None)
        return self.second(score, query, key, head, after if self.second.row_size else None)

    @property
    def row_size(self) -> int:
        """The rows of both, one behind the other."""
        return self.first.row_size + self.second.row_size

    @property
    def uses_coordinates(self) -> bool:
        """Whether either does."""
        return self.first.uses_coordinates or self.second.uses_coordinates

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """The rows of both, one behind the other."""
        both = (_checked_rows(mod, query, scale) for mod in (self.first, self.second))
        given = [rows for rows in both if rows is not None]
        return jnp.concatenate(given, axis=-1) if given else None

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Both prepared."""
        return Then(self.first.prepare(query, q_at, kv_at), self.second.prepare(query, q_at, kv_at))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi(ScoreMod):
    """A penalty that grows with the distance, by a slope for each head (Press 2022, section 3).

    `score - slope[head] * |query.position - key.position|`: the paper's for keys behind the query, the same on both
    sides. Without slopes it takes those of the paper for the heads of the call; given ones `[N]` are a leaf.

    >>> print(Alibi.geometric(8)[:3])
    [0.5   0.25  0.125]
    """

    slopes: Array | np.ndarray | None = None

    @staticmethod
    def geometric(num_heads: int) -> np.ndarray:
        """The slopes of the paper, `[num_heads]` float32: from 2^(-8/n) down to 2^-8 in equal ratios for n = 2^k.

        For other numbers those of the next smaller power of two, and then every other one of the next larger (as in
        the authors' code).
        """
        _integer("num_heads", num_heads, 1)
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
        """With one slope for each head."""
        num_heads = query.shape[2]
        if self.slopes is None:
            return Alibi(jnp.asarray(Alibi.geometric(num_heads)))
        if jnp.shape(self.slopes) != (num_heads,):
            raise ValueError(f"the slopes {jnp.shape(self.slopes)} of Alibi must be [N], one for each head {num_heads}")
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBuckets(ScoreMod):
    """A learned bias for each head and each bucket of distances (T5: Raffel 2020, section 2.1).

    `score + table[bucket(key.position - query.position), head]`. Half of the buckets are of one distance each, the
    others grow in equal ratios up to `max_distance`, beyond which all distances share the last. Bidirectional, the
    upper half of the table is for keys ahead; otherwise all keys ahead share bucket 0.

    T5 adds its bias to scores that are not scaled: `attend(..., scale=1.0)` for its weights.

    Attributes:
        table: `[num_buckets, N]`, a leaf. (T5's code has 32 buckets and a largest distance of 128.)
        bidirectional: True in an encoder, False in a decoder.
        max_distance: from here on all distances are the same; above the number of buckets of one distance each.

    >>> at = Coordinates.range(6)
    >>> print(RelativeBuckets(jnp.zeros((8, 1)), max_distance=5).buckets(at.position - 3, 8))
    [2 2 1 0 5 6]
    """

    table: Array | np.ndarray
    bidirectional: bool = _static(default=True)
    max_distance: int = _static(default=128)

    def __post_init__(self) -> None:
        _integer("max_distance", self.max_distance, 1)

    def buckets(
        self, distance: Int[Array, "*shape"] | Int[np.ndarray, "*shape"], num_buckets: int
    ) -> Int[Array, "*shape"]:
        """The bucket of each distance `key.position - query.position`, out of `num_buckets`."""
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
        """The table has a column for each head, and enough buckets."""
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
                f"max_distance ({self.max_distance}) must exceed the {exact} distances that have a bucket of their own"
            )
        return self


@functools.cache
def _buckets_behind(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 to max_distance on one side, in integers: no logarithm rounds a border away."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativePositions(ScoreMod):
    """A learned key for each distance, beside the key of each token (Shaw 2018, equation 4).

    `score + scale * query . table[clip(key.position - query.position, -k, k) + k]`. The paper's array
    `[T, S, H]` is never built: each query meets the 2k + 1 rows of the table once, and each pair picks its product
    (Huang 2018 reaches the same by skewing).

    Attributes:
        table: `[2k + 1, H]` for all heads, or `[2k + 1, N, H]`; a leaf. Row k is distance 0, row 0 the farthest behind.

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
        """2k + 1, one product for each distance."""
        return jnp.shape(self.table)[0]

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """`scale * query . table` for each query and each distance."""
        table, high = jnp.asarray(self.table), accumulator(query.dtype)
        # The query of an empty row may hold anything, and even times a zero cotangent it would reach the table.
        finite = jnp.isfinite(query).all(axis=-1, keepdims=True)
        products = jnp.einsum(
            "btnh,rh->btnr" if table.ndim == 2 else "btnh,rnh->btnr",
            jnp.where(finite, query, jnp.zeros_like(query)).astype(high),
            table.astype(high),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.where(finite, products * jnp.asarray(scale, high), jnp.full((), jnp.nan, high))

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """The table fits the heads of the call."""
        shape, (num_heads, head_dim) = jnp.shape(self.table), query.shape[2:]
        if shape[1:] not in ((head_dim,), (num_heads, head_dim)) or shape[0] % 2 != 1:
            raise ValueError(
                f"the table {shape} must be [2 * max_distance + 1, H] or [2 * max_distance + 1, N, H] with N "
                f"{num_heads} and H {head_dim}"
            )
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftCap(ScoreMod):
    """`cap * tanh(score / cap)`: no score leaves (-cap, cap) (Gemma 2: Gemma Team 2024, section 2)."""

    cap: float = _static()

    def __post_init__(self) -> None:
        if not (0 < self.cap < float("inf")):
            raise ValueError(f"the cap ({self.cap}) must be positive and finite")

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        return self.cap * jnp.tanh(score / self.cap)

    @property
    def uses_coordinates(self) -> bool:
        """It sees the score alone."""
        return False


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False)
class ScoreFunction(ScoreMod):
    """Any function: `fn(score, query, key, head, *arrays)` on scalars, returning the new score.

    Gradients reach the arrays, and the arrays that the function closes over, too. The function is static: a new
    lambda at each call of a jitted function compiles anew. Give what changes as arrays.

    >>> learned = jnp.array([0.5, 2.0])
    >>> scaled = ScoreFunction(lambda score, query, key, head, factor: score * factor[head], learned)
    >>> print(scaled(jnp.float32(3), Coordinates.range(0), Coordinates.range(0), head=1))
    6.0
    """

    fn: Callable[..., Any]
    arrays: tuple[Any, ...]

    def __init__(self, fn: Callable[..., Any], *arrays: Any) -> None:
        object.__setattr__(self, "fn", fn)
        object.__setattr__(self, "arrays", arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """The arrays are leaves, the function is static."""
        return self.arrays, self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], arrays: tuple[Any, ...]) -> "ScoreFunction":
        """The inverse of `tree_flatten`."""
        return cls(fn, *arrays)

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        result = jnp.asarray(self.fn(score, query, key, head, *self.arrays))
        if result.shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
            raise TypeError(
                "the function of a ScoreFunction must return one floating score for one query and one key, got "
                f"{result.dtype} of shape {result.shape}"
            )
        return result.astype(score.dtype)

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Itself, or where it closes over arrays, the program that it traces to, with those arrays as leaves."""
        pair = _one_pair(q_at, kv_at)
        closed = jax.make_jaxpr(lambda *one: self(*one))(np.zeros((), accumulator(query.dtype)), *pair, np.int32(0))
        return Traced(tuple(closed.consts), closed.jaxpr) if closed.consts else self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traced(ScoreMod):
    """A function of scalars as the program that JAX traced, with all arrays that it closed over as leaves.

    Derivative rules of kernels forbid closures over traced arrays; as leaves they pass, and gradients reach them.
    """

    consts: tuple[Any, ...]
    jaxpr: Any = _static()

    def __call__(
        self, score: Array, query: Coordinates, key: Coordinates, head: Array | int, row: Array | None = None
    ) -> Array:
        scalars = (score, query.position, query.segment, key.position, key.segment, head)
        typed = [jnp.asarray(x, var.aval.dtype) for x, var in zip(scalars, self.jaxpr.invars, strict=True)]
        program = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(self.jaxpr, self.consts))
        (result,) = program(*typed)
        return result


ScoreModLike = ScoreMod | Callable[..., Any] | None
"""What `score_mod=` takes: a `ScoreMod`, a plain function `fn(score, query, key, head)`, or None."""

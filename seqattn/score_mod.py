"""What is done to the score of one query and one key before the softmax: any function of it, and several in order."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.precision import accumulator
from seqattn.pytrees import pytree


class ScoreMod:
    """A function of the score of one query and one key, lifted over whole sequences with `jax.vmap`.

    A score modification is a pytree: sizes are static, arrays are its leaves, and gradients reach them. It sees the
    score after scale and bias and before the mask. It never sees what a masked pair holds: there the score is 0, and
    what it makes of that is dropped. A result of -inf masks the pair.

    One that needs the query itself and not only its score overrides `rows` and `row_size`.

    >>> from seqattn.score_mods import Alibi, SoftCap
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
        """What a kernel gets: checked against the call."""
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

        def pair(
            score: Array, query: Coordinates, key: Coordinates, batch: Array, head: Array, row: Array | None
        ) -> Array:
            return self(score, dataclasses.replace(query, batch=batch, head=head), key, head, row)

        (query, by_query), (key, by_key) = each_row(query.rows()), each_row(key.rows())
        axis = None if rows is None else 0
        batch = jnp.arange(scores.shape[0], dtype=jnp.int32)
        lifted = jax.vmap(pair, in_axes=(0, None, 0, None, None, None))
        lifted = jax.vmap(lifted, in_axes=(0, 0, None, None, None, axis))
        lifted = jax.vmap(lifted, in_axes=(0, None, None, None, 0, None if rows is None else 1))
        lifted = jax.vmap(lifted, in_axes=(0, by_query, by_key, 0, None, axis))
        return lifted(scores, query, key, batch, heads, rows)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, init=False)
class ScoreFunction(ScoreMod):
    """Any function: `fn(score, query, key, head, *arrays)` on scalars, returning the new score.

    `query.batch` is the index of the batch row, for arrays that have one value for each. Gradients reach the arrays,
    and the arrays that the function closes over, too. The function is static: a new lambda at each call of a jitted
    function compiles anew. Give what changes as arrays.

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
        """The function takes as many arguments as it will get."""
        expected = ["score", "query", "key", "head", *(f"array {i}" for i in range(len(self.arrays)))]
        try:
            signature = inspect.signature(self.fn)
        except ValueError:  # some functions of C have none
            return self
        try:
            signature.bind(*expected)
        except TypeError as reason:
            raise TypeError(
                f"the function of a ScoreFunction must take ({', '.join(expected)}), and this one takes {signature}"
            ) from reason
        return self


@pytree
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


ScoreModLike = ScoreMod | Callable[..., Any] | None
"""What `score_mod=` takes: a `ScoreMod`, a plain function `fn(score, query, key, head)`, or None."""


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
    query_at, key_at = _one_pair(q_at, kv_at)
    query_at = dataclasses.replace(query_at, batch=np.int32(0), head=np.int32(0))
    result = jax.eval_shape(lambda *one: mod(*one), score, query_at, key_at, np.int32(0), row)
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

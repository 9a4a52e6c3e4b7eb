"""Score modifications: functions of the score of one query and one key before the softmax, and their composition."""

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
    """A function that modifies the score of one query and one key before the softmax.

    Kernels lift it over whole sequences with `jax.vmap`. A score modification is a pytree: sizes are static, arrays are
    its leaves, and gradients reach them. It receives the score after scale and bias and before the mask. For a masked
    pair it receives a score of 0, and its result is discarded. A result of -inf masks the pair.

    To write one, pass a plain function `fn(score, query, key, head) -> score` to `attend`, use `ScoreFunction` for
    arrays with gradients, or subclass `ScoreMod` and register the dataclass with `pytree`. A subclass that needs the
    query vector itself, not only its score, overrides `rows` and `row_size`.

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
        """Returns the new score of a pair.

        Args:
            score: `scale * query . key + bias`, a scalar, float32 or wider.
            query: the coordinates of the query; all fields are scalars.
            key: the coordinates of the key; all fields are scalars.
            head: the index of the query head, from 0 to N - 1.
            row: the result of `rows` for this query and head, `[R]`, or None if `rows` returns None.

        Returns:
            A scalar of the dtype of `score`.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(self, score, query, key, head, row)")

    @property
    def row_size(self) -> int:
        """R, the last dim of the result of `rows`; 0 if that is None."""
        return 0

    @property
    def uses_coordinates(self) -> bool:
        """Whether the result depends on the coordinates; `attend` then requires them."""
        return True

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """Returns an array computed once for each query and head, before the kernel runs, or None.

        Args:
            query: `[B, T, N, H]`.
            scale: the scale of the call.

        Returns:
            `[B, T, N, R]`, float32 or wider, or None.
        """
        return None

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> "ScoreMod":
        """Returns the score modification that the kernel receives, after checks against the call.

        Args:
            query: `[B, T, N, H]`.
            q_at: coordinates `[B or 1, T]`.
            kv_at: coordinates `[B or 1, S]`.

        Raises:
            TypeError: the modification does not fit the call.
            ValueError: an array of the modification does not fit the call.
        """
        return self

    def then(self, after: "ScoreMod | Callable[..., Any]") -> "ScoreMod":
        """Returns the composition: `after` modifies the score that this modification returns."""
        return Then(self, ScoreMod.of(after))

    @staticmethod
    def of(mod: "ScoreMod | Callable[..., Any]") -> "ScoreMod":
        """Converts a plain function `fn(score, query, key, head)` to a `ScoreMod`. A `ScoreMod` is returned as it is.

        Raises:
            TypeError: `mod` is a class or is not callable.
        """
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
        """Returns the new scores `[B, N, T, S]` of all pairs, for a whole call or a tile.

        Args:
            scores: `[B, N, T, S]`.
            query: coordinates of the queries, `[B or 1, T]`.
            key: coordinates of the keys, `[B or 1, S]`.
            heads: indices of the query heads, `[N]`.
            rows: the result of `rows`, `[B, T, N, R]`, or None.
        """

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
    """A score modification from any function `fn(score, query, key, head, *arrays)` of scalars.

    The function returns the new score. Gradients reach the arrays, and the arrays that the function closes over. The
    function is static: a new lambda in each call of a jitted function compiles again, so pass changing values as
    arrays. For arrays with one value per batch row, index with `query.batch`.

    Args:
        fn: the function.
        *arrays: further arguments of the function.

    Raises:
        TypeError: in a call, if the function takes other arguments or does not return one floating score.

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
        """Returns the arrays as leaves and the function as static data."""
        return self.arrays, self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], arrays: tuple[Any, ...]) -> "ScoreFunction":
        """Inverts `tree_flatten`."""
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
        """Raises TypeError unless the function accepts the arguments that it will receive."""
        expected = ["score", "query", "key", "head", *(f"array {i}" for i in range(len(self.arrays)))]
        try:
            signature = inspect.signature(self.fn)
        except ValueError:  # some built-in functions have no signature
            return self
        try:
            signature.bind(*expected)
        except TypeError as reason:
            raise TypeError(
                f"the function of a ScoreFunction must take ({', '.join(expected)}), but it takes {signature}"
            ) from reason
        return self


@pytree
@dataclasses.dataclass(frozen=True)
class Then(ScoreMod):
    """Applies two score modifications in order: `first.then(second)`."""

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
        """The row sizes of both, added."""
        return self.first.row_size + self.second.row_size

    @property
    def uses_coordinates(self) -> bool:
        """Whether either of them uses coordinates."""
        return self.first.uses_coordinates or self.second.uses_coordinates

    def rows(self, query: Float[Array, "B T N H"], scale: float | Array) -> Float[Array, "B T N R"] | None:
        """Returns the rows of both, concatenated."""
        both = (_checked_rows(mod, query, scale) for mod in (self.first, self.second))
        given = [rows for rows in both if rows is not None]
        return jnp.concatenate(given, axis=-1) if given else None

    def prepare(self, query: Float[Array, "B T N H"], q_at: Coordinates, kv_at: Coordinates) -> ScoreMod:
        """Prepares both."""
        return Then(self.first.prepare(query, q_at, kv_at), self.second.prepare(query, q_at, kv_at))


ScoreModLike = ScoreMod | Callable[..., Any] | None
"""The type of the argument `score_mod`: a `ScoreMod`, a function `fn(score, query, key, head)`, or None."""


def compose(*mods: ScoreMod | Callable[..., Any]) -> ScoreMod:
    """Composes score modifications, the first one first: `compose(a, b, c)` is `a.then(b).then(c)`.

    Args:
        *mods: score modifications or functions `fn(score, query, key, head)`, at least one.

    Raises:
        ValueError: there is none.
        TypeError: one is neither a `ScoreMod` nor a function.
    """
    if not mods:
        raise ValueError("compose needs at least one score modification, got none")
    return functools.reduce(ScoreMod.then, mods[1:], ScoreMod.of(mods[0]))


def for_kernel(
    mod: ScoreMod, query: Float[Array, "B T N H"], scale: float | Array, q_at: Coordinates, kv_at: Coordinates
) -> tuple[ScoreMod, Float[Array, "B T N R"] | None]:
    """Returns the prepared score modification and its rows.

    Raises:
        TypeError: the modification does not fit the call, or returns no floating scalar.
        ValueError: an array of the modification does not fit the call.
    """
    mod = mod.prepare(query, q_at, kv_at)
    rows = _checked_rows(mod, query, scale)
    score, row = np.zeros((), accumulator(query.dtype)), None if rows is None else np.zeros(rows.shape[-1:], rows.dtype)
    # The lambda is needed because JAX hashes functions, and a ScoreMod with arrays is not hashable.
    query_at, key_at = _one_pair(q_at, kv_at)
    query_at = dataclasses.replace(query_at, batch=np.int32(0), head=np.int32(0))
    result = jax.eval_shape(lambda *one: mod(*one), score, query_at, key_at, np.int32(0), row)
    if result.shape != () or result.dtype != score.dtype:
        raise TypeError(f"{_name(mod)} must return one {score.dtype} score, got {result.dtype} of shape {result.shape}")
    return mod, rows


def _one_pair(*at: Coordinates) -> list[Coordinates]:
    """Returns coordinates of one pair with the dtypes of the given ones."""
    return [jax.tree.map(lambda x: np.zeros((), x.dtype), each) for each in at]


def _name(mod: ScoreMod) -> str:
    """Returns the name of a score modification in messages."""
    return f"the score_mod {type(mod).__name__}"


def _checked_rows(
    mod: ScoreMod, query: Float[Array, "B T N H"], scale: float | Array
) -> Float[Array, "B T N R"] | None:
    """Returns `mod.rows(query, scale)` in float32 or wider.

    Raises:
        ValueError: the shape does not agree with `row_size`.
    """
    rows, expected = mod.rows(query, scale), (*query.shape[:3], mod.row_size)
    if (None if rows is None else rows.shape) != (expected if mod.row_size else None):
        raise ValueError(
            f"the rows of {_name(mod)} must be [B, T, N, row_size] {expected}, or None where row_size is 0; "
            f"got {None if rows is None else rows.shape}"
        )
    return None if rows is None else rows.astype(accumulator(query.dtype))

"""Single-head attention for recurrent decoders, with any score of `seqattn.scores`, global or local."""

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from seqattn import scores
from seqattn.attention import attend_scores
from seqattn.checks import check_sizes
from seqattn.coordinates import Coordinates
from seqattn.mask import Mask
from seqattn.masks import NotPadding
from seqattn.nn.initializers import xavier_uniform
from seqattn.nn.key_value import KeyValue
from seqattn.nn.local_window import LocalWindow, Monotonic, Predictive
from seqattn.nn.parameter_rule import Kind, ParameterRule

RULES = (
    ParameterRule("*attention/projection", Kind.VECTOR),
    ParameterRule("*query_weight", Kind.MATRIX, P(None, "fsdp"), outputs=-2),
    ParameterRule("*key_weight", Kind.MATRIX, P(None, "fsdp"), outputs=-2),
)


class Score(enum.Enum):
    """Score of a decoder state and an encoder state. Each is the function of the same name in `seqattn.scores`."""

    DOT = "dot"
    SCALED_DOT = "scaled_dot"
    GENERAL = "general"
    SCALED_GENERAL = "scaled_general"
    CONCAT = "concat"
    ADDITIVE = "additive"


class ScoredAttention(nnx.Module):
    """Attention of decoder states over encoder states, with a choice of scores (Bahdanau 2014; Luong 2015, section 3).

    The context of a decoder state is the sum of the encoder states, weighted by the softmax of their scores. `project`
    computes once the part of the score that depends on the key alone.

    Args:
        score: the score.
        query_dim: Q, the size of decoder states.
        key_dim: D, the size of encoder states.
        hidden_dim: F, the size of the hidden layer of the concat and additive scores and of `Predictive`. Defaults to
            `key_dim`.
        mask: which encoder states may be attended to. Defaults to `NotPadding()`.
        local: if given, attends to a window around one source position (Luong 2015, section 3.2). The position of a
            query must then be the step of the decoder. If None, attends to everything that the mask allows.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform) and is not kept.

    Raises:
        ValueError: a dot score with `query_dim` different from `key_dim`, or a size below 1.

    >>> attention = ScoredAttention(Score.ADDITIVE, query_dim=3, key_dim=4, rngs=nnx.Rngs(0))
    >>> memory = attention.project(jnp.ones((2, 5, 4)), Coordinates.from_lengths([5, 0], 5))
    >>> context, weights = attention(jnp.ones((2, 1, 3)), Coordinates.from_lengths([1, 1], 1), memory)
    >>> print(context.shape, weights.sum(axis=-1).ravel())
    (2, 1, 4) [1. 0.]
    """

    def __init__(
        self,
        score: Score,
        query_dim: int,
        key_dim: int,
        *,
        hidden_dim: int | None = None,
        mask: Mask | None = None,
        local: Monotonic | Predictive | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        hidden_dim = key_dim if hidden_dim is None else hidden_dim
        check_sizes(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        if score in (Score.DOT, Score.SCALED_DOT) and query_dim != key_dim:
            raise ValueError(f"{score.value} needs query_dim ({query_dim}) equal to key_dim ({key_dim}); use general")
        # NotPadding does not read positions: those of source and target are not comparable.
        self.score, self.mask = score, NotPadding() if mask is None else mask
        self.query_weight, self.key_weight, self.projection = _draw(
            score, (query_dim, key_dim, hidden_dim), param_dtype, rngs
        )
        sizes = (query_dim, hidden_dim)
        self.window = None if local is None else LocalWindow(local, *sizes, param_dtype=param_dtype, rngs=rngs)

    def project(self, encoded: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Computes the memory of encoder states.

        Args:
            encoded: encoder states `[*batch, S, D]`.
            at: their coordinates.

        Returns:
            The states as values `[*batch, S, 1, D]`, and as keys the part of the score that depends on them alone.
        """
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, encoded.shape[:-1]), at)
        # Padding may hold NaN, which would enter sums and gradients before the mask removes it.
        encoded = jnp.where(at.segment[..., None] != 0, encoded, jnp.zeros_like(encoded))
        key = encoded if self.key_weight is None else encoded @ self.key_weight[...].T
        return KeyValue(key[..., None, :], encoded[..., None, :], at)

    def __call__(
        self, query: Float[Array, "*batch T Q"], at: Coordinates, memory: KeyValue
    ) -> tuple[Float[Array, "*batch T D"], Float[Array, "*batch T S"]]:
        """Attends from decoder states to the memory.

        Args:
            query: decoder states `[*batch, T, Q]`.
            at: their coordinates.
            memory: the result of `project`.

        Returns:
            Contexts `[*batch, T, D]` and weights `[*batch, T, S]`. The weights of a query sum to 1; with `Predictive`
            to less than 1, and for a query with no visible key to 0.
        """
        # As in `project`: a masked score has gradient 0, but 0 times NaN is NaN.
        real = jnp.broadcast_to(at.segment, query.shape[:-1])[..., None] != 0
        query = jnp.where(real, query, jnp.zeros_like(query))
        scored, share = self._scored(query, memory)[..., None, :, :], None
        if self.window is None:
            context, weights = attend_scores(scored, memory.value, mask=self.mask, q_at=at, kv_at=memory.at)
        else:
            seen, share = self.window(query, at, memory.at)
            # A window may depend on the query's content, not on coordinates alone, so the mask becomes a dense
            # array.
            allowed = jnp.broadcast_to(self.mask.dense(at, memory.at, num_heads=1), scored.shape)
            context, weights = attend_scores(scored, memory.value, mask=allowed & seen[..., None, :, :])
        context, weights = context[..., 0, :], weights[..., 0, :, :]
        # Luong 2015, equation 10: the Gaussian multiplies the softmax, without renormalising it.
        return (context, weights) if share is None else _narrowed(weights * share, memory.value[..., 0, :])

    def _scored(self, query: Float[Array, "*batch T Q"], memory: KeyValue) -> Float[Array, "*batch T S"]:
        """Returns the score of every query with every key, `[*batch, T, S]`."""
        if self.query_weight is not None:
            query = query @ self.query_weight[...].T
        over_pairs = jax.vmap(jax.vmap(self._pair, in_axes=(None, 0)), in_axes=(0, None))
        return jnp.vectorize(over_pairs, signature="(t,q),(s,q)->(t,s)")(query, memory.key[..., 0, :])

    def _pair(self, query: Float[Array, "F"], key: Float[Array, "F"]) -> Float[Array, ""]:
        """Score of one query and one key, each already multiplied by its matrix."""
        if self.projection is not None:
            return scores.perceptron(query, key, self.projection[...])
        scaled = self.score in (Score.SCALED_DOT, Score.SCALED_GENERAL)
        return scores.scaled_dot(query, key) if scaled else scores.dot(query, key)


def _narrowed(
    weights: Float[Array, "*batch T S"], value: Float[Array, "*batch S D"]
) -> tuple[Float[Array, "*batch T D"], Float[Array, "*batch T S"]]:
    """Recomputes the contexts from narrowed weights.

    The weights are already NaN for a query that sees a non-finite value, so such values are replaced by 0 here.
    """
    finite = jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value)).astype(weights.dtype)
    return jnp.matmul(weights, finite, precision=jax.lax.Precision.HIGHEST).astype(value.dtype), weights


def _draw(
    score: Score, dims: tuple[int, int, int], param_dtype: DTypeLike, rngs: nnx.Rngs
) -> tuple[nnx.Param | None, nnx.Param | None, nnx.Param | None]:
    """Draws the query matrix, the key matrix and the projection of a score; None for those that it does not have."""
    query_dim, key_dim, hidden_dim = dims

    def draw(*shape: int) -> Array:
        return xavier_uniform(rngs.params(), shape, param_dtype)

    if score in (Score.DOT, Score.SCALED_DOT):
        return None, None, None
    if score in (Score.GENERAL, Score.SCALED_GENERAL):
        return None, nnx.Param(draw(query_dim, key_dim)), None
    if score is Score.CONCAT:
        # W [q; k] = W_q q + W_k k. Drawn as one matrix, the halves have its Xavier scale.
        both = draw(hidden_dim, query_dim + key_dim)
        query_weight, key_weight = both[:, :query_dim], both[:, query_dim:]
    else:
        query_weight, key_weight = draw(hidden_dim, query_dim), draw(hidden_dim, key_dim)
    return nnx.Param(query_weight), nnx.Param(key_weight), nnx.Param(draw(hidden_dim, 1)[:, 0])

"""The attention of recurrent decoders: one head, over any score of `seqattn.scores`, global or local."""

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
    """How alike a decoder state and an encoder state are; each is the function of that name in `seqattn.scores`."""

    DOT = "dot"
    SCALED_DOT = "scaled_dot"
    GENERAL = "general"
    SCALED_GENERAL = "scaled_general"
    CONCAT = "concat"
    ADDITIVE = "additive"


class ScoredAttention(nnx.Module):
    """A context for each decoder state: the encoder states weighted by the softmax of their scores.

    Whatever of a score depends on the key alone is computed once, in `project`.

    Args:
        score: which score.
        query_dim: Q, the size of decoder states.
        key_dim: D, the size of encoder states.
        hidden_dim: F, the hidden layer of the concat and additive scores and of `Predictive`; `key_dim` where not
            given.
        mask: which encoder states may be attended to.
        local: look around one source position only (Luong 2015, section 3.2), and at all that the mask allows where
            not given. The position of a query is then the step of the decoder.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform); not kept.

    Raises:
        ValueError: a dot product of different sizes, or a size below 1.

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
        # NotPadding asks nothing of positions, which in source and target are not comparable.
        self.score, self.mask = score, NotPadding() if mask is None else mask
        self.query_weight, self.key_weight, self.projection = _draw(
            score, (query_dim, key_dim, hidden_dim), param_dtype, rngs
        )
        sizes = (query_dim, hidden_dim)
        self.window = None if local is None else LocalWindow(local, *sizes, param_dtype=param_dtype, rngs=rngs)

    def project(self, encoded: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """The memory of encoder states `[*batch, S, D]`: their values, and what scores need of them as keys."""
        at = jax.tree.map(lambda field: jnp.broadcast_to(field, encoded.shape[:-1]), at)
        # Padding may hold anything, also NaN, and its key enters sums before the mask removes it.
        encoded = jnp.where(at.segment[..., None] != 0, encoded, jnp.zeros_like(encoded))
        key = encoded if self.key_weight is None else encoded @ self.key_weight[...].T
        return KeyValue(key[..., None, :], encoded[..., None, :], at)

    def __call__(
        self, query: Float[Array, "*batch T Q"], at: Coordinates, memory: KeyValue
    ) -> tuple[Float[Array, "*batch T D"], Float[Array, "*batch T S"]]:
        """Contexts `[*batch, T, D]` and weights `[*batch, T, S]` of decoder states `[*batch, T, Q]`.

        The weights of a query sum to 1, to less with `Predictive`, and to 0 where it sees nothing.
        """
        # As in `project`: a masked score is 0 in the backward pass, but 0 times NaN is not.
        real = jnp.broadcast_to(at.segment, query.shape[:-1])[..., None] != 0
        query = jnp.where(real, query, jnp.zeros_like(query))
        scored, share = self._scored(query, memory)[..., None, :, :], None
        if self.window is None:
            context, weights = attend_scores(scored, memory.value, mask=self.mask, q_at=at, kv_at=memory.at)
        else:
            seen, share = self.window(query, at, memory.at)
            allowed = jnp.broadcast_to(self.mask.dense(at, memory.at, num_heads=1), scored.shape)
            context, weights = attend_scores(scored, memory.value, mask=allowed & seen[..., None, :, :])
        context, weights = context[..., 0, :], weights[..., 0, :, :]
        return (context, weights) if share is None else _narrowed(weights * share, memory.value[..., 0, :])

    def _scored(self, query: Float[Array, "*batch T Q"], memory: KeyValue) -> Float[Array, "*batch T S"]:
        """The score of every query with every key."""
        if self.query_weight is not None:
            query = query @ self.query_weight[...].T
        over_pairs = jax.vmap(jax.vmap(self._pair, in_axes=(None, 0)), in_axes=(0, None))
        return jnp.vectorize(over_pairs, signature="(t,q),(s,q)->(t,s)")(query, memory.key[..., 0, :])

    def _pair(self, query: Float[Array, "F"], key: Float[Array, "F"]) -> Float[Array, ""]:
        """The score of one query and one key, each already through its matrix."""
        if self.projection is not None:
            return scores.perceptron(query, key, self.projection[...])
        scaled = self.score in (Score.SCALED_DOT, Score.SCALED_GENERAL)
        return scores.scaled_dot(query, key) if scaled else scores.dot(query, key)


def _narrowed(
    weights: Float[Array, "*batch T S"], value: Float[Array, "*batch S D"]
) -> tuple[Float[Array, "*batch T D"], Float[Array, "*batch T S"]]:
    """The values weighted anew, and the weights, which are NaN already where a visible value is not finite."""
    finite = jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value)).astype(weights.dtype)
    return jnp.matmul(weights, finite, precision=jax.lax.Precision.HIGHEST).astype(value.dtype), weights


def _draw(
    score: Score, dims: tuple[int, int, int], param_dtype: DTypeLike, rngs: nnx.Rngs
) -> tuple[nnx.Param | None, nnx.Param | None, nnx.Param | None]:
    """The query's matrix, the key's matrix and the projection of a score; None for what it does not have."""
    query_dim, key_dim, hidden_dim = dims

    def draw(*shape: int) -> Array:
        return xavier_uniform(rngs.params(), shape, param_dtype)

    if score in (Score.DOT, Score.SCALED_DOT):
        return None, None, None
    if score in (Score.GENERAL, Score.SCALED_GENERAL):
        return None, nnx.Param(draw(query_dim, key_dim)), None
    if score is Score.CONCAT:
        both = draw(hidden_dim, query_dim + key_dim)
        query_weight, key_weight = both[:, :query_dim], both[:, query_dim:]
    else:
        query_weight, key_weight = draw(hidden_dim, query_dim), draw(hidden_dim, key_dim)
    return nnx.Param(query_weight), nnx.Param(key_weight), nnx.Param(draw(hidden_dim, 1)[:, 0])

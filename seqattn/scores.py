"""Attention scores of one query and one key. Lift them over queries and keys with `jax.vmap`.

`jax.vmap(jax.vmap(dot, (None, 0)), (0, None))(queries, keys)` is the matrix `[T, S]` of all scores, which
`attend_scores` takes.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(query: Float[Array, "D"], key: Float[Array, "D"]) -> Float[Array, ""]:
    """Returns `q . k` (Luong 2015, "dot").

    Args:
        query: `[D]`.
        key: `[D]`.

    Returns:
        A scalar.

    An encoder state (0.8, 0.2) and a decoder state (0.7, 0.3):

    >>> print(dot(jnp.array([0.7, 0.3]), jnp.array([0.8, 0.2])).round(2))
    0.62
    """
    return query @ key


def scaled_dot(query: Float[Array, "D"], key: Float[Array, "D"]) -> Float[Array, ""]:
    """Returns `q . k / sqrt(D)` (Vaswani 2017, equation 1).

    Args:
        query: `[D]`.
        key: `[D]`.

    Returns:
        A scalar.
    """
    return query @ key / math.sqrt(key.shape[-1])


def general(query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "Q D"]) -> Float[Array, ""]:
    """Returns the bilinear score `q . W k` (Luong 2015, "general"), for a query and a key of any two sizes.

    Args:
        query: `[Q]`.
        key: `[D]`.
        weight: W, `[Q, D]`.

    Returns:
        A scalar.
    """
    return query @ (weight @ key)


def scaled_general(query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "Q D"]) -> Float[Array, ""]:
    """Returns `q . W k / sqrt(Q)`: `general`, with a variance that does not grow with Q."""
    return general(query, key, weight) / math.sqrt(query.shape[-1])


def concat(
    query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "F Q+D"], projection: Float[Array, "F"]
) -> Float[Array, ""]:
    """Returns `v . tanh(W [q; k])` (Luong 2015, "concat").

    Args:
        query: `[Q]`.
        key: `[D]`.
        weight: W, `[F, Q + D]`.
        projection: v, `[F]`.

    Returns:
        A scalar.
    """
    return projection @ jnp.tanh(weight @ jnp.concatenate([query, key]))


def perceptron(query: Float[Array, "F"], key: Float[Array, "F"], projection: Float[Array, "F"]) -> Float[Array, ""]:
    """Returns `v . tanh(q + k)`: the additive or concat score of a query and a key that are already projected.

    Args:
        query: W q, `[F]`.
        key: U k, `[F]`.
        projection: v, `[F]`.

    Returns:
        A scalar.
    """
    return projection @ jnp.tanh(query + key)


def additive(
    query: Float[Array, "Q"],
    key: Float[Array, "D"],
    query_weight: Float[Array, "F Q"],
    key_weight: Float[Array, "F D"],
    projection: Float[Array, "F"],
) -> Float[Array, ""]:
    """Returns `v . tanh(W q + U k)` (Bahdanau 2014, appendix A.1.2).

    Args:
        query: `[Q]`.
        key: `[D]`.
        query_weight: W, `[F, Q]`.
        key_weight: U, `[F, D]`.
        projection: v, `[F]`.

    Returns:
        A scalar.

    >>> one = jnp.ones((1, 1))
    >>> print(additive(jnp.array([0.5]), jnp.array([-0.5]), one, one, jnp.ones(1)))
    0.0
    """
    return perceptron(query_weight @ query, key_weight @ key, projection)

"""How alike one query and one key are: functions of two vectors, lifted with `jax.vmap` over queries and keys.

`jax.vmap(jax.vmap(dot, (None, 0)), (0, None))(queries, keys)` is the matrix of all scores.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(query: Float[Array, "D"], key: Float[Array, "D"]) -> Float[Array, ""]:
    """`q . k` (Luong 2015, "dot").

    The lecture's example, encoder state (0.8, 0.2) and decoder state (0.7, 0.3):

    >>> print(dot(jnp.array([0.7, 0.3]), jnp.array([0.8, 0.2])).round(2))
    0.62
    """
    return query @ key


def scaled_dot(query: Float[Array, "D"], key: Float[Array, "D"]) -> Float[Array, ""]:
    """`q . k / sqrt(D)` (Vaswani 2017, equation 1)."""
    return query @ key / math.sqrt(key.shape[-1])


def general(query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "Q D"]) -> Float[Array, ""]:
    """`q . W k`, bilinear (Luong 2015, "general"): query and key may differ in size."""
    return query @ (weight @ key)


def scaled_general(query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "Q D"]) -> Float[Array, ""]:
    """`q . W k / sqrt(Q)`: the bilinear score with the variance of the product taken out."""
    return general(query, key, weight) / math.sqrt(query.shape[-1])


def concat(
    query: Float[Array, "Q"], key: Float[Array, "D"], weight: Float[Array, "F Q+D"], projection: Float[Array, "F"]
) -> Float[Array, ""]:
    """`v . tanh(W [q; k])` (Luong 2015, "concat")."""
    return projection @ jnp.tanh(weight @ jnp.concatenate([query, key]))


def perceptron(query: Float[Array, "F"], key: Float[Array, "F"], projection: Float[Array, "F"]) -> Float[Array, ""]:
    """`v . tanh(q + k)`: the additive and the concat score of a query and a key already through their matrices."""
    return projection @ jnp.tanh(query + key)


def additive(
    query: Float[Array, "Q"],
    key: Float[Array, "D"],
    query_weight: Float[Array, "F Q"],
    key_weight: Float[Array, "F D"],
    projection: Float[Array, "F"],
) -> Float[Array, ""]:
    """`v . tanh(W q + U k)` (Bahdanau 2014, appendix A.1.2).

    >>> one = jnp.ones((1, 1))
    >>> print(additive(jnp.array([0.5]), jnp.array([-0.5]), one, one, jnp.ones(1)))
    0.0
    """
    return perceptron(query_weight @ query, key_weight @ key, projection)

"""Scores against NumPy, lifted over queries and keys as users do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn import scores

T, S, Q, D, F = 3, 5, 7, 11, 13
RANDOM = np.random.default_rng(0)


def _normal(*shape):
    return jnp.asarray(RANDOM.normal(scale=0.5, size=shape).astype(np.float32))


def _all_pairs(score, queries, keys, *parameters):
    """`[T, S]`, jitted."""

    @jax.jit
    def matrix(queries, keys, *parameters):
        def one(query, key):
            return score(query, key, *parameters)

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(queries, keys)

    return matrix(queries, keys, *parameters)


def _general(query, key, weight):
    return sum(query[i] * weight[i, j] * key[j] for i in range(Q) for j in range(D))


def _concat(query, key, weight, projection):
    hidden = [np.tanh(row[:Q] @ query + row[Q:] @ key) for row in weight]
    return sum(v * h for v, h in zip(projection, hidden, strict=True))


def _additive(query, key, query_weight, key_weight, projection):
    hidden = [np.tanh(w @ query + u @ key) for w, u in zip(query_weight, key_weight, strict=True)]
    return sum(v * h for v, h in zip(projection, hidden, strict=True))


CASES = {
    "dot": (scores.dot, lambda q, k: sum(q * k), D, ()),
    "scaled_dot": (scores.scaled_dot, lambda q, k: sum(q * k) / 11**0.5, D, ()),
    "general": (scores.general, _general, Q, ((Q, D),)),
    "scaled_general": (scores.scaled_general, lambda *args: _general(*args) / 7**0.5, Q, ((Q, D),)),
    "concat": (scores.concat, _concat, Q, ((F, Q + D), (F,))),
    "additive": (scores.additive, _additive, Q, ((F, Q), (F, D), (F,))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_pair_has_the_score_of_numpy(name):
    score, expected, query_dim, shapes = CASES[name]
    queries, keys, parameters = _normal(T, query_dim), _normal(S, D), [_normal(*shape) for shape in shapes]
    wide = [np.asarray(x, np.float64) for x in parameters]
    wide_queries, wide_keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    matrix = [[expected(query, key, *wide) for key in wide_keys] for query in wide_queries]
    np.testing.assert_allclose(_all_pairs(score, queries, keys, *parameters), matrix, rtol=2e-5, atol=2e-5)


def test_the_lecture_multiplies_encoder_and_decoder_state():
    """Encoder state (0.8, 0.2), decoder state (0.7, 0.3): 0.56 + 0.06; a weight of 0.7 takes (0.56, 0.14) of it."""
    encoder, decoder = jnp.array([0.8, 0.2]), jnp.array([0.7, 0.3])
    np.testing.assert_allclose(scores.dot(decoder, encoder), 0.62, rtol=1e-6)
    np.testing.assert_allclose(0.7 * encoder, [0.56, 0.14], rtol=1e-6)


def test_the_identity_makes_general_a_dot_product():
    query, key = _normal(D), _normal(D)
    np.testing.assert_allclose(scores.general(query, key, jnp.eye(D)), query @ key, rtol=1e-5)
    np.testing.assert_allclose(scores.scaled_general(query, key, jnp.eye(D)), query @ key / 11**0.5, rtol=1e-5)


def test_concat_is_additive_with_its_matrices_side_by_side():
    query, key, left, right, projection = _normal(Q), _normal(D), _normal(F, Q), _normal(F, D), _normal(F)
    together = scores.concat(query, key, jnp.concatenate([left, right], axis=1), projection)
    np.testing.assert_allclose(together, scores.additive(query, key, left, right, projection), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_argument(name):
    score, _, query_dim, shapes = CASES[name]
    arguments = [_normal(query_dim), _normal(D), *(_normal(*shape) for shape in shapes)]
    gradients = jax.grad(score, argnums=tuple(range(len(arguments))))(*arguments)
    assert all(np.all(np.asarray(gradient) != 0) for gradient in gradients)

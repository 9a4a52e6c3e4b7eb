"""The attention of recurrent decoders against `seqattn.scores` pair by pair, and the softmax written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import scores
from seqattn.coordinates import Coordinates
from seqattn.masks import Causal, NotPadding
from seqattn.nn import Score, ScoredAttention
from tests.parameters import drawn

B, T, S, Q, D, F = 3, 2, 7, 5, 4, 11
QUERY, ENCODED = (np.random.default_rng(0).normal(size=(B, *n)).astype(np.float32) for n in ((T, Q), (S, D)))
AT, ENCODED_AT = Coordinates.from_lengths([2, 1, 2], T), Coordinates.from_lengths([7, 4, 0], S)
each_score = pytest.mark.parametrize("score", Score)


def _size(score: Score) -> int:
    return D if score in (Score.DOT, Score.SCALED_DOT) else Q


@functools.cache
def _attention(score: Score, **options) -> ScoredAttention:
    options = {"hidden_dim": F} | options
    return drawn(lambda: ScoredAttention(score, _size(score), D, **options, rngs=nnx.Rngs(0)))


def _query(score: Score) -> jax.Array:
    return jnp.asarray(QUERY[..., : _size(score)])


@jax.jit
def _attend(attention, query, at, encoded, encoded_at):
    return attention(query, at, attention.project(encoded, encoded_at))


def _by_pairs(attention, query, encoded):
    """The same, said plainly: the score of every pair by its function, a softmax over real tokens, a weighted sum."""
    matrices = [w[...] for w in (attention.query_weight, attention.key_weight) if w is not None]
    given = {
        Score.GENERAL: matrices,
        Score.SCALED_GENERAL: matrices,
        Score.CONCAT: lambda: [jnp.concatenate(matrices, axis=1), attention.projection[...]],
        Score.ADDITIVE: lambda: [*matrices, attention.projection[...]],
    }.get(attention.score, [])
    given = given() if callable(given) else given
    function = getattr(scores, attention.score.value)
    pair = lambda query, key: function(query, key, *given)  # noqa: E731
    scored = jax.vmap(jax.vmap(jax.vmap(pair, (None, 0)), (0, None)))(query, encoded)
    visible = (AT.segment[:, :, None] != 0) & (ENCODED_AT.segment[:, None, :] != 0)
    exponentials = jnp.where(visible, jnp.exp(scored), 0.0)
    weights = exponentials / jnp.maximum(exponentials.sum(axis=-1, keepdims=True), 1e-30)
    return weights @ encoded, weights


@functools.partial(jax.jit, static_argnames="attend")
def _with_gradients(attend, *given):
    """Context and weights, and the gradients of a number made of both by attention, query and encoder states."""

    def total(*given):
        context, weights = attend(*given)
        number = (context * jnp.cos(jnp.arange(context.size)).reshape(context.shape)).sum() + (weights**2).sum()
        return number, (context, weights)

    gradients, found = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*given)
    return found, gradients


def _ours(attention, query, encoded):
    return attention(query, AT, attention.project(encoded, ENCODED_AT))


@each_score
def test_values_and_gradients_are_those_of_the_score_functions(score):
    given = _attention(score), _query(score), jnp.asarray(ENCODED)
    found, gradients = _with_gradients(_ours, *given)
    expected, slopes = _with_gradients(_by_pairs, *given)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@each_score
def test_nan_in_padding_leaves_no_trace_forward_or_backward(score):
    attention, query, encoded = _attention(score), _query(score), jnp.asarray(ENCODED)
    expected = jax.tree.leaves(_with_gradients(_ours, attention, query, encoded))
    for filling in (np.nan, np.inf, 1e6):
        spoilt = [
            jnp.where(at.segment[..., None] != 0, x, np.float32(filling))
            for at, x in ((AT, query), (ENCODED_AT, encoded))
        ]
        found = jax.tree.leaves(_with_gradients(_ours, attention, *spoilt))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_weights_sum_to_1_or_to_0_where_there_is_nothing_to_see():
    context, weights = _attend(_attention(Score.ADDITIVE), jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    np.testing.assert_allclose(np.asarray(weights).sum(axis=-1), [[1, 1], [1, 0], [0, 0]], atol=1e-6)
    assert not np.any(weights[1, 0, 4:])
    assert not np.any(context[2])


def test_large_scores_do_not_overflow():
    attention = jax.tree.map(lambda x: 100 * x, _attention(Score.GENERAL))
    context, weights = _attend(attention, jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    assert np.all(np.isfinite(context))
    np.testing.assert_allclose(np.asarray(weights).sum(axis=-1), [[1, 1], [1, 0], [0, 0]], atol=1e-6)


def test_any_mask():
    attention = _attention(Score.GENERAL, mask=Causal() & NotPadding())
    _, weights = _attend(attention, jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    np.testing.assert_array_equal(np.asarray(weights[0]) > 0, np.tri(T, S, dtype=bool))


def test_any_number_of_leading_dims_and_coordinates_of_one_row():
    attention = _attention(Score.CONCAT)
    expected = _attend(attention, jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    one, at = jax.tree.map(lambda x: x[1], ((jnp.asarray(QUERY), jnp.asarray(ENCODED)), (AT, ENCODED_AT)))
    for ours, theirs in zip(_attend(attention, one[0], at[0], one[1], at[1]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[1], atol=1e-6)
    shared = _attend(attention, jnp.asarray(QUERY), at[0], jnp.asarray(ENCODED), at[1])
    for ours, theirs in zip(shared, expected, strict=True):
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)


def test_eager_is_jitted():
    attention = _attention(Score.ADDITIVE)
    eager = attention(jnp.asarray(QUERY), AT, attention.project(jnp.asarray(ENCODED), ENCODED_AT))
    jitted = _attend(attention, jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    for ours, theirs in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_floats_are_summed_in_float32(dtype):
    attention = jax.tree.map(lambda x: x.astype(dtype), _attention(Score.SCALED_GENERAL))
    context, weights = _attend(attention, jnp.asarray(QUERY, dtype), AT, jnp.asarray(ENCODED, dtype), ENCODED_AT)
    assert (context.dtype, weights.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(np.asarray(weights).sum(axis=-1), [[1, 1], [1, 0], [0, 0]], atol=1e-6)


def test_parameters():
    def shapes(score, query_dim=Q, **options):
        make = lambda: ScoredAttention(score, query_dim, D, **options, rngs=nnx.Rngs(0))  # noqa: E731
        return [x.shape for x in jax.tree.leaves(nnx.eval_shape(make))]

    assert shapes(Score.DOT, D) == shapes(Score.SCALED_DOT, D) == []
    assert shapes(Score.GENERAL) == shapes(Score.SCALED_GENERAL) == [(Q, D)]
    for score in (Score.CONCAT, Score.ADDITIVE):
        assert sorted(shapes(score, hidden_dim=F)) == sorted([(F, Q), (F, D), (F,)])
        assert sorted(shapes(score)) == sorted([(D, Q), (D, D), (D,)])


def test_the_matrix_of_concat_is_drawn_whole():
    """Xavier's bound of `[F, Q + D]`, which two matrices of their own would exceed."""
    attention = ScoredAttention(Score.CONCAT, 67, 71, hidden_dim=F, rngs=nnx.Rngs(0))
    for weight in (attention.query_weight, attention.key_weight):
        largest, bound = np.abs(weight[...]).max(), (6 / (F + 67 + 71)) ** 0.5
        assert 0.95 * bound < largest <= bound


@pytest.mark.parametrize("score", [Score.DOT, Score.SCALED_DOT])
def test_a_dot_product_of_different_sizes_is_refused(score):
    with pytest.raises(ValueError, match=rf"{score.value} needs query_dim \(5\) equal to key_dim \(4\); use general"):
        ScoredAttention(score, Q, D, rngs=nnx.Rngs(0))

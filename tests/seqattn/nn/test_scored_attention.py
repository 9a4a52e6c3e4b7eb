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
from seqattn.nn.local_window import Monotonic, Predictive
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


LOCAL = [Monotonic(1), Predictive(2)]


@pytest.mark.parametrize(
    ("score", "local"), [*((score, None) for score in Score), *((Score.ADDITIVE, local) for local in LOCAL)]
)
def test_nan_in_padding_leaves_no_trace_forward_or_backward(score, local):
    attention, query, encoded = _attention(score, local=local), _query(score), jnp.asarray(ENCODED)
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


def _by_numpy(attention, query: np.ndarray, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local attention with the general score, float64: Luong 2015, equations 7 to 10, one query after the other."""
    context, weights = np.zeros((B, T, D)), np.zeros((B, T, S))
    window, radius = attention.window, attention.window.radius
    matrix, *predictor = (
        None if x is None else np.asarray(x[...], np.float64)
        for x in (attention.key_weight, window.weight, window.projection)
    )
    for row in range(B):
        size = int((np.asarray(ENCODED_AT.segment[row]) != 0).sum())
        for t in range(int((np.asarray(AT.segment[row]) != 0).sum())):
            h, center = query[row, t], float(t)
            if predictor[0] is not None:
                center = size / (1 + np.exp(-predictor[1] @ np.tanh(predictor[0] @ h)))
            inside = [s for s in range(size) if abs(s - center) <= radius]
            if not inside:
                continue
            exponentials = np.exp([h @ matrix @ encoded[row, s] for s in inside])
            weights[row, t, inside] = exponentials / exponentials.sum()
            if predictor[0] is not None:
                weights[row, t, inside] *= np.exp([-((s - center) ** 2) / (2 * (radius / 2) ** 2) for s in inside])
            context[row, t] = weights[row, t] @ encoded[row]
    return context, weights


@pytest.mark.parametrize("local", [*LOCAL, Monotonic(0), Predictive(1)], ids=str)
def test_local_attention_is_a_loop_over_queries(local):
    attention = _attention(Score.GENERAL, local=local)
    found = _attend(attention, jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT)
    expected = _by_numpy(attention, QUERY.astype(np.float64), ENCODED.astype(np.float64))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    totals = expected[1].sum(axis=-1)
    assert totals[0].min() > 0
    assert (totals[0].max() < 0.999) == isinstance(local, Predictive)
    assert not np.any(found[0][2])  # an empty source


def test_gradients_reach_the_predicted_position():
    """Against central differences of the loop, in float64."""
    direction = np.cos(np.arange(B * T * D)).reshape(B, T, D)
    with jax.enable_x64(True):
        attention = jax.tree.map(lambda x: x.astype(jnp.float64), _attention(Score.GENERAL, local=Predictive(2)))
        query, encoded = jnp.asarray(QUERY, jnp.float64), jnp.asarray(ENCODED, jnp.float64)

        @jax.jit
        @jax.grad
        def gradient(attention):
            return (_attend(attention, query, AT, encoded, ENCODED_AT)[0] * direction).sum()

        found = gradient(attention)
        for name in ("weight", "projection"):
            values = np.asarray(getattr(attention.window, name)[...])
            slopes = np.zeros_like(values)
            for index in np.ndindex(values.shape):
                for sign in (1, -1):
                    moved = values.copy()
                    moved[index] += sign * 1e-6
                    getattr(attention.window, name)[...] = jnp.asarray(moved)
                    slopes[index] += sign * (_by_numpy(attention, QUERY, ENCODED)[0] * direction).sum() / 2e-6
            getattr(attention.window, name)[...] = jnp.asarray(values)
            assert np.all(slopes != 0)
            np.testing.assert_allclose(getattr(found.window, name)[...], slopes, atol=1e-7)


@pytest.mark.parametrize("score", [Score.ADDITIVE, Score.SCALED_GENERAL])
def test_a_window_as_wide_as_the_source_is_global(score):
    given = jnp.asarray(QUERY), AT, jnp.asarray(ENCODED), ENCODED_AT
    expected = _attend(_attention(score), *given)
    for ours, theirs in zip(_attend(_attention(score, local=Monotonic(S)), *given), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    narrow = _attend(_attention(score, local=Monotonic(1)), *given)
    assert np.abs(narrow[1] - expected[1]).max() > 1e-2


@pytest.mark.parametrize("local", LOCAL, ids=str)
def test_a_query_far_behind_the_source_sees_nothing(local):
    attention = _attention(Score.GENERAL, local=local)
    far = Coordinates(AT.position + 99, AT.segment)
    context, weights = _attend(attention, jnp.asarray(QUERY), far, jnp.asarray(ENCODED), ENCODED_AT)
    for found in (context, weights):
        assert np.any(found) == isinstance(local, Predictive)  # whose center is inside the source


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


@pytest.mark.parametrize("local", [None, Predictive(2)], ids=["global", "local"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_floats_are_summed_in_float32(dtype, local):
    attention = jax.tree.map(lambda x: x.astype(dtype), _attention(Score.SCALED_GENERAL, local=local))
    context, weights = _attend(attention, jnp.asarray(QUERY, dtype), AT, jnp.asarray(ENCODED, dtype), ENCODED_AT)
    assert (context.dtype, weights.dtype) == (dtype, jnp.float32)
    if local is None:
        np.testing.assert_allclose(np.asarray(weights).sum(axis=-1), [[1, 1], [1, 0], [0, 0]], atol=1e-6)


def test_parameters():
    def shapes(score, query_dim=Q, **options):
        make = lambda: ScoredAttention(score, query_dim, D, **options, rngs=nnx.Rngs(0))  # noqa: E731
        return [x.shape for x in jax.tree.leaves(nnx.eval_shape(make))]

    assert shapes(Score.DOT, D) == shapes(Score.SCALED_DOT, D) == []
    assert shapes(Score.GENERAL) == shapes(Score.SCALED_GENERAL) == [(Q, D)]
    assert shapes(Score.DOT, D, local=Monotonic()) == []
    assert sorted(shapes(Score.DOT, D, local=Predictive(), hidden_dim=F)) == [(F,), (F, D)]
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


@pytest.mark.parametrize("name", ["query_dim", "key_dim", "hidden_dim"])
def test_sizes_below_1_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be an integer of at least 1"):
        ScoredAttention(Score.ADDITIVE, **{"query_dim": Q, "key_dim": D, "hidden_dim": F, name: 0}, rngs=nnx.Rngs(0))

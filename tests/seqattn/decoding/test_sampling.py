"""Draws have the probabilities that they should, and depend on their own key alone."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding import Greedy, History, Sample, Temperature, TopK, TopP, row_keys
from seqattn.decoding.processors import process
from tests.logits_oracle import expected, probabilities

ROWS, V = 20011, 5
LOGITS = np.array([0.3, -1.0, 1.1, -np.inf, 0.3], np.float32)
# Of 1000 fair experiments one exceeds it: the chi-square of so many degrees of freedom. The keys are fixed.
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 8: 26.12}


def _chi_square(counts, chances) -> float:
    counts, chances = np.ravel(counts), np.ravel(chances)
    assert np.all(counts[chances == 0] == 0)
    wanted = counts.sum() * chances[chances > 0]
    return float(((counts[chances > 0] - wanted) ** 2 / wanted).sum())


@jax.jit
def _draw(sampling, logits, keys):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(keys), V))[:, None]
    history = History(jnp.zeros((len(keys), 1, 1), jnp.int32), jnp.array(0), jnp.zeros((len(keys), 1), jnp.int32))
    return sampling.choose(process(sampling.filters, rows, history)[:, 0], keys)


@pytest.mark.parametrize(
    "filters",
    [(), (Temperature(0.5),), (Temperature(2.0), TopK(3)), (TopP(0.7),), (TopK(2), Temperature(3.0))],
    ids=str,
)
def test_draws_have_the_probabilities_of_the_filtered_logits(filters):
    logits = LOGITS.astype(np.float64)
    for each in filters:
        logits = expected(each, logits, [], 0)
    chances = probabilities(logits)
    counts = np.bincount(_draw(Sample(filters), LOGITS, row_keys(jax.random.key(5), ROWS)), minlength=V)
    assert _chi_square(counts, chances) < CHI_SQUARE[(chances > 0).sum() - 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_draws_from_small_logits_are_not_of_the_lowest_ids(dtype):
    """Noise of bfloat16 has so few values that many tokens have the largest one, of which the lowest would be taken."""
    size = 1009
    keys = row_keys(jax.random.key(5), ROWS)
    tokens = np.asarray(jax.jit(Sample().choose)(jnp.zeros((ROWS, size), dtype), keys))
    assert abs(tokens.mean() - (size - 1) / 2) < 5 * size / (12 * ROWS) ** 0.5
    assert len(np.unique(tokens)) == size


def test_chi_square_notices_other_probabilities():
    counts = np.bincount(_draw(Sample(), LOGITS, row_keys(jax.random.key(5), ROWS)), minlength=V)
    assert _chi_square(counts, probabilities(1.1 * LOGITS)) > CHI_SQUARE[3]


def test_neighbours_draw_independently():
    tokens = np.asarray(_draw(Sample((TopK(3),)), LOGITS, row_keys(jax.random.key(6), ROWS)))
    chances = probabilities(expected(TopK(3), LOGITS.astype(np.float64), [], 0))
    pairs = np.bincount(V * tokens[0:-1:2] + tokens[1::2], minlength=V * V)
    assert _chi_square(pairs, chances[:, None] * chances) < CHI_SQUARE[8]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_b15_greedy_takes_the_lowest_of_equal_logits(dtype):
    logits = jnp.asarray(np.array([[0, 2, 1, 2, 2], [1, 1, 1, 1, 1], [-1, -0.0, 0.0, -3, 0.0]]).astype(dtype))
    np.testing.assert_array_equal(Greedy().choose(logits, None), [1, 0, 1])
    assert Greedy().choose(logits, None).dtype == jnp.int32


def test_one_key_is_folded_with_the_row():
    key = jax.random.key(3)
    assert all(row_keys(key, 7)[row] == jax.random.fold_in(key, row) for row in range(7))
    assert jnp.all(row_keys(row_keys(key, 7), 7) == row_keys(key, 7))
    assert row_keys(key, 0).shape == (0,)


@pytest.mark.usefixtures("as_users_call_it")
def test_raw_keys_are_the_typed_ones():
    assert jnp.all(row_keys(jax.random.PRNGKey(3), 5) == row_keys(jax.random.key(3), 5))
    assert jnp.all(row_keys(np.asarray(jax.random.PRNGKey(3)), 5) == row_keys(jax.random.key(3), 5))
    each = jax.random.split(jax.random.key(4), 5)
    assert jnp.all(row_keys(jax.random.key_data(each), 5) == each)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_a_row_of_another_implementation_draws_alone_what_it_draws_in_a_batch(implementation):
    key = jax.random.key(3, impl=implementation)
    each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(5))
    for keys in (row_keys(key, 5), row_keys(each, 5)):
        assert len(np.unique(jax.random.key_data(keys), axis=0)) == 5
        together = _draw(Sample(), LOGITS, keys)
        alone = [_draw(Sample(), LOGITS, keys[row : row + 1])[0] for row in range(5)]
        np.testing.assert_array_equal(together, alone)
    for row in range(5):
        assert row_keys(each[row : row + 1], 1)[0] == row_keys(each, 5)[row]
    words = jnp.concatenate([jnp.zeros((1, 4), jnp.uint32), jnp.eye(4, dtype=jnp.uint32)])
    assert (
        len(np.unique(jax.random.key_data(row_keys(jax.random.wrap_key_data(words, impl=implementation), 5)), axis=0))
        == 5
    )


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (3, TypeError, r"a key must come from jax.random.key, got int32 of shape \(\)"),
        (np.uint32(3), TypeError, r"got uint32 of shape \(\)"),
        (np.zeros((2, 2), np.float32), TypeError, r"got float32 of shape \(2, 2\)"),
        (jax.random.split(jax.random.key(0), 3), ValueError, r"one for each of 5 rows; got keys of shape \(3,\)"),
        (
            jax.random.split(jax.random.key(0), (5, 1)),
            ValueError,
            r"one for each of 5 rows; got keys of shape \(5, 1\)",
        ),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_is_no_key_for_each_row_is_refused(key, error, message):
    with pytest.raises(error, match=message):
        row_keys(key, 5)


@pytest.mark.usefixtures("as_users_call_it")
def test_sample_without_keys_or_without_a_tuple_is_refused():
    with pytest.raises(ValueError, match="Sample needs a key for each row"):
        Sample().choose(jnp.zeros((1, V)), None)
    with pytest.raises(TypeError, match=r"Sample takes a tuple of filters: Sample\(\(TopK\(...\),\)\)"):
        Sample(TopK(3))

"""Attention to columns: the NumPy oracle, and no trace of what is not finite where it is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels import cached, reference
from seqattn.kernels.call import Call, Columns
from seqattn.nn import KeyColumns, KeyValue
from seqattn.score_mod import ScoreFunction
from tests import oracle

B, S, K, H, V = 3, 11, 2, 5, 7


def _case(length: int, group: int, dtype=np.float32, seed: int = 0):
    random = np.random.default_rng(seed)
    query = random.normal(size=(B, length, K * group, H)).astype(dtype)
    key, value = (random.normal(size=(B, S, K, dim)).astype(dtype) for dim in (H, V))
    visible = random.random((B, length, S)) < 0.6
    visible[1, 0] = False
    return query, key, value, visible


def _of(key, value) -> KeyColumns:
    return KeyColumns.of(KeyValue(jnp.asarray(key), jnp.asarray(value), Coordinates.range(S)))


def _call(query, key, value, visible, **options):
    laid, unused = _of(key, value), dict.fromkeys(("bias", "score_mod", "rows", "dropout"))
    columns, mask = Columns(laid.key, laid.value, laid.finite), None if visible is None else visible[:, None]
    at = {"q_at": Coordinates.range(query.shape[1]), "kv_at": Coordinates.range(S)}
    options = unused | jax.tree.map(lambda x: x[None], at) | {"scale": H**-0.5} | options
    return cached.attend(Call(query, None, None, mask=mask, columns=columns, **options))


@jax.jit
def _attend(query, key, value, visible):
    return _call(query, key, value, visible)[0]


@pytest.mark.parametrize(("length", "group"), [(1, 1), (3, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_equals_the_oracle(length, group, dtype, tolerance):
    query, key, value, visible = _case(length, group, dtype)
    output = _attend(*map(jnp.asarray, (query, key, value, visible)))
    assert output.dtype == dtype
    expected = oracle.attention(query, key, value, visible=visible[:, None]).output
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, atol=tolerance)
    assert not np.any(np.asarray(output)[1, 0]), "an empty row gives zeros"


def test_every_query_sees_every_key_without_visible():
    query, key, value, _ = _case(3, 2)
    output, _ = _call(jnp.asarray(query), key, value, None, scale=0.3)
    np.testing.assert_allclose(output, oracle.attention(query, key, value, scale=0.3).output, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_is_not_finite_shows_where_it_is_visible_and_nowhere_else(bad, where):
    query, key, value, visible = _case(3, 2)
    visible[0, :, 4] = [True, False, True]
    clean = np.asarray(_attend(*map(jnp.asarray, (query, key, value, visible))))
    {"key": key, "value": value}[where][0, 4, 1, 2] = bad
    given = [jnp.asarray(x) for x in (query, key, value, visible)]
    output = np.asarray(_attend(*given))
    assert np.all(np.isnan(output[0, [0, 2]]))
    np.testing.assert_array_equal(output[0, 1], clean[0, 1])
    np.testing.assert_array_equal(output[1:], clean[1:])
    # Hidden from all, it brings no gradient either.
    hidden = given[3].at[0, :, 4].set(False)
    for gradient in jax.grad(lambda *x: jnp.sum(_attend(*x, hidden)), (0, 1, 2))(*given[:3]):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_loses_its_row_and_nothing_else(bad):
    query, key, value, visible = _case(3, 2)
    visible[0, 1, 0] = True
    clean = np.array(_attend(*map(jnp.asarray, (query, key, value, visible))))
    query[0, 1, 2, 3] = query[1, 0, :, 0] = bad  # the second sees no key
    given = [jnp.asarray(x) for x in (query, key, value, visible)]
    output = np.asarray(_attend(*given))
    assert np.isnan(output[0, 1, 2]).all()
    assert not output[1, 0].any()
    clean[0, 1, 2] = output[0, 1, 2]
    np.testing.assert_array_equal(output, clean)
    # The other batch rows keep their gradients, and the query that sees no key has none.
    gradients = jax.grad(lambda *x: jnp.sum(_attend(*x, given[3])), (0, 1, 2))(*given[:3])
    assert all(np.isfinite(x[1:]).all() for x in gradients)
    assert not np.asarray(gradients[0])[1, 0].any()


def test_gradients_are_those_of_reference():
    query, key, value, visible = (jnp.asarray(x) for x in _case(3, 2))
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(B, 3, 2 * K, V)), jnp.float32)
    at = {"q_at": Coordinates.range(3), "kv_at": Coordinates.range(S)}
    other = {"bias": None, "score_mod": None, "rows": None, "dropout": None} | jax.tree.map(lambda x: x[None], at)

    def plain(query, key, value):
        return reference.attend(Call(query, key, value, mask=visible[:, None], scale=H**-0.5, **other))[0]

    found, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(direction * f(*x)), (0, 1, 2)))(query, key, value)
        for f in (lambda *x: _attend(*x, visible), plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_scores_are_modified_after_the_scale_and_what_becomes_minus_infinity_is_masked():
    """Also where the key was not finite: it is not seen then."""
    query, key, value, visible = _case(3, 2)
    bias = np.random.default_rng(2).normal(size=(B, 2 * K, 3, S)).astype(np.float32)
    bias[0, :, :, 4] = -np.inf
    key[0, 4] = np.nan
    visible[0, :, 4] = True

    @jax.jit
    def attend(query, key, value, visible, bias):
        at = lambda query, key, head: (query.batch, head, query.position, key.position)  # noqa: E731
        mod = ScoreFunction(lambda score, query, key, head: score + bias[at(query, key, head)])
        return _call(query, key, value, visible, score_mod=mod, scale=0.3)[0]

    output = attend(*map(jnp.asarray, (query, key, value, visible, bias)))
    expected = oracle.attention(query, np.nan_to_num(key), value, visible=visible[:, None], bias=bias, scale=0.3).output
    np.testing.assert_allclose(output, expected, atol=1e-6)
    seen = attend(*map(jnp.asarray, (query, key, value, visible, np.where(np.isinf(bias), np.float32(0), bias))))
    assert np.isnan(seen[0]).all()

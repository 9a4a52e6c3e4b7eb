"""Attention's weights, and attention over scores of any origin, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend_scores, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.masks import NotPadding
from tests import oracle
from tests.contract import SHAPES, Shape, arrays, close, cotangents, kept, random_pairs

SHAPE = SHAPES["grouped"]
B, T, S, N, K, H, V = *SHAPE.batch, SHAPE.T, SHAPE.S, SHAPE.N, SHAPE.K, SHAPE.H, SHAPE.V


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_weights_are_the_oracles(dtype):
    inputs, pairs = arrays(SHAPE, dtype), random_pairs(SHAPE)
    bias = np.random.default_rng(7).normal(size=(T, S)).astype(np.float32)
    options = {"mask": pairs, "bias": bias, "scale": np.float32(0.3)}
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], **options)
    assert weights.dtype == jnp.float32
    close(weights, oracle.attention(**inputs, visible=pairs, bias=bias, scale=np.float32(0.3)).weights)
    np.testing.assert_allclose(weights.sum(axis=-1), pairs.any(axis=-1), rtol=1e-5)


def test_attention_weights_of_masked_keys_are_zero_whatever_they_hold():
    at = Coordinates.from_present(jnp.arange(S + 2) < S)
    inputs = arrays(Shape(batch=(), T=S + 2, S=S + 2))
    inputs["key"][S:] = np.nan
    located = {"mask": NotPadding(), "q_at": at, "kv_at": at}
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], **located)
    np.testing.assert_allclose(weights.sum(axis=-1)[:, :S], 1, rtol=1e-5)
    assert not weights[..., S:].any()
    assert not weights[:, S:].any()


def _scores_case(shape):
    scores = np.random.default_rng(8).normal(size=shape.pairs).astype(np.float32)
    zeros = {name: np.zeros_like(x) for name, x in arrays(shape).items() if name != "value"}
    return scores, arrays(shape)["value"], zeros


@pytest.mark.parametrize("name", ["grouped", "one_kv_head_and_two_batch_dims", "as_many_kv_heads_and_no_batch"])
def test_attend_scores_is_attention_with_these_logits(name):
    shape = SHAPES[name]
    (scores, value, zeros), pairs, (d_output, _) = _scores_case(shape), random_pairs(shape), cotangents(shape)
    scores = np.where(pairs, scores, np.float32(np.nan))

    @jax.jit
    def call(scores, value, pairs):
        output, pull_back, weights = jax.vjp(lambda *x: attend_scores(*x, mask=pairs), scores, value, has_aux=True)
        return output, weights, pull_back(d_output)

    output, weights, (d_scores, d_value) = call(scores, value, pairs)
    hidden = np.where(pairs, scores, 0)
    expected = oracle.attention(**zeros, value=value, bias=hidden, visible=pairs)
    gradients = oracle.attention_gradients(
        **zeros, value=value, bias=hidden, visible=pairs, d_output=d_output, d_lse=np.zeros(d_output.shape[:-1])
    )
    close(output, expected.output)
    close(weights, expected.weights)
    close(d_scores, gradients["bias"])
    close(d_value, gradients["value"])


def test_attend_scores_drops_weights_and_hides_masked_values():
    scores, value, zeros = _scores_case(SHAPE)
    at = Coordinates.from_lengths([S, 4], S)
    located = {"mask": NotPadding(), "q_at": Coordinates.range(T), "kv_at": at}
    pairs = np.asarray(at.segment)[:, None, None] != 0
    spoilt = value.copy()
    spoilt[1, 4:] = np.nan
    dropout = Dropout(0.4, jax.random.key(0))

    @jax.jit
    def call(scores, value, dropout):
        return attend_scores(scores, value, dropout=dropout, **located)

    output, weights = call(scores, spoilt, dropout)
    expected = oracle.attention(**zeros, value=value, bias=scores, visible=pairs, kept=kept(dropout, SHAPE))
    close(output, expected.output)
    close(weights, expected.weights, what="weights are those before dropout")


@pytest.mark.parametrize(
    ("scores", "value", "error", "message"),
    [
        (
            (B, N, T, S),
            (B, S + 1, K, V),
            ValueError,
            r"scores \(2, 6, 7, 11\) must be \[\*batch, N, T, S\], and",
        ),
        ((N, T, S), (B, S, K, V), ValueError, "must be"),
        ((3, N, T, S), (B, S, K, V), ValueError, "must be"),
        ((B, 5, T, S), (B, S, K, V), ValueError, r"num_heads \(5\) must be a multiple of num_kv_heads \(3\)"),
    ],
    ids=str,
)
def test_scores_that_do_not_fit_are_refused(scores, value, error, message):
    with pytest.raises(error, match=message):
        attend_scores(jnp.ones(scores), jnp.ones(value))


def test_integer_scores_are_refused():
    with pytest.raises(TypeError, match="scores must be floating, got int32"):
        attend_scores(jnp.ones((B, N, T, S), jnp.int32), jnp.ones((B, S, K, V)))

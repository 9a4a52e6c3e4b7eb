"""Attention sinks are one more key for each head, whose value is 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend, attention_weights
from tests import oracle
from tests.contract import (
    GROUPED,
    arrays,
    close,
    cotangents,
    every_implementation,
    forward,
    random_pairs,
    with_gradients,
)

SINKS = np.random.default_rng(3).normal(size=GROUPED.N).astype(np.float32)


def _with_one_more_key(inputs, pairs, sinks):
    """The oracle's arguments: a key of zeros, seen by all, with the sink as its bias and 0 as its value."""
    more = {name: np.concatenate([inputs[name], 0 * inputs[name][:, :1]], axis=1) for name in ("key", "value")}
    bias = np.zeros((*pairs.shape[:-1], pairs.shape[-1] + 1))
    bias[..., -1] = sinks[:, None]
    visible = np.concatenate([pairs, np.ones_like(pairs[..., :1])], axis=-1)
    return inputs | more | {"bias": bias, "visible": visible}


@every_implementation
def test_sinks_are_one_more_key_whose_value_is_0(implementation):
    """Also where a row sees nothing else, with all gradients."""
    inputs, directions, pairs = arrays(GROUPED), cotangents(GROUPED), random_pairs(GROUPED)
    (output, lse), gradients = with_gradients(implementation, inputs | {"sinks": SINKS}, directions, mask=pairs)
    call = _with_one_more_key(inputs, pairs, SINKS)
    expected = oracle.attention(**call)
    close(output, expected.output)
    close(lse, expected.lse)
    assert not output[:, 1].any()
    wanted = oracle.attention_gradients(**call, d_output=directions[0], d_lse=directions[1])
    close(gradients["query"], wanted["query"])
    close(gradients["key"], wanted["key"][:, :-1])
    close(gradients["value"], wanted["value"][:, :-1])
    close(gradients["sinks"], wanted["bias"][..., -1].sum(axis=(0, 2)))


def test_weights_beside_a_sink():
    inputs, pairs = arrays(GROUPED), random_pairs(GROUPED)
    weights = jax.jit(attention_weights)(inputs["query"], inputs["key"], mask=pairs, sinks=SINKS)
    close(weights, oracle.attention(**_with_one_more_key(inputs, pairs, SINKS)).weights[..., :-1])


def test_a_sink_of_minus_infinity_is_none_and_huge_ones_take_all():
    inputs, directions, pairs = arrays(GROUPED), cotangents(GROUPED), random_pairs(GROUPED)
    results, gradients = with_gradients("reference", inputs, directions, mask=pairs)
    for sink, times in ((-np.inf, 1), (-1e30, 1), (1e30, 0)):
        sinks = np.full(GROUPED.N, sink, np.float32)
        (output, lse), by = with_gradients("reference", inputs | {"sinks": sinks}, directions, mask=pairs)
        close(output, times * results[0])
        close(lse, np.maximum(results[1], sinks))
        assert all(np.isfinite(gradient).all() for gradient in by.values())
        close(by["value"], times * gradients["value"])
        close(by["query"], times * gradients["query"])


def test_a_row_that_sees_nan_stays_nan():
    inputs = arrays(GROUPED)
    inputs["query"][1, 3, 2] = np.nan
    output, lse = forward("reference", inputs, sinks=SINKS)
    where = np.zeros(lse.shape, bool)
    where[1, 3, 2] = True
    np.testing.assert_array_equal(np.isnan(lse), where)
    np.testing.assert_array_equal(np.isnan(output).all(axis=-1), where)


def test_half_precision_keeps_its_dtype():
    inputs = arrays(GROUPED, "bfloat16")
    output, lse = forward("reference", inputs, sinks=SINKS.astype(inputs["query"].dtype))
    assert output.dtype == inputs["query"].dtype
    assert lse.dtype == np.float32


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (jnp.ones(5), ValueError, r"sinks \(5,\) must be \[N\], one logit for each head \(6,\)"),
        (jnp.ones((6, 1)), ValueError, "sinks"),
        (jnp.ones(6, jnp.int32), TypeError, "sinks must be floating, got int32"),
    ],
    ids=str,
)
def test_sinks_that_do_not_fit_are_refused(sinks, error, message):
    inputs = {name: jnp.asarray(x) for name, x in arrays(GROUPED).items()}
    for function in (functools.partial(attend, value=inputs.pop("value")), attention_weights):
        with pytest.raises(error, match=message):
            function(**inputs, sinks=sinks)

"""What the reference alone promises: its softmax by itself, derivatives of any kind, which weights are dropped."""

import jax
import jax.numpy as jnp
import numpy as np

from seqattn.attention import attend
from seqattn.dropout import Dropout
from seqattn.kernels import reference
from tests import oracle
from tests.contract import SQUARE, arrays, close, forward, kept, random_pairs

LOWEST = np.finfo(np.float32).min

ROWS = np.array(
    [
        [0.0, 1.0, 2.0],
        [1e30, 1e30, -1e30],
        [-np.inf, 5.0, -np.inf],
        [-1e30, -1e30, -1e30],
        [-np.inf, -np.inf, -np.inf],
        [1.0, np.nan, 2.0],
    ],
    np.float32,
)


def test_softmax_of_rows_that_are_hard():
    weights, lse = jax.jit(lambda rows: reference.softmax(rows, rows != -np.inf))(ROWS)
    e = np.exp([-2.0, -1.0, 0.0])
    expected = [e / e.sum(), [0.5, 0.5, 0], [0, 1, 0], [1 / 3] * 3, [0, 0, 0], [np.nan] * 3]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(lse, [2 + np.log(e.sum()), 1e30, 5, -1e30, LOWEST, np.nan], rtol=1e-6)


def test_softmax_of_no_keys():
    weights, lse = reference.softmax(jnp.zeros((2, 0)), None)
    assert weights.shape == (2, 0)
    np.testing.assert_array_equal(lse, [LOWEST] * 2)


def test_directional_and_second_derivatives():
    """Forward mode against the oracle's gradients, and a Hessian product against their difference; empty rows too."""
    inputs, towards, pairs = arrays(SQUARE), arrays(SQUARE, seed=9), random_pairs(SQUARE)
    ones = np.ones((2, 7, 4, 5), np.float32)

    def loss(inputs):
        return attend(**inputs, mask=pairs_array, implementation="reference").sum()

    pairs_array = jnp.asarray(pairs)
    value, slope = jax.jit(lambda *x: jax.jvp(loss, *x))((inputs,), (towards,))
    curved = jax.jit(lambda *x: jax.jvp(jax.grad(loss), *x)[1])((inputs,), (towards,))

    def gradients(step):
        moved = {name: x.astype(np.float64) + step * towards[name] for name, x in inputs.items()}
        return oracle.attention_gradients(**moved, d_output=ones, d_lse=0 * ones[..., 0], visible=pairs)

    np.testing.assert_allclose(value, oracle.attention(**inputs, visible=pairs).output.sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, sum(np.sum(gradients(0)[name] * towards[name]) for name in inputs), rtol=1e-5)
    before, after = gradients(-1e-4), gradients(1e-4)
    for name in inputs:
        difference = (after[name] - before[name]) / 2e-4
        np.testing.assert_allclose(curved[name], difference, atol=1e-4, err_msg=name)


def test_dropout_drops_what_its_key_drops_of_the_weights():
    dropout, inputs = Dropout(0.4, jax.random.key(2)), arrays(SQUARE)
    output, lse = forward("reference", inputs, dropout=dropout)
    expected = oracle.attention(**inputs, kept=kept(dropout, SQUARE))
    close(output, expected.output)
    close(lse, expected.lse, what="the log-sum-exp is that before dropout")

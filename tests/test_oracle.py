"""The oracle against first principles: its gradients by central differences, its softmax by hand."""

import numpy as np
import pytest

from tests import oracle

STEP = 1e-5


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def _central_difference(function, x):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[index] = STEP
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * STEP)
    return gradient


def test_two_keys_by_hand():
    query, key = np.array([[[2.0]]]), np.array([[[np.log(3)]], [[0.0]]])
    value = np.array([[[4.0, 0.0]], [[0.0, 8.0]]])
    result = oracle.attention(query, key, value, scale=0.5)
    np.testing.assert_allclose(result.output, [[[3.0, 2.0]]])
    np.testing.assert_allclose(result.weights, [[[0.75, 0.25]]])
    np.testing.assert_allclose(result.lse, [[np.log(4)]])


@pytest.mark.parametrize("cap", [{}, {"cap": np.array(1.3)}], ids=["plain", "capped"])
def test_gradients_of_attention_are_central_differences(cap):
    inputs = {"query": _random(2, 3, 4, 2), "key": _random(2, 5, 2, 2, seed=1), "value": _random(2, 5, 2, 3, seed=2)}
    inputs |= {"bias": _random(2, 1, 3, 1, seed=3), "scale": np.array(0.7)} | cap
    visible = _random(2, 4, 3, 5, seed=4) > -0.5
    visible[1, 2, 0] = False
    options = {"visible": visible, "kept": np.abs(_random(2, 4, 3, 5, seed=5))}
    d_output, d_lse = _random(2, 3, 4, 3, seed=6), _random(2, 3, 4, seed=7)

    def loss(name, x):
        result = oracle.attention(**{**inputs, name: x}, **options)
        return np.sum(d_output * result.output) + np.sum(np.where(np.isfinite(result.lse), d_lse * result.lse, 0))

    gradients = oracle.attention_gradients(**inputs, d_output=d_output, d_lse=d_lse, **options)
    assert gradients.keys() == inputs.keys()
    for name, x in inputs.items():
        expected = _central_difference(lambda moved, name=name: loss(name, moved), x)
        np.testing.assert_allclose(gradients[name], expected, atol=1e-8, err_msg=name)


def test_gradient_of_cross_entropy_is_its_central_difference():
    logits, labels, weights = _random(3, 5), np.array([4, 0, -100]), np.array([0.5, 2.0, 3.0])

    def loss(x):
        return oracle.cross_entropy(x, labels, weights=weights, label_smoothing=0.1)[0]

    gradient = oracle.cross_entropy(logits, labels, weights=weights, label_smoothing=0.1)[2]
    np.testing.assert_allclose(gradient, _central_difference(loss, logits), atol=1e-8)

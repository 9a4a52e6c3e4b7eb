"""The position-wise network against NumPy float64 with its own weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn import Activation, FeedForward
from tests.parameters import drawn

D, F = 5, 7
X = np.random.default_rng(0).normal(size=(3, 2, D)).astype(np.float32)


def _network(**options) -> FeedForward:
    return drawn(lambda: FeedForward(D, F, **options, rngs=nnx.Rngs(0)))


_call = jax.jit(lambda network, x, key=None: network(x, dropout_key=key))


def _gelu(x):
    """Hendrycks 2016, section 2: the approximation by tanh."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


IN_NUMPY = {
    Activation.RELU: lambda x: np.maximum(x, 0),
    Activation.GELU: _gelu,
    Activation.EXACT_GELU: lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    Activation.SILU: lambda x: x / (1 + np.exp(-x)),
    Activation.TANH: np.tanh,
}


def _linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(param[...]).astype(np.float64) for param in (layer.kernel, layer.bias))
    return x.astype(np.float64) @ kernel + bias


def _expected(network: FeedForward, x: np.ndarray) -> np.ndarray:
    hidden, activation = _linear(network.hidden, x), IN_NUMPY[network.activation]
    hidden = activation(hidden) if network.gate is None else activation(_linear(network.gate, x)) * hidden
    return _linear(network.output, hidden)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", Activation)
def test_values_are_those_of_numpy(activation, gated):
    network = _network(activation=activation, gated=gated)
    np.testing.assert_allclose(_call(network, jnp.asarray(X)), _expected(network, X), atol=1e-5)


def test_eager_is_jitted_for_any_leading_dims():
    network = _network(gated=True)
    expected = _call(network, jnp.asarray(X))
    np.testing.assert_allclose(network(jnp.asarray(X)), expected, atol=1e-6)
    np.testing.assert_allclose(network(jnp.asarray(X[1, 0])), expected[1, 0], atol=1e-6)


def test_in_float64_to_the_last_digits():
    with jax.enable_x64(True):
        network = _network(activation=Activation.GELU, gated=True, param_dtype=jnp.float64)
        output = _call(network, jnp.asarray(X, jnp.float64))
    np.testing.assert_allclose(output, _expected(network, X), rtol=1e-12)


def test_in_bfloat16():
    network, x = _network(param_dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    output = _call(network, x)
    assert output.dtype == jnp.bfloat16
    expected = _expected(network, np.asarray(x))
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())


def test_dropout_of_the_hidden_layer_is_decided_by_the_key():
    network, x = _network(dropout_rate=0.5), jnp.asarray(X)
    keys = jax.random.split(jax.random.key(0))
    first, again, other = (np.asarray(_call(network, x, key)) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    np.testing.assert_allclose(_call(network, x), _expected(network, X), atol=1e-5)


def test_the_hidden_layer_and_not_the_output_is_dropped():
    network, x = _network(dropout_rate=0.9), jnp.asarray(X)
    dropped = np.asarray(_call(network, x, jax.random.key(1)))
    bias = np.asarray(network.output.bias[...])
    assert np.any(np.all(dropped == bias, axis=-1))  # a token whose whole hidden layer fell
    assert not np.any(dropped == 0)


def test_parameters():
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(_network(gated=True), nnx.Param)))
    both = {"kernel": (D, F), "bias": (F,)}
    assert shapes == {"hidden": both, "gate": both, "output": {"kernel": (F, D), "bias": (D,)}}
    assert len(jax.tree.leaves(_network())) == 4


@pytest.mark.parametrize("rate", [1.5, -0.1, float("nan"), 1.0])
def test_a27_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=rf"dropout rate \({rate}\) must be in \[0, 1\)"):
        _network(dropout_rate=rate)

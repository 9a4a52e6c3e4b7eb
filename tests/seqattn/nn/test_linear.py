"""Linear layers: those of Flax, with their derivatives, and what a CPU does not transpose for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn import linear
from seqattn.nn.linear import Linear

D, F = 5, 7


@pytest.fixture(autouse=True, params=[1, 8])
def devices(request, monkeypatch):
    """As on a lone CPU, and as on one of several devices; what was compiled for the other is forgotten."""
    monkeypatch.setattr(linear.jax, "device_count", lambda: request.param)
    jax.clear_caches()
    return request.param


SHAPES = [(), (3,), (2, 3), (2, 3, 11), (0, 3)]


def _pair(shape, **options):
    """Ours and Flax's with the same parameters, and two inputs."""
    ours, flaxs = (kind(D, F, rngs=nnx.Rngs(3), **options) for kind in (Linear, nnx.Linear))
    random = np.random.default_rng(len(shape))
    for layer in (ours, flaxs):
        if layer.bias is not None:
            layer.bias[...] = jnp.arange(F) / 8
    x, slope = (jnp.asarray(random.normal(size=(*shape, D)), jnp.float32) for _ in range(2))
    return ours, flaxs, x, slope


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_values_and_derivatives_are_those_of_flax(shape, use_bias):
    ours, flaxs, x, slope = _pair(shape, use_bias=use_bias)
    wide = np.asarray(x, np.float64) @ np.asarray(ours.kernel[...], np.float64) + (np.arange(F) / 8 if use_bias else 0)
    np.testing.assert_allclose(jax.jit(lambda layer, x: layer(x))(ours, x), wide, rtol=1e-5, atol=1e-6)

    def loss(layer, x):
        return (jnp.tanh(layer(x)) ** 2).sum()

    def derivatives(layer, x, slope):
        gradient = jax.grad(loss, argnums=(0, 1))
        # Forward over reverse, by the input and by the parameters.
        return gradient(layer, x), jax.jvp(gradient, (layer, x), (jax.tree.map(jnp.sin, layer), slope))

    found, expected = (jax.jit(derivatives)(layer, x, slope) for layer in (ours, flaxs))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_layer_is_mapped_over():
    ours, _, x, _ = _pair((2, 3))
    several = jnp.stack([x, 2 * x, -x])
    gradient = jax.grad(lambda layer, x: (layer(x) ** 2).sum())
    mapped = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(ours, several)
    for index, each in enumerate(several):
        jax.tree.map(
            lambda all_, one, index=index: np.testing.assert_allclose(all_[index], one, rtol=1e-5, atol=1e-5),
            mapped,
            gradient(ours, each),
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_promoted_as_by_flax(dtype):
    _, _, x, _ = _pair((2, 3))
    low, mixed = (
        kind(D, F, dtype=dtype, param_dtype=param, rngs=nnx.Rngs(0))
        for kind, param in ((Linear, dtype), (Linear, jnp.float32))
    )
    assert low(x.astype(dtype)).dtype == mixed(x).dtype == dtype
    with jax.enable_x64(True):
        exact = Linear(D, F, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(2, 3, D))
        np.testing.assert_allclose(exact(jnp.asarray(x)), x @ np.asarray(exact.kernel[...]), rtol=1e-14)


def test_a_lone_cpu_transposes_no_gradient_for_that_of_the_kernel(devices):
    layer, x = Linear(64, 1021, rngs=nnx.Rngs(0)), jnp.ones((13, 41, 64))
    step = jax.jit(jax.value_and_grad(lambda layer, x: jnp.exp(layer(x)).sum(), (0, 1)))
    assert ("[1021,533]" in step.lower(layer, x).compile().as_text()) == (devices > 1)


def test_what_a_user_asks_flax_for_is_kept():
    x = jnp.ones((2, 3, D), jnp.bfloat16)
    wide = Linear(D, F, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, use_bias=False, rngs=nnx.Rngs(0))
    assert wide(x).dtype == jnp.float32
    exact = Linear(D, F, precision="highest", rngs=nnx.Rngs(0))
    assert "HIGHEST" in str(jax.make_jaxpr(exact)(jnp.ones((2, 3, D))))

    def zeros(x, kernel, dims, **_):
        return jnp.zeros((*x.shape[:-1], kernel.shape[1]), x.dtype)

    assert not Linear(D, F, dot_general=zeros, rngs=nnx.Rngs(0))(jnp.ones((2, 3, D))).any()


def test_dims_that_are_split_by_name_stay_as_they_are():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = Linear(D, F, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((3, 4, D)), jax.sharding.PartitionSpec(None, "model"))
        assert tuple(jax.typeof(jax.jit(lambda x: layer(x))(x)).sharding.spec)[:2] == (None, "model")

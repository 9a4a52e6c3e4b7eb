"""Experts split over the devices of a mesh axis, by the compiler: as on one device, and their weights stay split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqattn.nn.mixture import MixtureOfExperts, routings
from seqattn.nn.routing import MixtureConfig
from tests.parameters import drawn

B, T, D, F, E = 4, 11, 5, 13, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
REAL = jnp.arange(T)[None] < jnp.asarray([11, 7, 0, 5])[:, None]


def _loss(params, x, real, graph):
    layer = nnx.merge(graph, params)
    output, (routing,) = routings(lambda layer: layer(x, real=real, dropout_key=jax.random.key(0)), layer)
    return (output**2).sum() + routing.loss, (output, routing)


_update = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=3)


def _shardings(mesh, params):
    """The experts' parameters split over their first dim, the gate's everywhere."""
    return jax.tree.map_with_path(
        lambda path, _: NamedSharding(mesh, PartitionSpec("expert") if "experts" in str(path[0]) else PartitionSpec()),
        params,
    )


def test_split_experts_are_whole_experts():
    config = MixtureConfig(E, 2, capacity_factor=0.75)
    layer = drawn(lambda: MixtureOfExperts(D, F, config=config, gated=True, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer, nnx.Param)
    expected = _update(params, X, REAL, graph)
    assert expected[0][1][1].dropped > 0

    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    split = jax.device_put(params, _shardings(mesh, params))
    x, real = jax.device_put((X, REAL), NamedSharding(mesh, PartitionSpec("data")))
    compiled = _update.lower(split, x, real, graph).compile()
    result = compiled(split, x, real)
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)

    for kernel in (result[1]["experts"][name]["kernel"][...] for name in ("hidden", "gate", "output")):
        assert kernel.sharding.spec[0] == "expert", kernel.sharding
        assert kernel.addressable_shards[0].data.shape == (E // 4, *kernel.shape[1:])
    assert not _gathered(compiled) & {(E, D, F), (E, F, D)}


def test_a_gathering_of_weights_would_be_seen():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    kernel = jax.device_put(jnp.ones((E, D, F)), NamedSharding(mesh, PartitionSpec("expert")))
    whole = jax.jit(lambda kernel: kernel + 1, out_shardings=NamedSharding(mesh, PartitionSpec()))
    assert _gathered(whole.lower(kernel).compile()) == {(E, D, F)}


def _gathered(compiled):
    """The shapes that a compiled program collects from several devices."""
    lines = re.findall(r"= (.*) all-(?:gather|to-all)(?:-start)?\(", compiled.as_text())
    return {tuple(map(int, dims.split(","))) for line in lines for dims in re.findall(r"\[([\d,]+)\]", line)}

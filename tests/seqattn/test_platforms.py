"""A choice between programs by the platform that they are compiled for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.platforms import all_platforms, by_platform, on_gpu, on_tpu, platform_of

BRANCHES = {"cpu": jnp.sin, "gpu": jnp.cos, "tpu": jnp.tan}


def test_the_platform_is_that_of_the_arrays_or_jax_s_default_and_unknown_where_one_is_traced():
    x = jnp.ones(3)
    with jax.transfer_guard("disallow"):
        assert platform_of([x, None, 2.0]) == "cpu"
    assert platform_of([]) == jax.default_backend()
    seen = []
    jax.jit(lambda y: seen.append(platform_of([x, y])))(x)
    jax.jit(lambda y: seen.append(platform_of([x])))(x)  # closed over: the program may run anywhere all the same
    assert seen == [None, None]
    assert all_platforms() == ("cpu", "gpu", "tpu")


def test_a_program_holds_the_branch_of_its_platform_alone():
    traced = jax.jit(jax.grad(lambda x: by_platform(BRANCHES, x).sum())).trace(jnp.ones(3))
    texts = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "rocm", "tpu")]
    assert ["stablehlo.cosine" in x for x in texts] == [True, False, False, False], "the derivative of the sine"
    assert ["stablehlo.sine" in x for x in texts] == [False, True, True, False]


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, lambda fn: jax.jit(jax.checkpoint(fn))])
def test_it_runs_here_under_every_transformation(transform):
    x = jnp.float32(0.3) if transform is jax.grad else jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(transform(lambda x: by_platform(BRANCHES, x))(x), transform(jnp.sin)(x), rtol=1e-6)


def test_equal_branches_are_traced_once():
    traced = []

    def branch(x):
        traced.append(x)
        return x + 1

    jax.jit(lambda x: by_platform(dict.fromkeys(all_platforms(), branch), x)).trace(jnp.ones(3))
    assert len(traced) == 1


def test_one_branch_alone_does_not_stand_for_the_platforms_that_have_none():
    traced = jax.jit(lambda x: by_platform({"tpu": jnp.tan}, x)).trace(jnp.ones(3))
    assert "tan" in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(NotImplementedError, match="platform"):
        traced.lower(lowering_platforms=("cpu",))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
@pytest.mark.parametrize("results", [None, jax.ShapeDtypeStruct((4,), jnp.float32)], ids=["traced", "typed"])
@pytest.mark.parametrize(("on", "name"), [(on_tpu, "tpu"), (on_gpu, "cuda")])
def test_a_program_that_is_split_over_devices_computes_the_other_function(on, name, results):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.jit(jax.vmap(lambda x: on(jnp.sin, x, results=results, if_split=jnp.cos)))

    def lowered(x):
        return run.trace(x).lower(lowering_platforms=(name,)).as_text()

    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert ["stablehlo.sine" in lowered(x), "stablehlo.cosine" in lowered(x)] == [True, False]
    split = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(None, "data")))
    assert ["stablehlo.sine" in lowered(split), "stablehlo.cosine" in lowered(split)] == [False, True]
    whole = jnp.linspace(0, 1, 4)
    parts = jax.device_put(whole, NamedSharding(mesh, P("data")))
    for x, fn in ((whole, jnp.sin), (parts, jnp.cos)):
        np.testing.assert_allclose(on(jnp.sin, x, results=results, if_split=jnp.cos), fn(x), rtol=1e-6)


@pytest.mark.parametrize(("on", "kind", "name"), [(on_tpu, "TPUs", "tpu"), (on_gpu, "NVIDIA GPUs", "cuda")])
def test_a_kernel_for_one_platform_is_never_compiled_for_another_alone(on, kind, name):
    traced = jax.jit(lambda x: on(jnp.sin, x)).trace(jnp.ones(3))
    assert "stablehlo.sine" in traced.lower(lowering_platforms=(name,)).as_text()
    assert "stablehlo.sine" in traced.lower(lowering_platforms=("cpu", name)).as_text()
    with pytest.raises(NotImplementedError, match=f"for {kind} cannot be compiled for cpu"):
        traced.lower(lowering_platforms=("cpu",))

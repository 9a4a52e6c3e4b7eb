"""Arrays on devices, copied once from any view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.interop.huggingface import placed as module
from seqattn.interop.huggingface.placed import placed

RNG = np.random.default_rng(0)
VIEWS = {
    "a matrix": RNG.normal(size=(7, 131)),
    "transposed, in several tiles": RNG.normal(size=(131, 263)).T,
    "transposed, in parts of tiles": RNG.normal(size=(5, 3)).T,
    "a part of a transposed matrix": RNG.normal(size=(149, 277)).T[3:270, 2:140],
    "backwards": RNG.normal(size=(5, 7))[::-1],
    "three axes": RNG.normal(size=(2, 5, 3)).transpose(2, 0, 1),
    "a vector": RNG.normal(size=11)[::2],
    "a number": np.array(2.5),
    "nothing": np.zeros((0, 3)).T,
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [np.float32, np.float16])
@pytest.mark.parametrize("name", VIEWS)
def test_values_are_those_of_the_view_in_the_dtype_that_is_asked_for(name, given, dtype):
    view = VIEWS[name].astype(given, order="K")
    found = placed(view, dtype, None)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), view.astype(dtype))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_array_shares_no_memory_with_the_view(transposed):
    # At an address that JAX would use as it is.
    memory = np.zeros(64 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    view = memory[start : start + 64].reshape(8, 8)
    found = placed(view.T if transposed else view, jnp.float32, None)
    view[:] = 1
    np.testing.assert_array_equal(found, np.zeros((8, 8)))


def test_the_copy_is_at_an_address_that_jax_does_not_copy_again():
    for rows in range(1, 17):
        copy = module._copy(np.ones((rows, 3), np.float32), np.dtype(np.float32))
        assert jax.device_put(copy, jax.devices("cpu")[0]).unsafe_buffer_pointer() == copy.ctypes.data


@pytest.mark.parametrize(
    ("spec", "parts"),
    [(P("rows", "columns"), 6), (P("rows"), 2), (P(None, "columns"), 3), (P(("rows", "columns")), 6), (P(), 1)],
)
def test_each_device_has_its_part_which_is_copied_once_for_all_devices(spec, parts, monkeypatch):
    copied = []
    copy = module._copy
    monkeypatch.setattr(module, "_copy", lambda part, dtype: copied.append(part.size) or copy(part, dtype))
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("rows", "columns"))
    view = RNG.normal(size=(9, 12)).astype(np.float32).T
    found = placed(view, jnp.float32, NamedSharding(mesh, spec))
    np.testing.assert_array_equal(np.asarray(found), view)
    assert copied == [view.size // parts] * parts
    assert len(found.addressable_shards) == 6
    for shard in found.addressable_shards:
        assert shard.data.size == view.size // parts
        np.testing.assert_array_equal(np.asarray(shard.data), view[shard.index])

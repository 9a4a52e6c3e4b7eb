"""The dtype of sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.precision import accumulator, widened


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_small_dtypes_accumulate_in_float32(dtype):
    assert accumulator(dtype) == np.float32


@pytest.mark.parametrize("dtype", [np.dtype(np.float64), float])
def test_float64_stays(dtype):
    assert accumulator(dtype) == np.float64


def test_a_tree_is_widened_where_it_is_small():
    tree = {"half": jnp.ones(3, jnp.float16), "nothing": None, "count": jnp.arange(2), "exact": jnp.full(5, 0.1)}
    wide = widened(tree)
    assert jax.tree.structure(wide) == jax.tree.structure(tree)
    assert wide["half"].dtype == np.float32
    assert wide["count"] is tree["count"]
    assert wide["exact"] is tree["exact"]

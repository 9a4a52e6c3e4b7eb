"""The dtype of sums."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.precision import accumulator


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_small_dtypes_accumulate_in_float32(dtype):
    assert accumulator(dtype) == np.float32


@pytest.mark.parametrize("dtype", [np.dtype(np.float64), float])
def test_float64_stays(dtype):
    assert accumulator(dtype) == np.float64

"""Masks on a device that has a share of the rows of a call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from seqattn import Causal, Coordinates, Prefix, SameSegment, Split, attend


@pytest.mark.parametrize(
    "split", [Split("data"), Split(("data", "tensor", "sequence")), Split("data", None, "sequence")]
)
def test_a_device_asks_a_mask_about_its_own_rows(split):
    """Its prefixes are those of all rows, and which tiles they reach differs by row."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(4)
    three = [jnp.asarray(rng.standard_normal((8, 2**6, 2, 5)), jnp.float32) for _ in range(3)]
    at = Coordinates.from_segments(jnp.asarray(np.sort(rng.integers(1, 4, (8, 2**6)), axis=-1)))
    mask = Causal() & SameSegment() | Prefix(jnp.array([0, 63, 17, 5, 40, 0, 64, 29]))
    wanted = attend(*three, mask=mask, q_at=at, kv_at=at, implementation="reference")
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(attend, implementation="chunked", split=split))
        found = run(*three, mask=mask, q_at=at, kv_at=at)
    np.testing.assert_allclose(found, wanted, atol=2e-5)

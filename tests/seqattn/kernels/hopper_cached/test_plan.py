"""How a call is cut."""

import jax
import jax.numpy as jnp
import pytest

from seqattn.kernels.call import Call, Columns
from seqattn.kernels.hopper_cached.plan import TILINGS, Plan


def _plan(rows, size, dim=128, length=1):
    shapes = (rows, length, 8, dim), (rows, 2, dim, size), (rows, 2, size, dim)
    query, key, value = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return Plan.of(Call(query, None, None, *[None] * 8, columns=Columns(key, value, None)))


@pytest.mark.parametrize(
    ("rows", "size", "parts"),
    [(1, 4096, 64), (32, 4096, 5), (132, 4096, 1), (500, 4096, 1), (1, 64, 1)],
    ids=["one row", "some rows", "two for each core", "many rows", "one tile"],
)
def test_few_rows_are_shared_out_among_blocks(rows, size, parts):
    """Each row has two key heads."""
    assert _plan(rows, size).parts == parts


@pytest.mark.parametrize(("length", "padded"), [(1, 8), (2, 8), (3, 16), (16, 64)])
def test_rows_are_padded_to_what_is_copied(length, padded):
    assert _plan(1, 128, length=length).rows == padded


@pytest.mark.parametrize("dim", TILINGS)
def test_buffers_fit_into_shared_memory(dim):
    tiling = TILINGS[dim]
    ring = 2 * tiling.ring * tiling.slots * dim * 2
    assert tiling.queries * dim * (2 + 4) + ring <= 232_448 - 1024

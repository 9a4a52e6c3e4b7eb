"""Bytes that Pallas copies for kernels with known index maps, beside a count step by step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.compile.pipelines import moved_by_kernels
from seqattn import Causal, Coordinates, attend
from seqattn.attention import attend_columns
from seqattn.kernels.call import Columns
from seqattn.masks import SameSegment


def product(x, y, tile=16):
    """A product whose kernel keeps a block of its left side while it walks over the right one."""

    def kernel(x, y, z):
        z[...] = x[...] @ y[...]

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        grid=(x.shape[0] // tile, y.shape[1] // tile),
        in_specs=[
            pl.BlockSpec((tile, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((y.shape[0], tile), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((tile, tile), lambda i, j: (i, j)),
    )(x, y)


def test_a_block_that_stays_is_copied_once():
    x, y = jnp.ones((48, 32)), jnp.ones((32, 80))
    block = 16 * 32 * 4
    # The left side once, the right side for each of 3 rows of tiles, and each tile of the result once.
    assert moved_by_kernels(jax.jit(product), x, y) == 3 * block + 3 * 5 * block + 15 * 16 * 16 * 4


def gathered(x, order):
    """Copies rows in the order of a list that the kernel's index map reads."""

    def kernel(order, x, y):
        y[...] = x[...]

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(order.shape[0],),
        in_specs=[pl.BlockSpec((8, 128), lambda i, order: (order[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, order: (0, 0)),
    )
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype), grid_spec=spec)(order, x)


def test_lists_that_are_computed_before_the_kernel_tell_the_blocks():
    x, order = jnp.ones((40, 128)), np.array([0, 0, 3, 3, 3, 1, 0], np.int32)
    block = 8 * 128 * 4
    runs = len(list(itertools.groupby(order.tolist())))
    expected = order.nbytes + runs * block + block
    assert moved_by_kernels(lambda x, order: gathered(x, jnp.sort(order)[::-1] * 0 + order), x, order) == expected
    # Sorted, equal blocks follow each other, so fewer are copied.
    assert moved_by_kernels(lambda x, order: gathered(x, jnp.sort(order)), x, order) == expected - (runs - 3) * block


def test_lists_that_are_not_known_are_refused():
    shapes = jax.ShapeDtypeStruct((40, 128), jnp.float32), jax.ShapeDtypeStruct((7,), jnp.int32)
    with pytest.raises(NotImplementedError, match="not known before it runs"):
        moved_by_kernels(gathered, *shapes)


def test_a_kernel_in_a_loop_is_refused_and_not_left_out():
    x, y = jnp.ones((48, 48)), jnp.ones((48, 80))

    def looped(x, y):
        return jax.lax.scan(lambda z, _: (product(z, x), None), x, length=5)[0]

    with pytest.raises(NotImplementedError, match="inside of scan is not counted"):
        moved_by_kernels(looped, jax.ShapeDtypeStruct(x.shape, x.dtype), y)


def test_a_kernel_that_copies_by_itself_is_refused():
    def kernel(x, y):
        y[...] = jnp.zeros_like(y)

    def call(x):
        space = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype), in_specs=[space])(x)

    with pytest.raises(NotImplementedError, match="copies an operand"):
        moved_by_kernels(call, jax.ShapeDtypeStruct((40, 128), jnp.float32))


def test_a_kernel_without_a_grid_copies_its_arrays():
    def kernel(x, y):
        y[...] = x[...] + 1

    def call(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert moved_by_kernels(call, jax.ShapeDtypeStruct((8, 128), jnp.float32)) == 2 * 4096


def test_attention_moves_the_tiles_that_it_visits():
    length, tiles, heads, dim = 2048, 4, 2, 128
    x = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.bfloat16)
    bounds = jnp.repeat(jnp.arange(1, tiles + 1), length // tiles)[None]
    at = Coordinates.from_segments(bounds)

    def attention(mask, query, key, value, position, segment):
        places = Coordinates(position, segment)
        return attend(query, key, value, mask=mask, q_at=places, kv_at=places, implementation=("tpu", "chunked"))

    def tile_bytes(mask):
        found = moved_by_kernels(functools.partial(attention, mask), x, x, x, at.position, at.segment)
        # A tile of keys and one of values, of all heads.
        return found, heads * 2 * (length // tiles) * dim * 2

    every, tile = tile_bytes(Causal())
    documents, _ = tile_bytes(Causal() & SameSegment())
    # Positions begin anew in each document, so a causal mask alone hides no tile. A document is one tile of keys.
    assert (every - documents) / tile == pytest.approx(tiles**2 - tiles, rel=0.05)


def test_a_step_of_decoding_moves_the_tiles_of_a_cache_that_are_filled():
    rows, heads, dim, room, tile = 3, 2, 64, 4096, 512
    query = jax.ShapeDtypeStruct((rows, 1, heads, dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((rows, heads, dim, room), jnp.bfloat16)
    value = jax.ShapeDtypeStruct((rows, heads, room, dim), jnp.bfloat16)
    finite = jax.ShapeDtypeStruct((rows, room), bool)

    def step(query, key, value, finite, position):
        # As a cache writes: what is known of its coordinates stays known beside its keys.
        key, position = jax.lax.optimization_barrier((key, position))
        at = [
            Coordinates(x, jnp.ones_like(x))
            for x in (position[:, -1:], jnp.broadcast_to(jnp.arange(room), finite.shape))
        ]
        return attend_columns(query, Columns(key, value, finite), mask=Causal(), q_at=at[0], kv_at=at[1])

    def moved(*lengths):
        return moved_by_kernels(step, query, key, value, finite, np.array(lengths, np.int32)[:, None] - 1)

    # Keys, values and the marks of all heads.
    of_tile = tile * (2 * heads * dim * 2 + 1)
    assert moved(4096, 100, 513) - moved(100, 1, 512) == (7 + 0 + 1) * of_tile

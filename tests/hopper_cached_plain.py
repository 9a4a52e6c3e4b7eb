"""The Hopper kernel that reads a cache in plain JAX: its lists of tiles, its parts and its arithmetic, without copies.

Pallas's interpreter takes seconds for a call, and this takes milliseconds.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from seqattn.kernels import hopper_cached
from seqattn.kernels.call import Call, Result
from seqattn.kernels.hopper.tile import start
from seqattn.kernels.hopper_cached import forward, kernel
from seqattn.kernels.hopper_cached import plan as plans
from seqattn.kernels.hopper_cached.plan import Plan, Tiling
from seqattn.kernels.hopper_cached.tile import Arithmetic
from tests.hopper_plain import Every, Plain


def compute(plan: Plan, given: tuple[jax.Array, ...]) -> list[jax.Array]:
    """What `forward.compute` returns."""
    queries, keys, values, scale, counts, tiles, *words = given
    units, slots, rows = Plain(), plan.tiling.slots, plan.tiling.queries

    def block(row, head, part):
        arithmetic = Arithmetic(units, scale[0], words, row, head)
        query = jnp.pad(queries[row, head], ((0, rows - plan.rows), (0, 0)))
        begin, end = (forward.share(plan, counts[row, 0, 1], part + more) for more in (0, 1))

        def step(n, sums):
            first = tiles[row, 0, n] * slots
            key = lax.dynamic_slice_in_dim(keys[row, head], first, slots, axis=1)
            value = lax.dynamic_slice_in_dim(values[row, head], first, slots)
            products, _ = units.product(query, key, lambda: None)
            weights, sums = arithmetic.weights(products, arithmetic.bits(first, slots), sums)
            return sums._replace(output=units.output(sums.output, weights.astype(plan.dtype), value, lambda: None))

        sums = lax.fori_loop(begin, end, step, start(units, rows, values.shape[3]))
        return [x[: plan.rows] for x in sums]

    over = jax.vmap(jax.vmap(jax.vmap(block, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(jnp.arange(plan.sizes[0]), jnp.arange(plan.sizes[2]), jnp.arange(plan.parts, dtype=jnp.int32))


def attend(call: Call, tiling: Tiling | None = None) -> Result:
    """The kernel on any machine; with a tiling also for other dtypes and dims than the device has."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(forward, "compute", compute))
        if tiling is not None:
            patches.enter_context(mock.patch.object(kernel, "DTYPES", ("float32", "bfloat16", "float16")))
            patches.enter_context(mock.patch.object(kernel, "refuse_dims"))
            for where in (plans, kernel):
                patches.enter_context(mock.patch.object(where, "TILINGS", Every({0: tiling})))
        # The name keeps the traced programs apart from those of the device.
        return hopper_cached.attend(call, interpret="plain")

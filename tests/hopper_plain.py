"""The forward pass of the Hopper kernel in plain JAX: its lists of tiles and its arithmetic, without its warpgroups.

Pallas's interpreter takes seconds for a call, and this takes milliseconds. What it leaves out, the protocol and the
copies, is in `abstract_machine` and in the tests that interpret the kernel.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from seqattn.kernels.call import Call, Result
from seqattn.kernels.hopper import forward, kernel
from seqattn.kernels.hopper import plan as plans
from seqattn.kernels.hopper.plan import Operands, Plan, Tiling
from seqattn.kernels.hopper.protocol import CONSUMERS
from seqattn.kernels.hopper.tile import Arithmetic, Place
from seqattn.kernels.hopper.units import Interpreted


class Plain(Interpreted):
    """Units that read arrays, not references."""

    def vector(self, array, at, first, axis, shape):
        part = lax.dynamic_slice_in_dim(array[at], first, shape[axis])
        return lax.broadcast_in_dim(part, shape, (axis,))

    def pairs(self, array, at, first, shape):
        return lax.dynamic_slice(array[at], first, shape)


def compute(plan: Plan, given: Operands) -> list[jax.Array]:
    """What `forward.compute` returns."""
    batch, length, num_heads, _ = given.query.shape
    queries, keys, group, dim = (
        plan.tiling.queries,
        plan.tiling.keys,
        num_heads // given.key.shape[2],
        given.value.shape[3],
    )
    units = Plain()
    arithmetic = Arithmetic(units, plan.sizes[4], plan.mask, plan.score_mod, plan.dropout_rate, given.scale[0], given)

    def tile(row, head, i):
        pair, first = i // CONSUMERS, i * queries
        listed = row if given.counts.shape[0] > 1 else 0
        full, partial = given.counts[listed, pair]
        query = lax.dynamic_slice_in_dim(given.query[row, :, head], first, queries)

        def step(n, sums, *, partial):
            at = given.tiles[listed, pair, n] * keys
            key, value = (
                lax.dynamic_slice_in_dim(x[row, :, head // group], at, keys) for x in (given.key, given.value)
            )
            place = Place(row, head, first, at)
            weights, sums = arithmetic.weights(units.scores(query, key, lambda: None), sums, place, partial=partial)
            output = units.output(sums.output, weights.astype(plan.dtype), value, lambda: None)
            return sums._replace(output=output)

        sums = arithmetic.start(queries, dim)
        sums = lax.fori_loop(0, full, functools.partial(step, partial=False), sums)
        sums = lax.fori_loop(full, full + partial, functools.partial(step, partial=True), sums)
        return arithmetic.finish(sums)

    over = jax.vmap(jax.vmap(jax.vmap(tile, (None, None, 0)), (None, 0, None)), (0, None, None))
    output, peak, log_total = over(jnp.arange(batch), jnp.arange(num_heads), jnp.arange(length // queries))
    output = output.reshape(batch, num_heads, length, dim).swapaxes(1, 2).astype(plan.dtype)
    return [output, *(x.reshape(batch, num_heads, length) for x in (peak, log_total))]


class _Every(dict[int, Tiling]):
    """One tiling for all head dims."""

    def __contains__(self, head_dim: object) -> bool:
        return True

    def __missing__(self, head_dim: int) -> Tiling:
        return self[0]


def attend(call: Call, tiling: Tiling | None = None) -> Result:
    """The Hopper kernel on any machine; with a tiling also for other dtypes and dims than the device has."""
    if call.query.dtype == jnp.float32:
        # `chunked`, which computes the gradients, scales float32 queries before the product. Huge scores would differ.
        call = dataclasses.replace(call, query=call.query * jnp.float32(call.scale), scale=1.0)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(forward, "compute", compute))
        if tiling is not None:
            patches.enter_context(mock.patch.object(kernel, "_DTYPES", ("float32", "bfloat16", "float16")))
            patches.enter_context(mock.patch.object(kernel, "_refuse_dims"))
            every = _Every({0: tiling})
            for name in ("TILINGS", "SEARCHING"):
                patches.enter_context(mock.patch.object(plans, name, every))
        # The name keeps the traced programs apart from those of the device.
        return kernel.attend(call, interpret="plain")

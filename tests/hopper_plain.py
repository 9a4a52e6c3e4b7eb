"""The Hopper kernels in plain JAX: their lists of tiles and their arithmetic, without their warpgroups.

Pallas's interpreter takes seconds for a call, and this takes milliseconds. What it leaves out, the protocol and the
copies, is in `abstract_machine` and in the tests that interpret the kernel.
"""

import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call, Result
from seqattn.kernels.hopper import backward, backward_plan, forward, kernel
from seqattn.kernels.hopper import plan as plans
from seqattn.kernels.hopper.backward_plan import Pass
from seqattn.kernels.hopper.backward_protocol import SIDES, other
from seqattn.kernels.hopper.backward_tile import Gradients
from seqattn.kernels.hopper.inputs import Rows
from seqattn.kernels.hopper.plan import Operands, Plan, Tiling
from seqattn.kernels.hopper.protocol import CONSUMERS
from seqattn.kernels.hopper.tile import Arithmetic, Place
from seqattn.kernels.hopper.units import Interpreted


class Plain(Interpreted):
    """Units that read arrays, not references."""

    def part(self, array, at, first, length, axis):
        return lax.dynamic_slice_in_dim(array[at], first, length)

    def pairs(self, array, at, first, shape):
        return lax.dynamic_slice(array[at], first, shape)

    def after_loads(self):
        """Arrays need no order."""


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
    arithmetic = Arithmetic(units, plan, given.scale[0], given)

    def tile(row, head, i):
        pair, first = i // CONSUMERS, i * queries
        listed = row if given.walk.counts.shape[0] > 1 else 0
        full, partial = given.walk.counts[listed, pair]
        query = lax.dynamic_slice_in_dim(given.query[row, :, head], first, queries)

        def step(n, sums, *, partial):
            at = given.walk.tiles[listed, pair, n] * keys
            key, value = (
                lax.dynamic_slice_in_dim(x[row, :, head // group], at, keys) for x in (given.key, given.value)
            )
            place = Place(row, head, first, at)
            weights, sums = arithmetic.weights(units.scores(query, key, lambda: None)[0], sums, place, partial=partial)
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


def compute_gradients(plan: Plan, each: Pass, given: tuple[Operands, Rows]) -> dict[str, jax.Array]:
    """What `backward.compute` returns."""
    operands, rows = given
    of_keys, (own, tile_of) = each.owner == "key", (SIDES[each.owner], SIDES[other(each.owner)])
    arrays = {name: getattr(operands, name) for name in ("query", "key", "value")} | {"d_output": rows.d_output}
    units = Plain()
    arithmetic = Gradients(units, plan, operands.scale[0], operands, transposed=of_keys)
    repeats = plan.group if of_keys else 1

    def tile(row, head, i):
        pair, first = i // CONSUMERS, i * each.rows
        listed = row if operands.walk.counts.shape[0] > 1 else 0
        full, partial = operands.walk.counts[listed, pair]
        mine = [lax.dynamic_slice_in_dim(arrays[name][row, :, head], first, each.rows) for name in own]

        def step(n, sums, *, head_of, partial):
            at = operands.walk.tiles[listed, pair, n] * each.columns
            query_head = head_of if of_keys else head
            theirs_head = head_of if of_keys else head // plan.group
            theirs = [lax.dynamic_slice_in_dim(arrays[x][row, :, theirs_head], at, each.columns) for x in tile_of]
            place = Place(row, query_head, *((at, first) if of_keys else (first, at)))
            shape = each.rows, each.columns

            def numbers(name):
                array = getattr(rows, name)
                return units.vector(array, (row, query_head), place.query, int(of_keys), shape)

            products, d_weights = (units.scores(x, y, lambda: None)[0] for x, y in zip(mine, theirs, strict=True))
            weights = arithmetic.recomputed(products, numbers("peak"), numbers("log_total"), place, partial=partial)
            d_products = arithmetic.d_products(weights, d_weights, numbers("delta"), partial=partial)
            new = dict(sums)
            if "value" in sums:
                new["value"] = units.output(sums["value"], weights.kept.astype(plan.dtype), theirs[1], lambda: None)
            if each.owner in sums:
                new[each.owner] = units.output(sums[each.owner], d_products.astype(plan.dtype), theirs[0], lambda: None)
            return new

        sums = {name: units.tile(0.0, (each.rows, arrays[name].shape[3])) for name in each.results}
        for start, end, is_partial in ((0, full, False), (full, full + partial, True)):
            for n in range(repeats):
                run = functools.partial(step, head_of=head * repeats + n, partial=is_partial)
                sums = lax.fori_loop(start, end, run, sums)
        return {name: x if name == "value" else x * arithmetic.scale for name, x in sums.items()}

    batch, length, heads, _ = arrays[each.owner].shape
    over = jax.vmap(jax.vmap(jax.vmap(tile, (None, None, 0)), (None, 0, None)), (0, None, None))
    found = over(jnp.arange(batch), jnp.arange(heads), jnp.arange(length // each.rows))
    return {name: x.reshape(batch, heads, length, -1).swapaxes(1, 2).astype(plan.dtype) for name, x in found.items()}


def _gradients_anywhere(compute: Any, plan: Plan, *given: Any) -> dict[str, jax.Array]:
    """Chooses between the device and plain JAX."""
    return compute_gradients(plan, *given) if plan.interpret == _PLAIN else compute(plan, *given)


_PLAIN = "plain"

# Not only in `attend`: JAX calls the backward pass after it has returned.
backward.compute = functools.partial(_gradients_anywhere, backward.compute)

SMALL = Pass("query", ("query",), 2, 4, 2), Pass("key", ("key", "value"), 2, 3, 2)
"""Kernels of the backward pass with tiles so small that a few tokens fill several."""


class Every(dict[int, Any]):
    """One value for all head dims."""

    def __contains__(self, head_dim: object) -> bool:
        return True

    def __missing__(self, head_dim: int) -> Tiling:
        return self[0]


def attend(call: Call, tiling: Tiling | None = None, passes: tuple[Pass, ...] = SMALL) -> Result:
    """The Hopper kernels on any machine; with a tiling also for other dtypes and dims than the device has."""
    if call.query.dtype == jnp.float32:
        # `chunked`, which computes the gradients, scales float32 queries before the product. Huge scores would differ.
        call = dataclasses.replace(call, query=call.query * jnp.float32(call.scale), scale=1.0)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(forward, "compute", compute))
        if tiling is not None:
            patches.enter_context(mock.patch.object(kernel, "DTYPES", ("float32", "bfloat16", "float16")))
            patches.enter_context(mock.patch.object(kernel, "refuse_dims"))
            for where, names, value in (
                (plans, ("TILINGS", "SEARCHING"), tiling),
                (backward_plan, ("PASSES", "NARROW"), passes),
            ):
                for name in names:
                    patches.enter_context(mock.patch.object(where, name, Every({0: value})))
        # The name keeps the traced programs apart from those of the device.
        return kernel.attend(call, interpret=_PLAIN)


def interpreted(compute):
    """What a kernel returns in Pallas's interpreter, and whether that found a race."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    try:
        return jax.device_get(compute()), gpu_callbacks.get_races().races_found
    except jax.errors.JaxRuntimeError as error:
        # From jax 0.12 on a race is an error.
        if "RACE DETECTED" not in str(error):
            raise
        return None, True


def packed(length):
    """Two texts and padding, with full, partial and empty tiles. The first block of queries is padding: it has none."""
    segment = np.repeat(np.int32([1, 2, 0]), [20, 14, 3])
    kv_at = Coordinates.from_segments(jnp.asarray(segment))
    of_queries = np.repeat(np.int32([0, 2]), [16, length - 16])
    return {"q_at": Coordinates(kv_at.position[-length:], jnp.asarray(of_queries)), "kv_at": kv_at}

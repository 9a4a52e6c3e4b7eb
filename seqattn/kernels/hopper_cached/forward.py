"""The kernel: an online softmax (Milakov 2018; Dao 2023) over the tiles of a cache that a query of the row sees.

A step of decoding is as fast as it reads keys and values, so the kernel reads no tile twice and none that is hidden. A
block of one warpgroup has a batch row and a key head. The query heads of its group and all new tokens are the rows of
one product with the keys, in the layout of the cache.

With few rows and heads there are too few blocks for all cores. Several blocks then share the tiles of a row, and XLA
merges what they return ("flash-decoding").
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from seqattn.kernels.call import Columns, Result
from seqattn.kernels.finite import marked_query
from seqattn.kernels.hopper.block import layout
from seqattn.kernels.hopper.tile import Sums, start
from seqattn.kernels.hopper.units import units
from seqattn.kernels.hopper.walk import Walk
from seqattn.kernels.hopper_cached.marks import sees_lost, words_of
from seqattn.kernels.hopper_cached.plan import Plan
from seqattn.kernels.hopper_cached.tile import Arithmetic
from seqattn.kernels.log_total import SEES_NOTHING, lse_of
from seqattn.kernels.over_cache import in_rows, kinds_of_tiles, of_queries, visible_rows


def forward(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Returns the output and the log-sum-exp."""
    output, peak, log_total = merged(*compute(plan, operands(plan, query, columns, visible, scale)))
    output, lse = (of_queries(x, plan.sizes[1], plan.sizes[3]) for x in (output, lse_of(peak, log_total)))
    return output.astype(plan.dtype), lse


def operands(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> tuple[Array, ...]:
    """Returns what the kernel reads: queries in rows, keys, values, the scale, the lists of tiles, and bits of slots.

    Without a mask there are no bits.
    """
    batch, _, num_kv_heads, length, size, _ = plan.sizes
    walk = Walk.of(kinds_of_tiles(visible, batch, size, plan.tiling.slots))
    rows = None if visible is None else visible_rows(visible, num_kv_heads, plan.group, length)
    lost = sees_lost(rows, columns)
    if lost.shape[2] > 1:
        lost = jnp.pad(lost, ((0, 0), (0, 0), (0, plan.rows - lost.shape[2])))
    # The cache holds 0 in place of a key that is not finite. A row that sees one gets a query of NaN, and so results of
    # NaN.
    queries = jnp.where(lost[..., None], jnp.nan, in_rows(marked_query(query), num_kv_heads, plan.rows))
    bits = [] if rows is None else [jnp.broadcast_to(x := words_of(rows), (*x.shape[:3], size))]
    listed = (jnp.asarray(x) for x in (walk.counts, walk.tiles))
    return queries.astype(plan.dtype), columns.key, columns.value, scale.reshape(1), *listed, *bits


def merged(output: Array, peak: Array, total: Array) -> tuple[Array, Array, Array]:
    """Merges the parts: returns the output, the largest logit of each row and the log of its total.

    Args:
        output: the weighted sums of values of each part, `[B, K, parts, rows, V]`.
        peak: the largest logit of each part, `[B, K, parts, rows]`.
        total: the sums of weights of each part, of the same shape.
    """
    # A part without a tile, or all of whose pairs are masked, has the lowest number as its maximum and a total of 0.
    top = peak.max(axis=2)
    weights = jnp.exp(peak - top[:, :, None])
    whole = (total * weights).sum(axis=2)
    empty = whole == 0
    divisor = jnp.where(empty, jnp.ones_like(whole), whole)
    mean = (output * weights[..., None]).sum(axis=2) / divisor[..., None]
    return mean, top, jnp.where(empty, SEES_NOTHING, jnp.log(divisor))


def share(plan: Plan, found: Any, part: Any) -> Any:
    """Returns where a part begins in the list of tiles that a row visits. Parts differ by at most one tile."""
    return lax.div(found * part, jnp.int32(plan.parts))


def compute(plan: Plan, given: tuple[Array, ...]) -> list[Array]:
    """Runs the kernel on the arrays of `operands`. Returns the parts, as `merged` takes them."""
    batch, _, num_kv_heads, _, _, dim = plan.sizes
    tiling, rows = plan.tiling, plan.rows

    def seqattn_hopper_cached(*refs: Any) -> None:
        _Block(plan, *refs).run()

    def buffer(dtype: Any, *shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=layout(dtype, shape[-1]))

    number = jax.ShapeDtypeStruct((batch, num_kv_heads, plan.parts, tiling.queries), jnp.float32)
    shared = {
        "query": buffer(plan.dtype, tiling.queries, dim),
        "key": buffer(plan.dtype, tiling.ring, dim, tiling.slots),
        "value": buffer(plan.dtype, tiling.ring, tiling.slots, dim),
        "output": buffer(jnp.dtype(jnp.float32), tiling.queries, dim),
    }
    barriers = {"query": 1, "key": tiling.ring, "value": tiling.ring}
    output, peak, total = plgpu.kernel(
        seqattn_hopper_cached,
        out_type=[jax.ShapeDtypeStruct((batch, num_kv_heads, plan.parts, rows, dim), jnp.float32), number, number],
        # Neighbouring blocks are the parts of one row: its short ones end together.
        grid=(batch, num_kv_heads, plan.parts),
        grid_names=("batch", "heads", "parts"),
        scratch_types=[
            shared,
            {name: plgpu.Barrier(num_arrivals=1, num_barriers=count) for name, count in barriers.items()},
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plan.interpret or False,
    )(*given)
    return [output, peak[..., :rows], total[..., :rows]]


class _Block:
    """The program of one block: a batch row, a key head, and a part of the tiles that the row visits.

    Args:
        plan: the static part of the call.
        query: `[B, K, rows, H]` in global memory, as all arrays.
        key: `[B, K, H, S]`.
        value: `[B, K, S, H]`.
        scale: `[1]`.
        counts: see `Walk`.
        tiles: see `Walk`.
        words: see `marks`; absent without a mask.
        output: see `merged`, as the next two.
        peak: the largest logits.
        total: the sums of weights.
        shared: the buffers in shared memory.
        ready: barriers at which copies to them arrive.
    """

    def __init__(self, plan: Plan, *refs: Any) -> None:
        self.plan = plan
        self.query, self.key, self.value, scale, counts, self.tiles, *words = refs[:-5]
        *self.results, self.shared, self.ready = refs[-5:]
        self.batch, self.head, self.part = (lax.axis_index(name) for name in ("batch", "heads", "parts"))
        self.units = units(interpret=plan.interpret is not None)
        self.arithmetic = Arithmetic(self.units, scale[0], words, self.batch, self.head)
        # All tiles count as partial: a bit is read for each pair.
        found = counts[self.batch, 0, 1]
        self.begin, self.end = (share(plan, found, self.part + more) for more in (0, 1))

    def run(self) -> None:
        """Runs the program. Copies are `ring` tiles ahead of the products."""
        tiling, rows = self.plan.tiling, pl.ds(0, self.plan.rows)
        # Rows past those of the call hold garbage. It stays in its own rows of each product.
        query = self.shared["query"]
        plgpu.copy_gmem_to_smem(self.query.at[self.batch, self.head], query.at[rows], self.ready["query"].at[0])
        for i in range(tiling.ring):
            for name in ("key", "value"):
                self._load(name, self.begin + i)
        self._wait("query", 0)
        sums = lax.fori_loop(self.begin, self.end, self._step, start(self.units, tiling.queries, self.plan.sizes[5]))
        output, *numbers = self.results
        at = self.batch, self.head, self.part
        for ref, x in zip(numbers, (sums.peak, sums.total), strict=True):
            ref[at] = x
        self.shared["output"][...] = sums.output
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.shared["output"].at[rows], output.at[at])
        plgpu.wait_smem_to_gmem(0)

    def _slot(self, step: Any) -> Any:
        """Returns the place of a step's tile in the ring."""
        return lax.rem(step - self.begin, jnp.int32(self.plan.tiling.ring))

    def _first(self, step: Any) -> Any:
        """Returns the first slot of a step's tile."""
        return self.tiles[self.batch, 0, step] * self.plan.tiling.slots

    def _load(self, name: str, step: Any) -> None:
        """Starts the copy of a step's tile, if there is such a step."""

        @pl.when(step < self.end)
        def _() -> None:
            slots, slot = pl.ds(self._first(step), self.plan.tiling.slots), self._slot(step)
            at = (self.batch, self.head)
            tile = self.key.at[(*at, slice(None), slots)] if name == "key" else self.value.at[(*at, slots)]
            plgpu.copy_gmem_to_smem(tile, self.shared[name].at[slot], self.ready[name].at[slot])

    def _wait(self, name: str, slot: Any) -> None:
        """Waits for the copy to a buffer."""
        plgpu.barrier_wait(self.ready[name].at[slot])

    def _step(self, step: Any, sums: Sums) -> Sums:
        """Adds a tile. As soon as a product has read its buffer, the next tile is copied there."""
        slot, after = self._slot(step), step + self.plan.tiling.ring
        # Loaded while the keys are on their way.
        bits = self.arithmetic.bits(self._first(step), self.plan.tiling.slots)
        self._wait("key", slot)
        products, _ = self.units.product(self.shared["query"], self.shared["key"].at[slot], lambda: None)
        self._load("key", after)
        weights, sums = self.arithmetic.weights(products, bits, sums)
        self._wait("value", slot)
        # The product runs in the dtype of the values; its sums are float32.
        output = self.units.output(
            sums.output, weights.astype(self.plan.dtype), self.shared["value"].at[slot], lambda: None
        )
        self._load("value", after)
        return sums._replace(output=output)

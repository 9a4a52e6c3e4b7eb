"""The kernel: an online softmax (Milakov 2018; Dao 2023) over the tiles of a cache that a query of the row sees.

A step of decoding is as fast as it reads keys and values, so the kernel reads no tile twice and none that is hidden.
The grid is (groups of key heads, steps). Lists, read before the kernel starts, hold the row and the tile of each step,
so rows of different lengths take different numbers of steps. All heads of a group and all new tokens are the rows of
one product with the keys, in the layout of the cache.

The tiles of a row follow each other and are not shared out among cores ("flash-decoding"): a v5e and a v6e have one
core a chip, which a single row already keeps reading.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from seqattn.kernels.blocks import FIRST, KIND, LAST, PARTIAL, Steps
from seqattn.kernels.call import Columns, Result
from seqattn.kernels.finite import marked_query
from seqattn.kernels.log_total import SEES_NOTHING, lse_of
from seqattn.kernels.over_cache import in_rows, kinds_of_tiles, of_queries, visible_rows
from seqattn.kernels.tpu_cached.plan import LISTS, Plan
from seqattn.precision import lowest

_LANES = 128
"""Numbers for each query are kept in all 128 lanes of a vector, so that no step has to spread them."""

HIDDEN, SEEN, LOST = 0, 1, 2
"""Codes of a pair: the key is masked, visible, or visible and not finite."""


def forward(plan: Plan, query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Returns the output and the log-sum-exp."""
    _, num_heads, num_kv_heads, length, *_ = plan.sizes
    steps, code = steps_of(plan, visible), codes(plan, visible, columns)
    rows = in_rows(marked_query(query).astype(plan.product), num_kv_heads, plan.rows)
    output, peak, log_total = _call(plan, steps, rows, columns, scale, code)
    lse = lse_of(peak[:, :, 0], log_total[:, :, 0])
    return of_queries(output, num_heads, length), of_queries(lse, num_heads, length)


def codes(plan: Plan, visible: Array | None, columns: Columns) -> Array:
    """Returns the code of each pair, `[B, K or 1, rows or 1, S]` int8; one row of them serves queries that see alike.

    Args:
        plan: the plan.
        visible: the pairs that the mask shows, `[B or 1, N or 1, T or 1, S or 1]`, or None.
        columns: the cache, which marks keys that are not finite.
    """
    finite = columns.finite[:, None, None] if columns.finite.ndim == 2 else columns.finite[:, :, None]
    shown = jnp.where(finite, jnp.int8(SEEN), jnp.int8(LOST))
    if visible is None:
        return shown
    visible = visible_rows(visible, plan.sizes[2], plan.group, plan.sizes[3])
    if (rows := visible.shape[2]) > 1:
        visible = jnp.pad(visible, ((0, 0), (0, 0), (0, plan.rows - rows), (0, 0)))
    return jnp.where(visible, shown, jnp.int8(HIDDEN))


def steps_of(plan: Plan, visible: Array | None) -> Steps:
    """Returns the tiles to visit: those in which some query of the row sees a key. They are known without a mask."""
    return Steps.of(kinds_of_tiles(visible, plan.sizes[0], plan.sizes[4], plan.tile))


def _call(plan: Plan, steps: Steps, query: Array, columns: Columns, scale: Array, code: Array) -> Sequence[Array]:
    """Runs the kernel. Returns the output, the largest logit of each row and the log of its total."""
    batch, _, num_kv_heads, _, _, head_dim, value_dim = plan.sizes
    heads, rows, tile = plan.heads, plan.rows, plan.tile
    value = columns.value.swapaxes(2, 3) if plan.columns else columns.value
    by_head = code.shape[1] > 1
    inputs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((None, heads, rows, head_dim), _of_row),
        pl.BlockSpec((None, heads, head_dim, tile), _of_columns),
        pl.BlockSpec((None, heads, value_dim, tile), _of_columns)
        if plan.columns
        else pl.BlockSpec((None, heads, tile, value_dim), _of_slots),
        pl.BlockSpec((None, heads if by_head else 1, code.shape[2], tile), _of_columns if by_head else _of_all_heads),
    ]
    outputs = [pl.BlockSpec((None, heads, *dims), _of_row) for dims in ((rows, value_dim), (1, rows), (1, rows))]
    number = jax.ShapeDtypeStruct((batch, num_kv_heads, 1, rows), jnp.float32)
    # Pallas's interpreter has no grid of a size that is only known at run time. Steps after the last have no flags.
    count = steps.size if steps.count is None or plan.interpret else steps.count
    return pl.pallas_call(
        functools.partial(_step, plan),
        out_shape=[jax.ShapeDtypeStruct((batch, num_kv_heads, rows, value_dim), plan.dtypes[0]), number, number],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=LISTS,
            grid=(num_kv_heads // heads, count),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=[pltpu.VMEM((heads, rows, dim), jnp.float32) for dim in (value_dim, _LANES, _LANES)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(plan, steps),
        interpret=plan.interpret,
        name="seqattn_cached",
    )(
        *(jnp.asarray(x) for x in (steps.row, steps.inner, steps.flags)),
        scale.reshape(1, 1),
        query,
        columns.key,
        value,
        code,
    )


def _of_row(group: Any, step: Any, row: Any, at: Any, flags: Any) -> tuple[Any, ...]:
    """Returns the block of an array with the queries of each row."""
    return row[step], group, 0, 0


def _of_columns(group: Any, step: Any, row: Any, at: Any, flags: Any) -> tuple[Any, ...]:
    """Returns the block of an array `[B, K, ..., S]`."""
    return row[step], group, 0, at[step]


def _of_slots(group: Any, step: Any, row: Any, at: Any, flags: Any) -> tuple[Any, ...]:
    """Returns the block of an array `[B, K, S, ...]`."""
    return row[step], group, at[step], 0


def _of_all_heads(group: Any, step: Any, row: Any, at: Any, flags: Any) -> tuple[Any, ...]:
    """Returns the block of an array `[B, 1, ..., S]`."""
    return row[step], 0, 0, at[step]


def _step(plan: Plan, row: Any, at: Any, flags: Any, scale: Any, *refs: Any) -> None:
    """Adds one tile to the accumulators of its rows."""
    query, key, value, code, *results, output, peak, total = refs
    step = pl.program_id(1)
    flag = flags[step]

    @pl.when(flag & FIRST != 0)
    def _() -> None:
        # The maximum starts at the lowest finite number instead of -inf: -inf - -inf would be NaN in the first update.
        output[...] = jnp.zeros_like(output)
        peak[...] = jnp.full_like(peak, lowest(jnp.float32))
        total[...] = jnp.zeros_like(total)

    @pl.when(flag & PARTIAL * KIND != 0)
    def _() -> None:
        _add(plan, at[step], scale[0, 0], (query, key, value, code), (output, peak, total))

    @pl.when(flag & LAST != 0)
    def _() -> None:
        # A visible logit adds exp(0) = 1 at the maximum, so only fully masked rows have a total of 0.
        empty = total[:, :, :1] == 0
        whole = jnp.where(empty, 1.0, total[:, :, :1])
        # One division at the end instead of one in each step (Dao 2023, section 3.1).
        results[0][...] = (output[...] / whole).astype(results[0].dtype)
        results[1][...] = jnp.swapaxes(peak[:, :, :1], 1, 2)
        results[2][...] = jnp.swapaxes(jnp.where(empty, SEES_NOTHING, jnp.log(whole)), 1, 2)


def _add(plan: Plan, at: Any, scale: Any, inputs: tuple[Any, ...], kept: tuple[Any, ...]) -> None:
    """Adds a tile in which a query sees a key."""
    query, key, value, code = (ref[...] for ref in inputs)
    output, peak, total = kept
    code, slots = code.astype(jnp.int32), 2 if plan.columns else 1
    if plan.sizes[4] % plan.tile:
        # Past the last slot of the cache a tile holds garbage, which may be NaN.
        left = plan.sizes[4] - at * plan.tile
        code = jnp.where(lax.broadcasted_iota(jnp.int32, code.shape, 2) < left, code, HIDDEN)
        here = lax.broadcasted_iota(jnp.int32, value.shape, slots) < left
        value = jnp.where(here, value, jnp.zeros_like(value))
    scores = _product(query, key.astype(plan.product), 1) * scale
    # The cache holds 0 in place of a key that is not finite. Its mark turns the rows that see it into NaN.
    scores = jnp.where(code == LOST, jnp.nan, scores)
    scores = jnp.where(code == HIDDEN, -jnp.inf, scores)
    # The running maximum of Milakov 2018, algorithm 3: m_j = max(m_{j-1}, x_j).
    top = jnp.maximum(peak[...], jnp.max(scores, axis=2, keepdims=True))
    weights = jnp.exp(scores - top[:, :, :1])
    # Sums under the old maximum are rescaled to the new one: d_j = d_{j-1} * exp(m_{j-1} - m_j) + ...
    shrink = jnp.exp(peak[...] - top)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=2, keepdims=True)
    peak[...] = top
    # The second product reads the values as the cache stores them, in their dtype; its sum is float32.
    output[...] = output[...] * shrink[:, :, :1] + _product(
        weights.astype(value.dtype), value, 2 if plan.columns else 1
    )


def _product(left: Array, right: Array, axis: int) -> Array:
    """Returns the product of each head, over the last axis on the left and `axis` on the right, summed in float32.

    Float32 is multiplied in full precision.
    """
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((2,), (axis,)), ((0,), (0,)))
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _cost(plan: Plan, steps: Steps) -> pl.CostEstimate:
    """Returns the most that the kernel computes and moves, from which the compiler schedules what runs beside it."""
    _, num_heads, num_kv_heads, length, _, head_dim, value_dim = plan.sizes
    slots = steps.size * plan.tile
    read = slots * num_kv_heads * (head_dim * plan.dtypes[1].itemsize + value_dim * plan.dtypes[2].itemsize)
    pairs = slots * num_heads * length
    return pl.CostEstimate(flops=2 * pairs * (head_dim + value_dim), transcendentals=pairs, bytes_accessed=read)

"""The arrays that tiles are cut from, in their memory layouts and with non-finite entries replaced."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqattn.kernels.chunked import layouts
from seqattn.kernels.chunked.plan import TiledCall
from seqattn.kernels.chunked.schedule import Grid
from seqattn.kernels.finite import marked, marked_query, nan_unless_finite, zero_unless_finite
from seqattn.mask import Mask
from seqattn.precision import accumulator

Operands = dict[str, Array]
"""The arrays of a whole call, by name."""


def of_output(grid: Grid, call: TiledCall) -> Operands:
    """Returns the arrays of the forward pass."""
    key, value = marked(call.key, call.value)
    # Layouts for `key @ query` and `value @ weights`: both products contract over adjacent axes.
    return {
        "query": layouts.query_columns(grid, marked_query(call.query), call.inner_scale),
        "key": layouts.key_rows(grid, key),
        "value": layouts.key_columns(grid, value),
    } | _of_scores(grid, call, key)


def of_gradients(
    grid: Grid, call: TiledCall, output: Array, peak: Array, log_total: Array, d_output: Array, d_lse: Array
) -> Operands:
    """Returns the arrays of the backward pass, including the results of `finish` and the incoming gradients."""
    high = accumulator(output.dtype)
    key, value = marked(call.key, call.value)
    # D = rowsum(dO * O) of FlashAttention-2, algorithm 2, line 4. The gradient of the log-sum-exp with respect to a
    # score is its weight, so d_lse enters the same bracket: dS = P * (dP - (D - d_lse)).
    delta = jnp.sum(d_output.astype(high) * output.astype(high), axis=-1) - d_lse
    return {
        "query": layouts.query_columns(grid, marked_query(call.query), call.inner_scale),
        # Rows that enter the key's gradient must be finite: a NaN query times a zero gradient would still be NaN.
        "query_rows": layouts.query_rows(grid, zero_unless_finite(call.query), call.inner_scale),
        "key": layouts.key_rows(grid, key),
        "key_columns": layouts.key_columns(grid, zero_unless_finite(key)),
        "value": layouts.key_rows(grid, value),
        "d_output": layouts.query_columns(grid, d_output),
        "d_output_rows": layouts.query_rows(grid, d_output),
        "delta": layouts.query_columns(grid, delta[..., None])[:, :, 0],
        # Padding queries get a maximum of +inf, so that their weights are exp(-inf) = 0.
        "peak": layouts.query_columns(grid, peak[..., None], filler=jnp.inf)[:, :, 0],
        "log_total": layouts.query_columns(grid, log_total[..., None])[:, :, 0],
    } | _of_scores(grid, call, key)


def _of_scores(grid: Grid, call: TiledCall, key: Float[Array, "B S K H"]) -> Operands:
    """Returns the arrays of queries and pairs, padded to whole tiles. `key` is NaN where it must make a row NaN.

    A score modification may mask pairs as well. It therefore works on finite scores, and NaN is added after it.
    """
    given: Operands = {}
    if call.score_mod is not None:
        high, query, rows = call.high, call.query, call.rows
        # The rows of a score modification are computed from the queries, so they count as a part of them.
        bad = nan_unless_finite(query) if rows is None else nan_unless_finite(query) + nan_unless_finite(rows)
        given["bad_queries"] = layouts.query_columns(grid, bad.astype(high))
        given["bad_keys"] = layouts.key_rows(grid, nan_unless_finite(key).astype(high))
        # Padding repeats queries and keys, as it does coordinates: the modification sees no pair that is not there.
        given["query"] = layouts.query_columns(grid, zero_unless_finite(query), call.inner_scale, layouts.REPEAT)
        given["key"] = layouts.key_rows(grid, zero_unless_finite(key), layouts.REPEAT)
        if rows is not None:
            given["rows"] = layouts.query_rows(grid, zero_unless_finite(rows), filler=layouts.REPEAT)
    # Padding repeats the last pairs here as well: a modification then sees of a repeated pair what it saw of the first.
    for name, x in (("bias", call.bias), ("mask", call.mask)):
        if x is not None and not isinstance(x, Mask):
            # A dim of size 1 is broadcast over the padding, too, so it needs none.
            behind = (0 if n == 1 else whole - n for n, whole in zip(x.shape[2:], grid.padded, strict=True))
            given[name] = jnp.pad(x, ((0, 0), (0, 0), *((0, n) for n in behind)), mode="edge")
    return given

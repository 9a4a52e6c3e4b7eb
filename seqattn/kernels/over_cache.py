"""What the kernels that read a cache tile by tile have in common: the form of their operands, and their gradients.

All query heads of a key head and all new tokens are the rows of one product with the keys. A tile in which no query of
the batch row sees a slot is not read. Gradients are those of `cached`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.kernels import cached
from seqattn.kernels.blocks import EMPTY, PARTIAL
from seqattn.kernels.call import Call, Columns, Result, refuse_unknown
from seqattn.kernels.guard import refuse_mesh_axes, refuse_platform, refuse_wide_integers
from seqattn.kernels.reference import visibility
from seqattn.kernels.reverse_mode import reverse_only

MOST_QUERIES = 64
"""The most queries of a row: the mask is computed for each of them and each slot, before the kernel starts."""


@dataclasses.dataclass(frozen=True)
class CacheKernel:
    """A kernel, with the plan of a call.

    Attributes:
        plan: the static part of the call, with `interpret`.
        run: takes the plan, queries `[B, T, N, H]`, columns, visible pairs or None, and the scale; returns the results.
        on_device: `on_tpu` or `on_gpu`.
    """

    plan: Any
    run: Callable[..., Result]
    on_device: Callable[..., Any]


def attend(kernel: CacheKernel, call: Call) -> Result:
    """Returns the results of a kernel. Reverse mode is that of `cached`, which reads the whole cache."""
    # The mask becomes an array: a derivative rule must not hold a user's function.
    visible = visibility(call.query.shape, call.mask, None, call.q_at, call.kv_at)
    with reverse_only():
        return _attend(kernel, call.query, call.columns, visible, jnp.asarray(call.scale, jnp.float32))


def is_empty(call: Call) -> bool:
    """Returns whether a dim of the queries or the values is 0, so that there is nothing to compute."""
    return 0 in (*call.query.shape, *call.columns.value.shape)


def refuse(what: str, platform: str, dtypes: Sequence[str], call: Call) -> None:
    """Raises NotImplementedError for what no kernel over a cache supports.

    Args:
        what: the name of the kernel in messages.
        platform: where it runs.
        dtypes: the dtypes that it takes.
        call: the call.
    """
    cached.refuse(call)
    refuse_platform(what, platform, call)
    columns = call.columns
    refuse_unknown("a grid of tiles", call.query.shape, columns.key.shape)
    for name, x in (("queries", call.query), ("keys", columns.key), ("values", columns.value)):
        if x.dtype not in dtypes:
            raise NotImplementedError(f"{what} takes {' and '.join(dtypes)}, not {name} of {x.dtype}")
    if call.bias is not None:
        raise NotImplementedError(f"{what} takes no bias over a cache; cached does")
    if call.score_mod is not None:
        kind = type(call.score_mod).__name__
        raise NotImplementedError(f"{what} takes no score modification over a cache ({kind}); cached does")
    if (length := call.query.shape[1]) > MOST_QUERIES:
        raise NotImplementedError(f"{what} takes up to {MOST_QUERIES} queries over a cache, not {length}")
    refuse_wide_integers(what)
    refuse_mesh_axes(what, call)


def in_rows(query: Float[Array, "B T N H"], num_kv_heads: int, rows: int) -> Float[Array, "B K rows H"]:
    """Returns the queries of each key head as rows: all tokens of its first query head, then those of the next.

    Rows of zeros fill up to `rows`.
    """
    batch, length, num_heads, head_dim = query.shape
    by_head = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    found = jnp.moveaxis(by_head, 1, 3).reshape(batch, num_kv_heads, -1, head_dim)
    return jnp.pad(found, ((0, 0), (0, 0), (0, rows - found.shape[2]), (0, 0)))


def of_queries(x: Float[Array, "B K rows *V"], num_heads: int, length: int) -> Float[Array, "B T N *V"]:
    """Returns results in the order of the queries, from results of rows in the order of `in_rows`."""
    batch, num_kv_heads, _, *dims = x.shape
    group = num_heads // num_kv_heads
    by_head = x[:, :, : group * length].reshape(batch, num_kv_heads, group, length, *dims)
    return jnp.moveaxis(by_head, 3, 1).reshape(batch, length, num_heads, *dims)


def visible_rows(visible: Bool[Array, "..."], num_kv_heads: int, group: int, length: int) -> Bool[Array, "..."]:
    """Returns the pairs that the mask shows, with rows as `in_rows` orders them: `[B or 1, K or 1, rows or 1, S or 1]`.

    One row serves all queries that see the same slots.

    Args:
        visible: `[B or 1, N or 1, T or 1, S or 1]`.
        num_kv_heads: K.
        group: query heads of a key head.
        length: T.
    """
    if visible.shape[1:3] == (1, 1):
        return visible
    heads = 1 if visible.shape[1] == 1 else num_kv_heads
    by_group = visible.reshape(visible.shape[0], heads, -1, *visible.shape[2:])
    by_group = jnp.broadcast_to(by_group, (*by_group.shape[:2], group, length, visible.shape[3]))
    return by_group.reshape(*by_group.shape[:2], group * length, visible.shape[3])


def kinds_of_tiles(visible: Bool[Array, "..."] | None, batch: int, size: int, tile: int) -> Int[Any, "B 1 J"]:
    """Returns `PARTIAL` for the tiles in which some query of the row sees a slot, and `EMPTY` for all others.

    They are known at trace time without a mask.

    Args:
        visible: the pairs that the mask shows, `[B or 1, N or 1, T or 1, S or 1]`, or None.
        batch: B.
        size: S.
        tile: slots of a tile; the last one may have fewer.
    """
    tiles = -(-size // tile)
    if visible is None:
        return np.full((batch, 1, tiles), PARTIAL, np.int32)
    seen = visible.any(axis=(1, 2))
    seen = jnp.broadcast_to(seen, (seen.shape[0], size))
    by_tile = jnp.pad(seen, ((0, 0), (0, tiles * tile - size))).reshape(-1, tiles, tile).any(axis=-1)
    kinds = jnp.where(by_tile, jnp.int32(PARTIAL), jnp.int32(EMPTY))
    return jnp.broadcast_to(kinds, (batch, tiles))[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: CacheKernel, *operands: Any) -> Result:
    """Returns the output and the log-sum-exp of queries, columns, visible pairs or None, and the scale."""
    return _forward(kernel, *operands)[0]


def _forward(kernel: CacheKernel, *operands: Any) -> tuple[Result, tuple[Any, ...]]:
    """Returns the results, and what the backward pass reads: no scores are kept."""
    run = functools.partial(kernel.run, kernel.plan)
    if kernel.plan.interpret:
        return run(*operands), operands
    query, columns = operands[:2]
    types = (
        jax.ShapeDtypeStruct((*query.shape[:3], columns.value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
    )
    return kernel.on_device(run, *operands, results=types, if_split=_whole), operands


def _backward(kernel: CacheKernel, operands: tuple[Any, ...], directions: Any) -> tuple[Any, ...]:
    """Returns the gradients of the operands, as `cached` has them."""
    return jax.vjp(_whole, *operands)[1](directions)


_attend.defvjp(_forward, _backward)


def _whole(query: Array, columns: Columns, visible: Array | None, scale: Array) -> Result:
    """Computes the same with `cached`, which reads the whole cache."""
    # The mask is an array, so nothing reads the coordinates that a call must have.
    at = (Coordinates.range(n) for n in (query.shape[1], columns.key.shape[3]))
    located = dict(zip(("q_at", "kv_at"), (jax.tree.map(lambda x: x[None], each) for each in at), strict=True))
    unused = dict.fromkeys(("key", "value", "bias", "score_mod", "rows", "dropout"))
    return cached.attend(Call(query=query, columns=columns, mask=visible, scale=scale, **located, **unused))

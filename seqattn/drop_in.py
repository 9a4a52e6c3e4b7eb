"""A drop-in replacement for `jax.nn.dot_product_attention`, computed by `attend`."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array

from seqattn.attention import attend
from seqattn.checks import check_integer
from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Visible, check_arrays, check_pairs
from seqattn.mask import Mask
from seqattn.masks import Causal, NotPadding, SlidingWindow
from seqattn.sizes import Size


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = ...,
    mask: Array | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: Array | None = ...,
    key_value_seq_lengths: Array | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: str | Sequence[str] | None = ...,
    return_residual: Literal[False] = ...,
) -> Array: ...
@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = ...,
    mask: Array | None = ...,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: Array | None = ...,
    key_value_seq_lengths: Array | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: str | Sequence[str] | None = ...,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Array | tuple[Array, Array]:
    """A drop-in replacement for `jax.nn.dot_product_attention`, computed by `attend`.

    Some calls return wrong numbers silently in `jax.nn`. This function raises instead (an integer query, a 3-D mask
    with 4-D inputs, a negative window) or follows the contract of `attend` (zeros for a fully masked row, no effect of
    a masked NaN, a differentiable float32 log-sum-exp).

    Args:
        query: `[B, T, N, H]` or `[T, N, H]`, floating.
        key: `[B, S, K, H]` or `[S, K, H]`. N must be a multiple of K.
        value: `[B, S, K, H]` or `[S, K, H]`.
        bias: broadcasts to `[B, N, T, S]`, or to `[N, T, S]` for inputs of 3 dims. If it has fewer dims, those before
            `[T, S]` must be 1, because `[3, T, S]` with 4-D inputs could mean 3 rows or 3 heads.
        mask: boolean, True where a query may attend; shapes as for `bias`.
        scale: multiplies the products. Defaults to `1 / sqrt(H)`.
        is_causal: If True, query i sees keys 0 to i, aligned at the first token even if T differs from S.
        query_seq_lengths: integers `[B]`. Queries from this index on are padding and give zeros.
        key_value_seq_lengths: integers `[B]`. Keys from this index on are padding.
        local_window_size: `(left, right)`, the number of visible keys on each side of the query, or one number for
            both.
        implementation: as in `attend`.
        return_residual: If True, also returns the log-sum-exp `[B, T, N]`.

    Returns:
        The output, of the shape of the query; with `return_residual` a pair of output and log-sum-exp.

    Raises:
        TypeError: dtypes differ or are not floating, the mask is not boolean, or lengths are not integers.
        ValueError: shapes do not fit, or a window is negative.
        NotImplementedError: no candidate implementation can serve the call.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    check_arrays(query, key, value)
    bias, mask = (x if x is None else _of_call(query.ndim, jnp.asarray(x)) for x in (bias, mask))
    batch, length, size = query.shape[:-3], query.shape[-3], key.shape[-3]
    q_at = _rows("query_seq_lengths", query_seq_lengths, batch, length)
    kv_at = _rows("key_value_seq_lengths", key_value_seq_lengths, batch, size)
    parts: list[Mask] = [Causal()] if is_causal else []
    if local_window_size is not None:
        parts.append(_window(local_window_size))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        parts.append(NotPadding())
    if mask is not None and parts:
        check_pairs("mask", mask, batch, (query.shape[-2], length, size))
        if mask.ndim > 2 and mask.shape[-3:-1] == (1, 1):
            # A mask that hides the same keys from every query of a row is padding: kernels need no dense mask for it.
            kv_at, mask = _padded(kv_at, mask[..., 0, 0, :], batch), None
            parts.append(NotPadding())
    combined = _all(parts)
    visible: Visible = mask if combined is None else combined
    if mask is not None and combined is not None:
        rest = jnp.expand_dims(combined.dense(q_at, kv_at), -3)
        visible = mask & _of_rank(query.ndim, rest)
    located = isinstance(visible, Mask)
    options: dict[str, Any] = {"q_at": q_at, "kv_at": kv_at} if located else {}
    options |= {"mask": visible, "bias": bias, "scale": scale, "implementation": implementation}
    if return_residual:
        return attend(query, key, value, **options, return_lse=True)
    return attend(query, key, value, **options)


def _all(masks: list[Mask]) -> Mask | None:
    """Returns the conjunction of the masks, or None if there is none."""
    combined: Mask | None = None
    for mask in masks:
        combined = mask if combined is None else combined & mask
    return combined


def _of_rank(rank: int, x: Array) -> Array:
    """Returns `x` with leading dims of size 1, so that it has `rank` dims."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _of_call(rank: int, pairs: Array) -> Array:
    """Returns a mask or bias with leading dims of size 1 added, if only one reading of its shape is possible."""
    return _of_rank(rank, pairs) if pairs.ndim < rank and all(n == 1 for n in pairs.shape[:-2]) else pairs


def _padded(at: Coordinates, present: Array, batch: tuple[Size, ...]) -> Coordinates:
    """Returns the coordinates with padding where `present`, `[*batch or 1, length]`, is False."""
    shape = (*batch, at.shape[-1])
    position, segment, present = (
        jnp.broadcast_to(_of_rank(len(shape), jnp.asarray(x)), shape) for x in (at.position, at.segment, present)
    )
    return Coordinates(position, jnp.where(present, segment, 0))


def _window(size: int | tuple[int, int]) -> SlidingWindow:
    """Returns the sliding window of jax.nn, which does not count the query's own position."""
    left, right = (size, size) if isinstance(size, int) else size
    check_integer("local_window_size to the left", left, 0)
    check_integer("local_window_size to the right", right, 0)
    return SlidingWindow(left + 1, ahead=right)


def _rows(name: str, lengths: Array | None, batch: tuple[Size, ...], length: Size) -> Coordinates:
    """Returns the coordinates of rows with these lengths, or of one unpadded text if there are none."""
    if lengths is None:
        return Coordinates.range(length)
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape not in (batch, batch or (1,)):
        raise ValueError(f"{name} {lengths.shape} must have one length for each row of the batch {batch}")
    return Coordinates.from_lengths(lengths.reshape(batch), length)

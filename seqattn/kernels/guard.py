"""Our contract around a vendor's kernel, which keeps it not on its own.

There a NaN in a masked value leaks, and an empty row is the mean of all values. So keys and values that are not finite
are computed with as 0, the rows that see one are marked afterwards, and empty rows are cleared. Its log-sum-exp has no
gradient, and that of `jax.nn` the dtype of the keys: ours is computed beside the output, by another kernel; where
nobody uses it, `jax.jit` removes it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from seqattn.kernels.call import Call
from seqattn.kernels.native import Native
from seqattn.precision import accumulator, lowest


def refuse_modified(call: Call) -> None:
    """Raises NotImplementedError for what no vendor has: score modifications, and dropout that can be repeated."""
    if call.score_mod is not None:
        kind = type(call.score_mod).__name__
        raise NotImplementedError(f"no score modification ({kind}); chunked and reference have it")
    if call.dropout is not None and call.dropout.rate != 0:
        raise NotImplementedError("no dropout that other implementations can repeat; chunked and reference have it")


def refuse_other_values(call: Call) -> None:
    """Raises NotImplementedError where values have another size than keys."""
    if call.value.shape[-1] != call.query.shape[-1]:
        raise NotImplementedError(f"V ({call.value.shape[-1]}) must be the head dim H ({call.query.shape[-1]})")


def refuse_platform(what: str, wanted: str, call: Call) -> None:
    """Raises NotImplementedError for a call that is known to run elsewhere."""
    if call.platform not in (wanted, None):
        raise NotImplementedError(f"{what} runs on a {wanted}, and this is a {call.platform}")


def lse_note(call: Call) -> str:
    """For `explain`: what the log-sum-exp and a bias cost."""
    dense = "" if call.bias is None else "the bias is dense and nothing is skipped; "
    return f"{dense}the log-sum-exp, where it is used, costs a pass of chunked"


@contextlib.contextmanager
def relaxed(dtype: np.dtype) -> Iterator[None]:
    """The promotions that code inside JAX relies on, and the products of float32 in the full precision we promise."""
    precision = "highest" if dtype == jnp.float32 else None
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(precision),
    ):
        yield


def jax_nn(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """`jax.nn.dot_product_attention`."""
    with relaxed(query.dtype):
        return jax.nn.dot_product_attention(query, key, value, **options)


def guarded(
    compute: Callable[[Array, Array, Array], tuple[Array, Array]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    pairs: Native | Bool[Array, "..."],
    zeroed: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """`compute` on what is finite; the rows that see what is not are NaN, and those that see nothing are empty."""
    length, size, num_heads = query.shape[1], key.shape[1], query.shape[2]
    bad = _not_finite(key) | _not_finite(value)
    if isinstance(pairs, Native):
        whole, empty, sees = pairs.is_whole(length, size), None, bad.any(axis=1, keepdims=True)
        if not whole:
            first, last = pairs.ends(length, size)
            empty = (first == last)[..., None] if (first == last).any() else None
            sees = _sees_between(bad, first, last)
        sees = jnp.repeat(sees, num_heads // key.shape[2], axis=2)
    else:
        whole, column = False, jnp.repeat(bad, num_heads // key.shape[2], axis=2).transpose(0, 2, 1)[:, :, None]
        empty = ~pairs.any(axis=-1).swapaxes(1, 2)
        sees = (pairs & column).any(axis=-1).swapaxes(1, 2)
    high = accumulator(query.dtype)
    if whole:
        # Every row of a head is NaN, or none: nothing is to be kept from it, and queries are marked at no cost.
        return compute(query + jnp.where(sees, jnp.nan, 0.0)[..., None].astype(query.dtype), key, value)
    key, value = (zeroed or _zeroed)(bad, key, value)
    # A query of -inf would see what is hidden: all its visible scores are lower than what vendors hide with.
    lost = _not_finite(query)
    mark = jnp.where(sees | lost, jnp.nan, 0.0).astype(high)
    cleared = lost if empty is None else lost | empty
    query = jnp.where(cleared[..., None], jnp.zeros_like(query), query)
    output, lse = compute(query, key, value)
    output, lse = output + mark[..., None].astype(output.dtype), lse + mark
    if empty is None:
        return output, lse
    return jnp.where(empty[..., None], jnp.zeros_like(output), output), jnp.where(empty, lowest(lse.dtype), lse)


def _zeroed(bad: Bool[Array, "B S K"], key: Array, value: Array) -> tuple[Array, Array]:
    """Keys and values with zeros where `bad`."""
    key, value = (jnp.where(bad[..., None], jnp.zeros_like(x), x) for x in (key, value))
    return key, value


@jax.jit  # compiled once where a call is not; a `cond` would be compiled at each one
def zeroed_if_any(bad: Bool[Array, "B S K"], key: Array, value: Array) -> tuple[Array, Array]:
    """As `_zeroed`. On the CPU the choice takes a quarter of its time; a GPU would have to wait for it."""
    return jax.lax.cond(bad.any(), _zeroed, lambda bad, key, value: (key, value), bad, key, value)


def _not_finite(x: Float[Array, "B S K D"]) -> Bool[Array, "B S K"]:
    """Which vectors hold what is not finite: only then is their product with zeros NaN.

    On the CPU a product takes a quarter of the time of a sum. The barrier keeps it from being found to be 0.
    """
    zeros = jax.lax.optimization_barrier(jnp.zeros(x.shape[-1:], x.dtype))
    return jnp.isnan(jnp.einsum("bskd,d->bsk", jax.lax.stop_gradient(x), zeros))


def _sees_between(bad: Bool[Array, "B S K"], first: np.ndarray, last: np.ndarray) -> Bool[Array, "B T K"]:
    """Whether one of the keys from `first` to before `last` is bad, for each query."""
    count = jnp.cumsum(bad, axis=1, dtype=jnp.int32)
    count = jnp.concatenate([jnp.zeros_like(count[:, :1]), count], axis=1)
    if first.shape[0] == last.shape[0] == 1:
        return count[:, last[0]] > count[:, first[0]]
    at = functools.partial(jnp.take_along_axis, count, axis=1)
    return at(jnp.asarray(last)[..., None]) > at(jnp.asarray(first)[..., None])

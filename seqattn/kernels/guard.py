"""Keeps seqattn's contract around a vendor's kernel.

In a vendor's kernel a NaN in a masked value leaks, and a fully masked row is the mean of all values. So non-finite keys
and values are replaced by 0, the rows that see one are marked with NaN afterwards, and fully masked rows are cleared. A
vendor's log-sum-exp has no gradient, and that of `jax.nn` has the dtype of the keys. Another kernel therefore computes
the log-sum-exp; `jax.jit` removes it if it is not used.
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
from seqattn.kernels.mesh_axes import mesh_axes
from seqattn.kernels.native import Native
from seqattn.precision import accumulator, lowest


def refuse_unsupported(call: Call) -> None:
    """Raises NotImplementedError for what vendors lack: score modifications, dropout and keys of another dtype."""
    if call.key.dtype != call.query.dtype:
        # A cache may hold its keys in another dtype than the queries have.
        raise NotImplementedError(
            f"keys are {call.key.dtype} and queries {call.query.dtype}; cast one of them, or name chunked or cached"
        )
    if call.score_mod is not None:
        kind = type(call.score_mod).__name__
        raise NotImplementedError(f"no score modification ({kind}); chunked and reference have it")
    if call.dropout is not None and call.dropout.rate != 0:
        raise NotImplementedError("no dropout that other implementations can repeat; chunked and reference have it")


def refuse_other_values(call: Call) -> None:
    """Raises NotImplementedError if values and keys differ in their last dim."""
    if call.value.shape[-1] != call.query.shape[-1]:
        raise NotImplementedError(f"V ({call.value.shape[-1]}) must be the head dim H ({call.query.shape[-1]})")


def refuse_platform(what: str, wanted: str, call: Call) -> None:
    """Raises NotImplementedError if the call is known to run on another platform."""
    if call.platform not in (wanted, None):
        raise NotImplementedError(f"{what} runs on a {wanted}, and this is a {call.platform}")


def refuse_wide_integers(what: str) -> None:
    """Raises NotImplementedError where JAX counts in 64 bits, which kernels for devices do not."""
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        raise NotImplementedError(f"{what} counts in 32 bits, and jax_enable_x64 is on")


def refuse_mesh_axes(what: str, tree: Any) -> None:
    """Raises NotImplementedError if an array varies over a mesh axis of a surrounding `jax.shard_map`."""
    if axes := mesh_axes(tree):
        along = ", ".join(sorted(map(str, axes)))
        raise NotImplementedError(f"{what} does not declare to jax.shard_map that it varies over {along}")


def refuse_assembler() -> None:
    """Raises NotImplementedError if the CUDA of this machine miscompiles kernels in Pallas Mosaic GPU."""
    from jax._src.lib import cuda_versions

    version = 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    # JAX's own attention in Mosaic GPU refuses masks there: the assembler miscompiles them.
    if 12080 <= version < 12091:
        raise NotImplementedError(f"the assembler of CUDA 12.8.0 to 12.9.0 miscompiles masks, and this is {version}")


def lse_note(call: Call) -> str:
    """Returns the note for `explain` on the cost of the log-sum-exp and of a bias."""
    dense = "" if call.bias is None else "the bias is dense, so no tile is skipped; "
    return f"{dense}the log-sum-exp, if used, costs a pass of chunked"


@contextlib.contextmanager
def relaxed(dtype: np.dtype) -> Iterator[None]:
    """Allows the dtype promotions that code inside JAX relies on, and computes float32 products in full precision."""
    precision = "highest" if dtype == jnp.float32 else None
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(precision),
    ):
        yield


def jax_nn(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """Calls `jax.nn.dot_product_attention`."""
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
    """Runs `compute` on finite inputs, sets rows that see non-finite keys to NaN and clears fully masked rows.

    Args:
        compute: the vendor's kernel, from query, key and value to output and log-sum-exp.
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, V]`.
        pairs: the visible pairs, as a `Native` or a boolean array.
        zeroed: replaces bad keys and values by zeros. Defaults to `_zeroed`.

    Returns:
        The output and the log-sum-exp.
    """
    length, size, num_heads = query.shape[1], key.shape[1], query.shape[2]
    bad = _not_finite(key) | _not_finite(value)
    if isinstance(pairs, Native):
        whole, empty, sees = pairs.is_whole(length, size), None, bad.any(axis=1, keepdims=True)
        # The visible keys of a query are one run, so a prefix sum over the bad keys answers for each query in O(1),
        # without a `[T, S]` array.
        if not whole:
            first, last = pairs.ends(length, size)
            empty = (first == last)[..., None] if (first == last).any() else None
            sees = _sees_between(bad, first, last)
        sees = jnp.repeat(sees, num_heads // key.shape[2], axis=2)
    else:
        # A dense array of pairs: the row sees a bad key if any visible pair holds one.
        whole, column = False, jnp.repeat(bad, num_heads // key.shape[2], axis=2).transpose(0, 2, 1)[:, :, None]
        empty = ~pairs.any(axis=-1).swapaxes(1, 2)
        sees = (pairs & column).any(axis=-1).swapaxes(1, 2)
    high = accumulator(query.dtype)
    if whole:
        # Every query sees every key: either all rows of a head are NaN or none is. NaN queries achieve that, and no key
        # or value has to be cleared.
        return compute(query + jnp.where(sees, jnp.nan, 0.0)[..., None].astype(query.dtype), key, value)
    key, value = (zeroed or _zeroed)(bad, key, value)
    # A query with infinite entries could score lower than the finite number with which vendors mask, and so attend to
    # masked keys. It is replaced by 0 and its row marked.
    lost = _not_finite(query)
    mark = jnp.where(sees | lost, jnp.nan, 0.0).astype(high)
    cleared = lost if empty is None else lost | empty
    # Fully masked rows are computed on zeros, so that their gradients are finite before they are cleared.
    query = jnp.where(cleared[..., None], jnp.zeros_like(query), query)
    output, lse = compute(query, key, value)
    # The contract makes the whole row NaN: its output and its log-sum-exp.
    output, lse = output + mark[..., None].astype(output.dtype), lse + mark
    if empty is None:
        return output, lse
    return jnp.where(empty[..., None], jnp.zeros_like(output), output), jnp.where(empty, lowest(lse.dtype), lse)


def _zeroed(bad: Bool[Array, "B S K"], key: Array, value: Array) -> tuple[Array, Array]:
    """Returns keys and values with zeros where `bad`."""
    key, value = (jnp.where(bad[..., None], jnp.zeros_like(x), x) for x in (key, value))
    return key, value


@jax.jit  # outside `jit`, JAX would compile the `cond` at each call
def zeroed_if_any(bad: Bool[Array, "B S K"], key: Array, value: Array) -> tuple[Array, Array]:
    """Like `_zeroed`, but copies only if there is a bad key.

    On the CPU the test takes a quarter of the time of the copy. On a GPU the branch has to wait for its result (not
    measured).
    """
    return jax.lax.cond(bad.any(), _zeroed, lambda bad, key, value: (key, value), bad, key, value)


def _not_finite(x: Float[Array, "B S K D"]) -> Bool[Array, "B S K"]:
    """Returns which vectors are not finite: only then is their product with zeros NaN.

    On the CPU a product takes a quarter of the time of a sum.
    """
    # The barrier keeps XLA from simplifying the product with zeros to 0.
    zeros = jax.lax.optimization_barrier(jnp.zeros(x.shape[-1:], x.dtype))
    return jnp.isnan(jnp.einsum("bskd,d->bsk", jax.lax.stop_gradient(x), zeros))


def _sees_between(bad: Bool[Array, "B S K"], first: np.ndarray, last: np.ndarray) -> Bool[Array, "B T K"]:
    """Returns whether any key from `first` up to `last` (exclusive) is bad, for each query."""
    count = jnp.cumsum(bad, axis=1, dtype=jnp.int32)
    count = jnp.concatenate([jnp.zeros_like(count[:, :1]), count], axis=1)
    # All rows share one window: static indices compile to a slice instead of a gather.
    if first.shape[0] == last.shape[0] == 1:
        return count[:, last[0]] > count[:, first[0]]
    at = functools.partial(jnp.take_along_axis, count, axis=1)
    return at(jnp.asarray(last)[..., None]) > at(jnp.asarray(first)[..., None])

"""Attention as JAX itself offers it: `jax.nn` on XLA and on cuDNN, and the splash kernel for TPUs, with our contract.

`xla` takes any mask, as it keeps every score anyway. `cudnn` and `splash` take what they know natively, a band along
the diagonal and lengths (`Native`), and refuse the rest: a dense mask would cost them what they are there for.

None of them keeps the contract of `reference` on its own: a NaN in a masked value leaks, and an empty row is the mean
of all values. So keys and values that are not finite are computed with as 0, the rows that see one are marked
afterwards, and empty rows are cleared (`_guarded`). Their log-sum-exp has no gradient, and that of jax.nn the dtype of
the keys. Ours is computed beside the output, by another implementation; where nobody uses it, `jax.jit` removes it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqattn.coordinates import Coordinates
from seqattn.kernels import chunked, reference
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.masks import And, Causal, Mask, NotPadding, SameSegment, SlidingWindow
from seqattn.precision import accumulator, lowest
from seqattn.sizes import Size

# jax.nn hides a score by putting -0.7 times the largest float32 in its place.
_ABOVE_HIDDEN = np.float32(-0.5 * np.finfo(np.float32).max)
_SPLASH_BLOCK = 128
_CUDNN_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Native:
    """A mask in the words that vendors know: query i sees key j where `-right <= i - j <= left` and both are tokens.

    Attributes:
        left: how many keys before its own index a query sees; None for all.
        right: how many keys after its own index a query sees; None for all.
        query_lengths: `[B or 1]`, queries from this index on are padding; None where there is none.
        key_lengths: `[B or 1]`, likewise for keys.
    """

    left: int | None = None
    right: int | None = None
    query_lengths: Int[np.ndarray, " rows"] | None = None
    key_lengths: Int[np.ndarray, " rows"] | None = None

    @staticmethod
    def of(mask: Mask | None, q_at: Coordinates, kv_at: Coordinates) -> "Native":
        """The same pairs as `mask` allows; NotImplementedError names the part that has no such form.

        >>> at = Coordinates(np.arange(5)[None], np.ones((1, 5), int))
        >>> Native.of(Causal() & SlidingWindow(3), at, at)
        Native(left=2, right=0, query_lengths=None, key_lengths=None)
        """
        if mask is None:
            return Native()
        length, size = q_at.shape[-1], kv_at.shape[-1]
        refuse_unknown("a window", (length, size))
        left, right, native = length, size, Native()
        for part in _parts(mask):
            if isinstance(part, Causal | SlidingWindow):
                behind = _behind(part, q_at, kv_at)
                if isinstance(part, SlidingWindow):
                    left, right = min(left, part.size - 1 - behind), min(right, part.ahead + behind)
                else:
                    right = min(right, behind)
            elif isinstance(part, NotPadding | SameSegment):
                lengths = _lengths(part, q_at, kv_at)
                native = dataclasses.replace(native, query_lengths=lengths[0], key_lengths=lengths[1])
            else:
                raise NotImplementedError(f"{type(part).__name__} is no causal mask, left window or length")
        if left < 0 or right < 0:
            raise NotImplementedError("the window ends before the diagonal: queries and keys do not start together")
        return dataclasses.replace(
            native, left=None if left >= length - 1 else left, right=None if right >= size - 1 else right
        )

    def is_whole(self, length: Size, size: Size) -> bool:
        """Whether every query sees every key; without a window and lengths the numbers of both may be unknown."""
        if all(x is None for x in (self.left, self.right, self.query_lengths, self.key_lengths)):
            return True
        first, last = self.ends(length, size)
        return not first.any() and bool((last == size).all())

    def ends(self, length: int, size: int) -> tuple[Int[np.ndarray, "rows T"], Int[np.ndarray, "rows T"]]:
        """The first key that each query sees, and the one after the last; equal where it sees none."""
        query = np.arange(length)[None]
        key_lengths = np.asarray([size]) if self.key_lengths is None else self.key_lengths
        last = key_lengths[:, None] if self.right is None else np.minimum(query + self.right + 1, key_lengths[:, None])
        if self.query_lengths is not None:
            last = np.where(query < self.query_lengths[:, None], last, 0)
        last = np.broadcast_to(last, (last.shape[0], length))
        return np.minimum(0 if self.left is None else np.maximum(query - self.left, 0), last), last


def xla(call: Call) -> Result:
    """`jax.nn.dot_product_attention` as XLA compiles it, with every score in memory; see `reference.attend`."""
    _refuse_modified(call)
    _refuse_other_values(call)
    if call.query.dtype == jnp.float64:
        raise NotImplementedError("jax.nn computes the softmax of float64 in float32; reference and chunked do not")
    if call.is_empty:
        return call.nothing()
    pairs = _pairs(call)
    # jax.nn asks for products of 16 bits that a CPU does not have, and that no TPU has in float16.
    here = platform(call.query)
    lacking = here == "cpu" or (here != "gpu" and call.query.dtype == jnp.float16)
    computed = call.high if lacking else call.query.dtype
    options: dict[str, Any] = {"implementation": "xla", "scale": call.scale}
    if isinstance(pairs, Native):
        options |= _window(pairs, call.query, call.key) | _native_lengths(pairs, call.query.shape[0])
    else:
        options |= {"mask": pairs, "bias": None if call.bias is None else _above_hidden(call.bias)}

    def compute(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        _, lse = reference.softmax(*reference.logits(dataclasses.replace(call, query=query, key=key)))
        wide = (x.astype(computed) for x in (query, key, value))
        return _jax_nn(*wide, **options).astype(query.dtype), lse.swapaxes(1, 2)

    return _guarded(compute, call.query, call.key, call.value, pairs, _zeroed_if_any)


def cudnn(call: Call) -> Result:
    """cuDNN's fused attention through `jax.nn`; see `reference.attend`. The log-sum-exp is that of `chunked`."""
    _refuse_platform("cuDNN", "gpu", call.query)
    refuse_unknown("cuDNN", call.query.shape, call.key.shape)
    _refuse_modified(call)
    _refuse_other_values(call)
    native = _cudnn_native(call)
    if call.is_empty:
        return call.nothing()
    options: dict[str, Any] = {"implementation": "cudnn", "scale": float(call.scale)} | _cudnn_window(native)
    options |= _native_lengths(native, call.query.shape[0])
    if call.bias is not None:
        options["bias"] = jnp.where(call.bias == -jnp.inf, _cudnn_hidden(call.bias.dtype), call.bias)

    def compute(clean_query: Array, clean_key: Array, clean_value: Array) -> tuple[Array, Array]:
        try:
            output = _jax_nn(clean_query, clean_key, clean_value, **options)
        except RuntimeError as reason:
            if isinstance(reason, NotImplementedError):
                raise
            raise NotImplementedError(str(reason)) from reason
        return output, chunked.attend(call)[1]

    pairs = native if call.bias is None else _pairs(call)
    return _guarded(compute, call.query, call.key, call.value, pairs)


def splash(call: Call) -> Result:
    """JAX's splash attention for TPUs; see `reference.attend`. The log-sum-exp is that of `chunked`."""
    _refuse_platform("splash attention", "tpu", call.query)
    refuse_unknown("splash attention", call.query.shape, call.key.shape)
    _refuse_modified(call)
    if call.bias is not None:
        raise NotImplementedError("splash attention takes no bias")
    if call.query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"splash attention takes float32 and bfloat16, not {call.query.dtype}")
    length, size = call.query.shape[1], call.key.shape[1]
    if length % _SPLASH_BLOCK or size % _SPLASH_BLOCK:
        raise NotImplementedError(f"T ({length}) and S ({size}) must be multiples of {_SPLASH_BLOCK}")
    native = _native(call)
    if native.query_lengths is not None or native.key_lengths is not None:
        raise NotImplementedError("padding is no part of a static mask")
    if call.is_empty:
        return call.nothing()

    def compute(clean_query: Array, clean_key: Array, clean_value: Array) -> tuple[Array, Array]:
        scaled = (clean_query * jnp.asarray(call.scale, call.high)).astype(clean_query.dtype)
        output = splash_output(scaled, clean_key, clean_value, native)
        return output, chunked.attend(call)[1]

    return _guarded(compute, call.query, call.key, call.value, native)


def splash_output(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    native: Native,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """The splash kernel on scaled queries; `interpret` runs it without a TPU."""
    # Here, as whoever needs no TPU need not wait for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    shape = (query.shape[1], key.shape[1])
    mask: splash_attention_mask.Mask
    if native.left is not None:
        mask = splash_attention_mask.LocalMask(shape, (native.left, native.right), offset=0)
    elif native.right is not None:
        mask = splash_attention_mask.CausalMask(shape, offset=native.right)
    else:
        mask = splash_attention_mask.FullMask(shape)
    heads = splash_attention_mask.MultiHeadMask([mask] * query.shape[2])
    with _relaxed(query.dtype):
        kernel = splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, interpret=interpret)
        by_head = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.vmap(kernel)(*by_head).swapaxes(1, 2)


def xla_note(call: Call) -> str:
    """For `explain`: what becomes of the mask."""
    if isinstance(_pairs(call), Native):
        return "computes every pair and keeps its score"
    return "computes every pair and keeps its score: the mask becomes a dense array"


def lse_note(call: Call) -> str:
    """For `explain`: what the log-sum-exp and a bias cost."""
    dense = "" if call.bias is None else "the bias is dense and nothing is skipped; "
    return f"{dense}the log-sum-exp, where it is used, costs a pass of chunked"


def platform(query: Array | jax.ShapeDtypeStruct) -> str:
    """Where a call will run: where the query lies, or JAX's default where it is traced."""
    if isinstance(query, jax.core.Tracer) or not isinstance(query, jax.Array):
        return jax.default_backend()
    return next(iter(query.devices())).platform


def _refuse_platform(what: str, wanted: str, query: Array) -> None:
    if (here := platform(query)) != wanted:
        raise NotImplementedError(f"{what} runs on a {wanted}, and this is a {here}")


def _refuse_modified(call: Call) -> None:
    if call.score_mod is not None:
        kind = type(call.score_mod).__name__
        raise NotImplementedError(f"no score modification ({kind}); chunked and reference have it")
    if call.dropout is not None and call.dropout.rate != 0:
        raise NotImplementedError("no dropout that other implementations can repeat; chunked and reference have it")


def _refuse_other_values(call: Call) -> None:
    if call.value.shape[-1] != call.query.shape[-1]:
        raise NotImplementedError(f"V ({call.value.shape[-1]}) must be the head dim H ({call.query.shape[-1]})")


def _parts(mask: Mask) -> list[Mask]:
    """The masks that must all allow a pair."""
    return [*_parts(mask.first), *_parts(mask.second)] if isinstance(mask, And) else [mask]


def _known(part: Mask, *fields: Array | np.ndarray) -> None:
    if not all(isinstance(x, np.ndarray) for x in fields):
        raise NotImplementedError(f"the coordinates that {type(part).__name__} reads are not known at trace time")


def _behind(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> int:
    """How far the first key is behind the first query, where both are runs of consecutive positions."""
    query, key = q_at.position, kv_at.position
    _known(part, query, key)
    runs = all(np.array_equal(x, x[:, :1] + np.arange(x.shape[1])) for x in (query, key))
    behind = np.unique(query[:, :1] - key[:, :1]) if query.size and key.size else np.zeros(1, int)
    if not runs or behind.size != 1:
        raise NotImplementedError(f"{type(part).__name__} over positions that do not count up alike in every row")
    return int(behind[0])


def _lengths(part: Mask, q_at: Coordinates, kv_at: Coordinates) -> tuple[np.ndarray | None, np.ndarray | None]:
    """How many tokens each row starts with, queries and keys; None where no row is padded."""
    _known(part, q_at.segment, kv_at.segment)
    query, key = np.asarray(q_at.segment), np.asarray(kv_at.segment)
    if isinstance(part, SameSegment):
        texts = (np.unique(np.concatenate([q, k])) for q, k in _rows(query, key))
        if any((text != 0).sum() > 1 for text in texts):
            raise NotImplementedError("SameSegment with more than one text in a row")
    lengths = []
    for present in (query != 0, key != 0):
        count = present.sum(axis=1)
        if not np.array_equal(present, np.arange(present.shape[1])[None] < count[:, None]):
            raise NotImplementedError(f"{type(part).__name__} with padding before a token")
        lengths.append(None if present.all() else count.astype(np.int32))
    return lengths[0], lengths[1]


def _rows(query: np.ndarray, key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    count = max(query.shape[0], key.shape[0]) if query.shape[0] and key.shape[0] else 0
    return zip(*(np.broadcast_to(x, (count, x.shape[1])) for x in (query, key)), strict=True)


def _native(call: Call) -> Native:
    if call.mask is not None and not isinstance(call.mask, Mask):
        raise NotImplementedError("a boolean array would become a dense bias: nothing would be skipped")
    return Native.of(call.mask, call.q_at, call.kv_at)


def _pairs(call: Call) -> Native | Bool[Array, "..."]:
    """Who may attend: natively where that is possible, else a dense array `[B or 1, N or 1, T or 1, S or 1]`."""
    if call.bias is None:  # one of -inf would mask
        with contextlib.suppress(NotImplementedError):
            return _native(call)
    visible = reference.visibility(call.query.shape, call.mask, call.bias, call.q_at, call.kv_at)
    assert visible is not None
    return visible


def _window(native: Native, query: Array, key: Array) -> dict[str, Any]:
    if native.left is None and native.right is None:
        return {}
    if native.left is None and native.right == 0:
        return {"is_causal": True}
    left = query.shape[1] if native.left is None else native.left
    return {"local_window_size": (left, key.shape[1] if native.right is None else native.right)}


def _native_lengths(native: Native, batch: Size) -> dict[str, Any]:
    lengths = {"query_seq_lengths": native.query_lengths, "key_value_seq_lengths": native.key_lengths}
    return {name: jnp.broadcast_to(x.astype(np.int32), (batch,)) for name, x in lengths.items() if x is not None}


def _above_hidden(bias: Array) -> Array:
    """The bias in float32 with its own gradient, and nowhere so low that jax.nn would prefer what it hides."""
    bias = bias.astype(jnp.float32)
    shown = jnp.where(bias == -jnp.inf, jnp.zeros_like(bias), bias)
    return shown + jax.lax.stop_gradient(jnp.maximum(shown, _ABOVE_HIDDEN) - shown)


def _cudnn_hidden(dtype: np.dtype) -> Array:
    """What jax.nn hides a score with on cuDNN, which cannot subtract infinities."""
    return jnp.asarray(-(2.0**41) if dtype == jnp.bfloat16 else -(2.0**15), dtype)


def _cudnn_native(call: Call) -> Native:
    """The mask for cuDNN; NotImplementedError for all that it would refuse, in the backward pass too, or get wrong."""
    query, scale, bias = call.query, call.scale, call.bias
    (length, _, head_dim), size = query.shape[1:], call.key.shape[1]
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise NotImplementedError(f"cuDNN takes float16 and bfloat16, not {query.dtype}")
    if head_dim % 8 or head_dim > _CUDNN_HEAD_DIM:
        raise NotImplementedError(f"head_dim ({head_dim}) must be a multiple of 8 and at most {_CUDNN_HEAD_DIM}")
    if not isinstance(scale, int | float | np.number):
        raise NotImplementedError("cuDNN needs a scale that is known at trace time")
    native = _native(call)
    if native.right not in (0, None):
        raise NotImplementedError(f"cuDNN knows no window of {native.right} keys ahead of the query's own index")
    if native.left is not None and (native.right is None or length > size or bias is not None):
        raise NotImplementedError("cuDNN knows a window of earlier keys only where causal, T <= S and without a bias")
    lengths = [x for x in (native.query_lengths, native.key_lengths) if x is not None]
    if any((x == 0).any() for x in lengths):
        raise NotImplementedError("cuDNN is not asked for rows of length 0")
    if bias is not None:
        if bias.dtype != query.dtype:
            raise NotImplementedError(f"cuDNN needs a bias of the query's dtype {query.dtype}, got {bias.dtype}")
        if bias.shape[2:] != (length, size) or length % 2 or size % 2:
            raise NotImplementedError(
                f"cuDNN needs a bias [.., T, S] {(length, size)} with even T and S, got {bias.shape[2:]}"
            )
    return native


def _cudnn_window(native: Native) -> dict[str, Any]:
    window = {} if native.left is None else {"local_window_size": (native.left, 0)}
    return {"is_causal": native.right == 0} | window


@contextlib.contextmanager
def _relaxed(dtype: np.dtype) -> Iterator[None]:
    """The promotions that code inside JAX relies on, and the products of float32 in the full precision we promise."""
    precision = "highest" if dtype == jnp.float32 else None
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(precision),
    ):
        yield


def _jax_nn(query: Array, key: Array, value: Array, **options: Any) -> Array:
    with _relaxed(query.dtype):
        return jax.nn.dot_product_attention(query, key, value, **options)


def _guarded(
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
    mark = jnp.where(sees, jnp.nan, 0.0).astype(accumulator(query.dtype))
    if whole:
        # Every row of a head is NaN, or none: nothing is to be kept from it, and queries are marked at no cost.
        return compute(query + mark[..., None].astype(query.dtype), key, value)
    key, value = (zeroed or _zeroed)(bad, key, value)
    if empty is not None:
        query = jnp.where(empty[..., None], jnp.zeros_like(query), query)
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
def _zeroed_if_any(bad: Bool[Array, "B S K"], key: Array, value: Array) -> tuple[Array, Array]:
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

"""A checked call of attention, in the form that kernels take: exactly one batch dim."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout, check_dropout
from seqattn.kernels.block_mask import BlockMask, opened
from seqattn.mask import Mask
from seqattn.precision import accumulator, lowest
from seqattn.pytrees import pytree, static
from seqattn.score_mod import ScoreMod, ScoreModLike, for_kernel
from seqattn.sizes import Size

Visible = Mask | BlockMask | Array | None
"""The type of the argument `mask`."""

Shaped = Array | jax.ShapeDtypeStruct
"""An array, or its shape and dtype if nothing is computed."""


class Located(TypedDict):
    """Mask, bias and coordinates of a call, with one batch dim.

    `mask` is a `Mask`, None, or a boolean array `[B or 1, N or 1, T or 1, S or 1]`. `bias` is None or an array of that
    form. The coordinates are `[B or 1, T]` and `[B or 1, S]`.
    """

    mask: Mask | Array | None
    bias: Array | None
    q_at: Coordinates
    kv_at: Coordinates


@pytree
@dataclasses.dataclass(frozen=True)
class Columns:
    """Keys and values in the layout of a cache, so that a decoding step neither copies nor checks what it reads.

    Attributes:
        key: `[B, K, H, S]`, a column for each token, finite.
        value: `[B, K, S, V]`, finite.
        finite: `[B, S]` or `[B, K, S]`, False where key or value were not finite. Such entries are 0 in `key` and
            `value`.
    """

    key: Any
    value: Any
    finite: Any


@pytree
@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a device's share of a call begins in the whole call, so that dropout drops the same weights on any mesh.

    Attributes:
        batch: the index of its first batch row, an integer scalar.
        head: the index of its first query head.
        query: the index of its first query.
        key: the index of its first key.
        num_heads: N of the whole call; static.
        length: T of the whole call; static.
    """

    batch: Any
    head: Any
    query: Any
    key: Any
    num_heads: int = static()
    length: int = static()


@pytree
@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a kernel: checked, with exactly one batch dim. Created by `Call.of`.

    Attributes:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`.
        value: `[B, S, K, V]`.
        mask: a `Mask`, None, or a boolean array `[B or 1, N or 1, T or 1, S or 1]`.
        bias: None, or an array of the same form.
        score_mod: the prepared score modification, or None.
        rows: the rows of the score modification `[B, T, N, R]`, or None.
        q_at: coordinates `[B or 1, T]`.
        kv_at: coordinates `[B or 1, S]`.
        scale: a number or a scalar array.
        dropout: applied to the weights; or None.
        columns: keys and values in the layout of a cache; then `key` and `value` are None, and the dispatcher converts
            them to rows for a kernel that reads no columns.
        origin: where a device's share of a call begins in the whole call; or None.
        visits: the tiles that kernels visit, if they were found before, from this mask and these coordinates; or None.
        platform: "cpu", "gpu" or "tpu", for which the call is computed; None if the program may run on any.
    """

    query: Any
    key: Any
    value: Any
    mask: Any
    bias: Any
    score_mod: Any
    rows: Any
    q_at: Any
    kv_at: Any
    scale: Any
    dropout: Any
    columns: Any = None
    origin: Any = None
    visits: Any = None
    platform: Any = static(default=None)

    @staticmethod
    def of(
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: Visible,
        bias: Array | None,
        score_mod: ScoreModLike,
        q_at: Coordinates | None,
        kv_at: Coordinates | None,
        scale: float | Array | None,
        dropout: Dropout | None,
    ) -> "Call":
        """Returns the call of `seqattn.attend` with these arguments, and raises the same errors."""
        check_arrays(query, key, value)
        check_dropout(dropout)
        mod = None if score_mod is None else ScoreMod.of(score_mod)
        mask, q_at, kv_at, visits = opened(mask, q_at, kv_at)
        located = locate(query.shape, key.shape, mask, bias, q_at, kv_at, mod)
        # Kernels see one batch dim. A reshape of leading dims moves no data.
        query, key, value = (flatten(x, query.shape[:-3]) for x in (query, key, value))
        scale, rows = scale_of(scale, query.shape[-1]), None
        if mod is not None:
            # The rows are computed here, outside the kernel: once for each query and head, and JAX differentiates them
            # itself.
            mod, rows = for_kernel(mod, query, scale, located["q_at"], located["kv_at"])
        given = {"score_mod": mod, "rows": rows, "scale": scale, "dropout": dropout, "visits": visits}
        return Call(query, key, value, **located, **given)

    @staticmethod
    def of_columns(
        query: Array,
        columns: Columns,
        *,
        mask: Visible,
        score_mod: ScoreModLike,
        q_at: Coordinates | None,
        kv_at: Coordinates | None,
        dropout: Dropout | None,
        scale: float | Array | None = None,
    ) -> "Call":
        """Returns the call of queries `[B, T, N, H]` to keys and values in the layout of a cache.

        Raises the errors of `check_columns`, and those of `Call.of` for all other arguments.
        """
        check_columns(query, columns)
        check_dropout(dropout)
        mod = None if score_mod is None else ScoreMod.of(score_mod)
        size = columns.key.shape[3]
        located = locate(query.shape, (query.shape[0], size, 1, 1), mask, None, q_at, kv_at, mod)
        scale, rows = scale_of(scale, query.shape[-1]), None
        if mod is not None:
            mod, rows = for_kernel(mod, query, scale, located["q_at"], located["kv_at"])
        given = {"score_mod": mod, "rows": rows, "scale": scale, "dropout": dropout, "columns": columns}
        return Call(query, None, None, **located, **given)

    @property
    def is_empty(self) -> bool:
        """Whether there are no queries or no keys."""
        # Kernels take maxima over keys and cut tiles. Neither works with size 0.
        return 0 in (*self.query.shape, self.key.shape[1])

    @property
    def high(self) -> np.dtype:
        """The dtype of sums and exponentials."""
        return accumulator(self.query.dtype)

    def nothing(self) -> "Result":
        """Returns the result of an empty call: zeros, and the log-sum-exp of fully masked rows."""
        shape = self.query.shape[:3]
        output = jnp.zeros((*shape, self.value.shape[-1]), self.query.dtype)
        return output, jnp.full(shape, lowest(self.high), self.high)


Result = tuple[Array, Array]
"""The output `[B, T, N, V]` in the query's dtype, and the log-sum-exp `[B, T, N]`, float32 at least."""

Kernel = Callable[[Call], Result]
"""A function that computes a call. It raises NotImplementedError, with the reason, for a call that it cannot serve."""


def is_known(*shapes: tuple[Size, ...]) -> bool:
    """Returns whether all dims are numbers, and not symbolic dimensions of `jax.export`.

    A comparison with a symbolic dim is False or an error if it cannot be decided, so check this first.
    """
    return all(isinstance(n, int | np.integer) for shape in shapes for n in shape)


def refuse_unknown(what: str, *shapes: tuple[Size, ...]) -> None:
    """Raises NotImplementedError if a dim is symbolic."""
    if not is_known(*shapes):
        raise NotImplementedError(f"{what} needs all sizes as numbers, got {', '.join(map(str, shapes))}")


def flatten(x: Array, batch: tuple[Size, ...]) -> Array:
    """Reshapes `[*batch, ...]` to `[B, ...]`."""
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])


def infinite_where_empty(lse: Array) -> Array:
    """Replaces the lowest number, with which kernels mark fully masked rows, by -inf in a log-sum-exp."""
    # log(1) = 0 or log(0) = -inf is added. A `jnp.where` would hold an -inf even if no row is fully masked, and
    # `jax.debug_infs` would stop at it.
    return lse + jnp.log((lse != lowest(lse.dtype)).astype(lse.dtype))


def scale_of(scale: float | Array | None, head_dim: int) -> float | Array:
    """Returns the given scale. Defaults to `1 / sqrt(head_dim)` (Vaswani 2017, equation 1).

    Raises:
        TypeError: the scale is not a number.
        ValueError: the scale is not a scalar.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not isinstance(scale, int | float | np.number | np.ndarray | Array) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or a scalar array, got {scale!r}")
    if jnp.ndim(scale):
        raise ValueError(f"scale must be a scalar, got shape {jnp.shape(scale)}")
    return scale


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """Raises TypeError or ValueError unless query, key and value fit each other as `seqattn.attend` requires."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(f"{name} must be [*batch, length, heads, dim], got {x.shape}")
    check_dtypes(query=query, key=key, value=value)
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"batch dims must agree, got query {query.shape}, key {key.shape}, value {value.shape}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key {key.shape} and value {value.shape} must agree but for the last dim")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] < 1:
        raise ValueError(f"head_dim of query ({query.shape[-1]}) and key ({key.shape[-1]}) must be equal, at least 1")
    check_heads(query.shape[-2], key.shape[-2])


def check_columns(query: Array, columns: Columns) -> None:
    """Raises TypeError or ValueError unless queries `[B, T, N, H]` fit the arrays of a cache.

    The dtype of the cache may differ from that of the queries.
    """
    key, value, finite = columns.key, columns.value, columns.finite
    for name, x in (("query", query), ("columns.key", key), ("columns.value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dims, got {x.shape}")
        check_dtypes(**{name: x})
    if finite.dtype != jnp.bool_:
        raise TypeError(f"columns.finite must be boolean, got {finite.dtype}")
    (batch, _, num_heads, head_dim), (rows, num_kv_heads, key_dim, size) = query.shape, key.shape
    # A kernel that cuts tiles reads what the first sizes say: a larger array would go unread in silence.
    if rows != batch:
        raise ValueError(f"batch rows must agree, got query {query.shape} and columns.key {key.shape}")
    if key_dim != head_dim or head_dim < 1:
        raise ValueError(f"head_dim of query ({head_dim}) and columns.key ({key_dim}) must be equal, at least 1")
    if value.shape[:3] != (rows, num_kv_heads, size):
        raise ValueError(f"columns.value {value.shape} must be [B, K, S, V] for columns.key [B, K, H, S] {key.shape}")
    if finite.shape not in ((rows, size), (rows, num_kv_heads, size)):
        raise ValueError(f"columns.finite {finite.shape} must be [B, S] or [B, K, S] for columns.key {key.shape}")
    check_heads(num_heads, num_kv_heads)


def check_dtypes(**arrays: Array) -> None:
    """Raises TypeError unless the named arrays share one floating dtype."""
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {x.dtype}")
    if len({x.dtype for x in arrays.values()}) > 1:
        raise TypeError("dtypes must agree, got " + ", ".join(f"{name} {x.dtype}" for name, x in arrays.items()))


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless each key head serves a whole number of query heads."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")


def check_sinks(sinks: Array | None, query: Shaped) -> Array | None:
    """Returns the sinks as an array, or None.

    Raises:
        TypeError: the sinks are not floating.
        ValueError: their shape is not `[N]`.
    """
    if sinks is None:
        return None
    sinks = sinks if isinstance(sinks, jax.ShapeDtypeStruct) else jnp.asarray(sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must be floating, got {sinks.dtype}")
    if sinks.shape != query.shape[-2:-1]:
        raise ValueError(f"sinks {sinks.shape} must be [N], one logit for each head {query.shape[-2:-1]}")
    return sinks


def locate(
    query: tuple[Size, ...],
    key: tuple[Size, ...],
    mask: Visible,
    bias: Array | None,
    q_at: Coordinates | None,
    kv_at: Coordinates | None,
    score_mod: ScoreMod | None = None,
) -> Located:
    """Checks mask, bias and coordinates against the shapes of query and key, and returns them with one batch dim."""
    batch, pairs = query[:-3], (query[-2], query[-3], key[-3])
    # Before the coordinates are judged: they would be blamed for a mask that is none.
    if isinstance(mask, type):
        raise TypeError(f"mask must be an instance, not its class: write {mask.__name__}(...)")
    if isinstance(mask, BlockMask):
        raise TypeError("this function takes no BlockMask: give its mask, q_at and kv_at")
    if callable(mask) and not isinstance(mask, Mask):
        raise TypeError("mask must be a Mask or a boolean array, not a function: write MaskMod(fn)")
    # Coordinates that nothing reads are a mistake of the caller, such as a forgotten mask.
    matter = isinstance(mask, Mask) or (score_mod is not None and score_mod.uses_coordinates)
    if not matter and (q_at is not None or kv_at is not None):
        raise ValueError(
            "q_at and kv_at only matter to a Mask, such as SameSegment(), or to a ScoreMod, such as Alibi(); this call "
            "has neither"
        )
    if isinstance(mask, Mask):
        mask.check(math.prod(batch), pairs[0])
    if (q_at is None) != (kv_at is None):
        raise ValueError("give q_at and kv_at both or neither: their alignment would be a guess")
    # Libraries disagree on the alignment (top left or bottom right), so there is no default.
    if matter and q_at is None and pairs[1] != pairs[2]:
        raise ValueError(
            f"{pairs[1]} queries and {pairs[2]} keys: say how they align with q_at and kv_at, for example "
            f"q_at=Coordinates.range({pairs[1]}, start=...), kv_at=Coordinates.range({pairs[2]})"
        )
    return {
        "mask": mask if mask is None or isinstance(mask, Mask) else _visible_pairs(mask, batch, pairs),
        "bias": None if bias is None else _bias_pairs(bias, batch, pairs),
        "q_at": _coordinates("q_at", q_at, batch, pairs[1]),
        "kv_at": _coordinates("kv_at", kv_at, batch, pairs[2]),
    }


def _visible_pairs(mask: Array, batch: tuple[Size, ...], pairs: tuple[Size, Size, Size]) -> Array:
    """Checks a boolean mask and returns it with one batch dim."""
    mask = jnp.asarray(mask)
    check_pairs("mask", mask, batch, pairs)
    return _flatten_pairs(mask, batch)


def _bias_pairs(bias: Array, batch: tuple[Size, ...], pairs: tuple[Size, Size, Size]) -> Array:
    """Checks a bias and returns it with one batch dim."""
    bias = jnp.asarray(bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias must be floating (it is added to the logits), got {bias.dtype}")
    check_pairs("bias", bias, batch, pairs)
    return _flatten_pairs(bias, batch)


def check_pairs(name: str, x: Array, batch: tuple[Size, ...], pairs: tuple[Size, Size, Size]) -> None:
    """Raises TypeError or ValueError unless a mask or bias is `[T, S]`, or `[*batch, *pairs]` with any dim 1."""
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, True where a query may attend, got {x.dtype}; numbers are a bias")
    full = (*batch, *pairs)
    fits = x.ndim in (2, len(full)) and all(n in (1, m) for n, m in zip(x.shape, full[-x.ndim :], strict=True))
    if not fits:
        raise ValueError(f"{name} {x.shape} must be [T, S] {full[-2:]} or [*batch, N, T, S] {full}, any dim 1")


def _flatten_pairs(x: Array, batch: tuple[Size, ...]) -> Array:
    """Reshapes `[T, S]` or `[*batch, N, T, S]` to `[B or 1, N or 1, T or 1, S or 1]`."""
    if x.ndim == 2:
        return x[None, None]
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    # Batch dims that are partly 1 cannot be merged by a reshape, so only they are materialised.
    return flatten(jnp.broadcast_to(x, (*batch, *x.shape[-3:])), batch)


def _coordinates(name: str, at: Coordinates | None, batch: tuple[Size, ...], length: Size) -> Coordinates:
    """Returns coordinates with one batch dim, `[B or 1, length]`, and at least 32 bits.

    In int8 a window of 300 would be 44.
    """
    if at is None:
        at = Coordinates.range(length)
    if at.batch is not None or at.head is not None:
        raise ValueError(f"{name} must not give batch and head: attention counts both itself")
    for x in jax.tree.leaves(at):
        if not jnp.issubdtype(x.dtype, jnp.signedinteger):
            raise TypeError(f"{name} must hold signed integers (masks take differences), got {x.dtype}")
        if x.shape not in ((length,), (*batch, length)):
            raise ValueError(f"{name} {x.shape} must be {(length,)} or {(*batch, length)}")

    def field(x: Array | np.ndarray) -> Array | np.ndarray:
        wide = x.astype(np.promote_types(x.dtype, np.int32))
        return wide[None] if x.ndim == 1 else wide.reshape(math.prod(batch), length)

    return jax.tree.map(field, at)

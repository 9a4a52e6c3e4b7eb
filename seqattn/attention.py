"""One attention function: checks the call, chooses the implementation, runs it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import chunked, reference, vendor
from seqattn.kernels.call import check_arrays, check_dtypes, check_heads, check_pairs, flatten, locate, scale_of
from seqattn.masks import Causal, Mask, NotPadding, SlidingWindow
from seqattn.precision import accumulator
from seqattn.score_mods import ScoreMod, ScoreModLike, for_kernel


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel, and what is to be known of its cost.

    Attributes:
        attend: the kernel; it raises NotImplementedError, with the reason, for a call that it cannot serve.
        note: given the arguments of the kernel, a sentence for `explain`, or None where there is nothing to say.
    """

    attend: Callable[..., tuple[Array, Array]]
    note: Callable[..., str | None] | None = None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend),
    "chunked": Implementation(chunked.attend),
    "xla": Implementation(vendor.xla, vendor.xla_note),
    "cudnn": Implementation(vendor.cudnn, vendor.lse_note),
    "splash": Implementation(vendor.splash, vendor.lse_note),
}
"""What `implementation=` may name."""

# On the CPU, by `python -m benchmarks.attention --shapes cpu-t64,decode`: calls of so few pairs cost more to start than
# to compute, and so few queries less than bringing all keys into tiles.
TINY_PAIRS, FEW_QUERIES = 64 * 64, 16

Visible = Mask | Array | None
Shaped = Array | jax.ShapeDtypeStruct


@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Visible = ...,
    bias: Array | None = ...,
    score_mod: ScoreModLike = ...,
    sinks: Array | None = ...,
    q_at: Coordinates | None = ...,
    kv_at: Coordinates | None = ...,
    scale: float | Array | None = ...,
    dropout: Dropout | None = ...,
    implementation: str | Sequence[str] | None = ...,
    return_lse: Literal[False] = ...,
) -> Array: ...
@overload
def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Visible = ...,
    bias: Array | None = ...,
    score_mod: ScoreModLike = ...,
    sinks: Array | None = ...,
    q_at: Coordinates | None = ...,
    kv_at: Coordinates | None = ...,
    scale: float | Array | None = ...,
    dropout: Dropout | None = ...,
    implementation: str | Sequence[str] | None = ...,
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Visible = None,
    bias: Array | None = None,
    score_mod: ScoreModLike = None,
    sinks: Array | None = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    scale: float | Array | None = None,
    dropout: Dropout | None = None,
    implementation: str | Sequence[str] | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention (Vaswani 2017, equation 1) with any mask over coordinates.

    A query that may attend to nothing gives zeros with zero gradient. NaN or Inf in a masked key or value leaves no
    trace, forward or backward; in a visible one it makes the row NaN. Softmax and log-sum-exp are float32 at least.

    Args:
        query: `[*batch, T, N, H]`, floating; any number of leading dims. T, S and batch may be 0.
        key: `[*batch, S, K, H]`, same dtype; N must be a multiple of K (grouped queries, Ainslie 2023).
        value: `[*batch, S, K, V]`, same dtype; V may differ from H.
        mask: a `Mask` over coordinates, or a boolean array, True where a query may attend: `[T, S]`, or
            `[*batch, N, T, S]` with any dim 1.
        bias: added to the logits after scaling: `[T, S]`, or `[*batch, N, T, S]` with any dim 1. An entry of -inf
            masks the pair.
        score_mod: modifies each score after scale and bias and before the mask: a `ScoreMod`, or a function
            `fn(score, query, key, head) -> score` of scalars. Gradients reach every array that it captures. A result
            of -inf masks the pair.
        sinks: a learned logit for each head, `[N]` floating, of a key that every query sees and whose value is 0
            (attention sinks: Xiao 2023, gpt-oss 2025). The log-sum-exp counts it.
        q_at: coordinates of the queries `[T]` or `[*batch, T]`; one unpadded text from position 0 where not given.
        kv_at: coordinates of the keys `[S]` or `[*batch, S]`, likewise. Both or neither are given, and where T
            differs from S a `Mask` or a `ScoreMod` needs them: how the two sequences align would be a guess.
        scale: multiplies the products; `1 / sqrt(H)` where not given.
        dropout: drops attention weights after the softmax.
        implementation: a name of `IMPLEMENTATIONS`, several in order of preference, or None for the first able one
            of the order for this device: `explain` tells which, and why.
        return_lse: also return the log-sum-exp of the logits, differentiable; -inf for an empty row (the sink where
            there is one).

    Returns:
        The output `[*batch, T, N, V]` in the query's dtype; with `return_lse` also `[*batch, T, N]` float32 at least.

    Raises:
        TypeError: dtypes differ or are not floating, or the mask is not boolean.
        ValueError: shapes do not fit, or coordinates are missing or would be ignored.
        NotImplementedError: no implementation that may be chosen can serve this call; each one's reason.

    >>> import numpy as np

    The lecture's example, two encoder states of weight 0.7 and 0.3, as attention over logits log 0.7 and log 0.3:

    >>> states = jnp.array([[0.8, 0.2], [0.1, 0.9]])[:, None]
    >>> weighted = attend(jnp.zeros((1, 1, 2)), states, states, bias=jnp.log(jnp.array([[0.7, 0.3]])))
    >>> print(np.asarray(0.7 * states[0, 0]).round(2), np.asarray(weighted[0, 0]).round(2))
    [0.56 0.14] [0.59 0.41]

    Queries that continue a text of three cached keys:

    >>> query, cache = jnp.ones((2, 1, 4)), jnp.ones((5, 1, 4))
    >>> attend(query, cache, cache, mask=Causal(), q_at=Coordinates.range(2, start=3), kv_at=Coordinates.range(5)).shape
    (2, 1, 4)
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    given = _given(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        score_mod=score_mod,
        q_at=q_at,
        kv_at=kv_at,
        scale=scale,
        dropout=dropout,
    )
    sinks = _sinks(sinks, query)
    output, lse = _first_able(_names(implementation, query, key), given)
    if sinks is not None:
        output, lse = _with_sinks(output, lse, sinks.reshape(1, 1, -1))
    batch = query.shape[:-3]
    output = output.reshape(*batch, *output.shape[1:])
    return (output, lse.reshape(*batch, *lse.shape[1:])) if return_lse else output


def attention_weights(
    query: Array,
    key: Array,
    *,
    mask: Visible = None,
    bias: Array | None = None,
    score_mod: ScoreModLike = None,
    sinks: Array | None = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    scale: float | Array | None = None,
) -> Array:
    """The weights that `attend` gives to each key: `[*batch, N, T, S]`, float32 at least. For looking at.

    Arguments, errors and empty rows are those of `attend`. Each row sums to 1 (to less where there is a
    sink), an empty row to 0.

    >>> import numpy as np

    The lecture's causal mask over "[START] The chef who", with equal scores:

    >>> states = jnp.zeros((4, 1, 2))
    >>> print(np.asarray(attention_weights(states, states, mask=Causal())[0]).round(2))
    [[1.   0.   0.   0.  ]
     [0.5  0.5  0.   0.  ]
     [0.33 0.33 0.33 0.  ]
     [0.25 0.25 0.25 0.25]]
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    given = _given(
        query, key, key, mask=mask, bias=bias, score_mod=score_mod, q_at=q_at, kv_at=kv_at, scale=scale, dropout=None
    )
    visible = reference.visibility(given.pop("mask"), given["bias"], given["q_at"], given["kv_at"])
    del given["value"], given["dropout"]
    weights, lse = reference.softmax(reference.logits(**given, visible=visible))
    if (sinks := _sinks(sinks, query)) is not None:
        weights *= _share(lse, sinks.reshape(1, -1, 1))[..., None]
    return weights.reshape(*query.shape[:-3], *weights.shape[1:])


def attend_scores(
    scores: Array,
    value: Array,
    *,
    mask: Visible = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    dropout: Dropout | None = None,
) -> tuple[Array, Array]:
    """Attention over scores of any origin (additive, bilinear, ...), with the mask and contract of `attend`.

    Args:
        scores: logits `[*batch, N, T, S]`, floating.
        value: `[*batch, S, K, V]`, same dtype; N must be a multiple of K.
        mask, q_at, kv_at, dropout: as in `attend`.

    Returns:
        The output `[*batch, T, N, V]` in the values' dtype, and the weights `[*batch, N, T, S]`, float32 at least.

    >>> import numpy as np
    >>> scores, states = jnp.log(jnp.array([[[0.7, 0.3]]])), jnp.array([[0.8, 0.2], [0.1, 0.9]])[:, None]
    >>> output, weights = attend_scores(scores, states)
    >>> print(np.asarray(output).round(2), np.asarray(weights).round(2))
    [[[0.59 0.41]]] [[[0.7 0.3]]]
    """
    batch = value.shape[:-3]
    if value.ndim < 3 or scores.ndim < 3 or scores.shape[:-3] != batch or scores.shape[-1] != value.shape[-3]:
        raise ValueError(f"scores {scores.shape} must be [*batch, N, T, S], and value {value.shape} [*batch, S, K, V]")
    check_dtypes(scores=scores, value=value)
    check_heads(scores.shape[-3], value.shape[-2])
    num_heads, length, size = scores.shape[-3:]
    located = locate((*batch, length, num_heads, 1), (*batch, size, 1, 1), mask, None, q_at, kv_at)
    visible = reference.visibility(**located)
    high = accumulator(scores.dtype)
    flat = flatten(scores, batch).astype(high)
    if visible is not None:
        flat = jnp.where(visible, flat, jnp.full_like(flat, -jnp.inf))
    output, weights, _ = reference.mix(flat, flatten(value, batch), dropout=dropout)
    output = output.astype(value.dtype)
    return output.reshape(*batch, *output.shape[1:]), weights.reshape(scores.shape)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation a call of `attend` takes, and what the others say; printed as a table.

    Attributes:
        chosen: its name, or None where all that may be chosen refuse.
        refusals: for each implementation its reason to refuse the call, or None where it would run.
        notes: what is to be known of the cost of those that would run, where there is something.
    """

    chosen: str | None
    refusals: dict[str, str | None]
    notes: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(map(self._line, self.refusals))

    def _line(self, name: str) -> str:
        width = max(map(len, self.refusals))
        mark, reason = "->" if name == self.chosen else "  ", self.refusals[name]
        said = f"refuses: {reason}" if reason is not None else "would run"
        note = f" ({self.notes[name]})" if name in self.notes else ""
        return f"{mark} {name:{width}}  {said}{note}"


def explain(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    *,
    implementation: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Explanation:
    """Which implementation `attend` takes for the same arguments, and why not another. Nothing is computed.

    Args:
        query, key, value: as for `attend`, or their shapes and dtypes.
        implementation: as for `attend`.
        **arguments: all others of `attend`.

    Raises:
        TypeError, ValueError: those of `attend`, for a call that no implementation would be asked to serve.

    >>> states = jnp.zeros((5, 1, 2))
    >>> told = explain(states, states, states, mask=Causal(), implementation="reference")
    >>> print(str(told).splitlines()[0])
    -> reference  would run
    """
    for name in ("sinks", "return_lse"):  # what becomes of the output is no matter of a kernel
        arguments.pop(name, None)
    optional = ("mask", "bias", "score_mod", "q_at", "kv_at", "scale", "dropout")
    options: dict[str, Any] = {**dict.fromkeys(optional), **arguments}
    refusals: dict[str, str | None] = {}
    notes: dict[str, str] = {}

    def probe(name: str, *arrays: Array) -> tuple[Array, Array]:
        given, kernel = _given(*arrays, **options), IMPLEMENTATIONS[name]
        note = None if kernel.note is None else kernel.note(**given)
        result = kernel.attend(**given)
        notes.update({} if note is None else {name: note})
        return result

    for name in IMPLEMENTATIONS:
        try:
            jax.eval_shape(functools.partial(probe, name), query, key, value)
            refusals[name] = None
        except NotImplementedError as reason:
            refusals[name] = str(reason)
    able = (name for name in _names(implementation, query, key) if refusals[name] is None)
    return Explanation(next(able, None), refusals, notes)


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
    """The parameters and the meaning of `jax.nn.dot_product_attention`, over `attend`.

    Where jax.nn gives a wrong number in silence this raises (an integer query, a 3-D mask beside 4-D inputs, a negative
    window) or gives what `attend` promises (zeros for an empty row, no trace of a masked NaN, a differentiable
    float32 log-sum-exp).

    Args:
        query: `[B, T, N, H]` or `[T, N, H]`; key and value `[B, S, K, H]` or `[S, K, H]`.
        bias: `[T, S]`, or broadcasting to `[B, N, T, S]` with the same number of dims as the inputs.
        mask: boolean, True where a query may attend; shapes as for `bias`.
        scale: `1 / sqrt(H)` where not given.
        is_causal: query i sees keys 0 to i, aligned at the first token also where T differs from S.
        query_seq_lengths: integers `[B]`; queries from this one on are padding and give zeros.
        key_value_seq_lengths: integers `[B]`; keys from this one on are padding.
        local_window_size: `(left, right)` keys on each side of the query, or one number for both.
        implementation: as in `attend`.
        return_residual: also return the log-sum-exp `[B, T, N]`.

    Raises:
        TypeError: dtypes differ or are not floating, the mask is not boolean, or lengths are not integers.
        ValueError: shapes do not fit, or a window is negative.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    check_arrays(query, key, value)
    batch, length, size = query.shape[:-3], query.shape[-3], key.shape[-3]
    q_at = _rows("query_seq_lengths", query_seq_lengths, batch, length)
    kv_at = _rows("key_value_seq_lengths", key_value_seq_lengths, batch, size)
    parts: list[Mask] = [Causal()] if is_causal else []
    if local_window_size is not None:
        parts.append(_window(local_window_size))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        parts.append(NotPadding())
    if mask is not None and parts:
        mask = jnp.asarray(mask)
        check_pairs("mask", mask, batch, (query.shape[-2], length, size))
        if mask.ndim > 2 and mask.shape[-3:-1] == (1, 1):
            # What hides the same keys from every query of a row is padding, and kernels need no dense mask.
            kv_at, mask = _padded(kv_at, mask[..., 0, 0, :], batch), None
            parts.append(NotPadding())
    combined = _all(parts)
    visible: Visible = mask if combined is None else combined
    if mask is not None and combined is not None:
        rest = jnp.expand_dims(combined.dense(q_at, kv_at), -3)
        visible = _of_rank(query.ndim, mask) & _of_rank(query.ndim, rest)
    located = isinstance(visible, Mask)
    output, lse = attend(
        query,
        key,
        value,
        mask=visible,
        bias=bias,
        q_at=q_at if located else None,
        kv_at=kv_at if located else None,
        scale=scale,
        implementation=implementation,
        return_lse=True,
    )
    return (output, lse) if return_residual else output


def _all(masks: list[Mask]) -> Mask | None:
    combined: Mask | None = None
    for mask in masks:
        combined = mask if combined is None else combined & mask
    return combined


def _of_rank(rank: int, x: Array) -> Array:
    """`x` with as many dims of size 1 in front as it lacks."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _padded(at: Coordinates, present: Array, batch: tuple[int, ...]) -> Coordinates:
    """The coordinates with padding also where `present`, `[*batch or 1, length]`, is False."""
    shape = (*batch, at.shape[-1])
    position, segment, present = (
        jnp.broadcast_to(_of_rank(len(shape), jnp.asarray(x)), shape) for x in (at.position, at.segment, present)
    )
    return Coordinates(position, jnp.where(present, segment, 0))


def _window(size: int | tuple[int, int]) -> SlidingWindow:
    left, right = (size, size) if isinstance(size, int) else size
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size ({left}, {right}) must not be negative on either side")
    return SlidingWindow(left + 1, ahead=right)


def _rows(name: str, lengths: Array | None, batch: tuple[int, ...], length: int) -> Coordinates:
    if lengths is None:
        return Coordinates.range(length)
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.shape not in (batch, batch or (1,)):
        raise ValueError(f"{name} {lengths.shape} must have one length for each row of the batch {batch}")
    return Coordinates.from_lengths(lengths.reshape(batch), length)


def _given(
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
) -> dict[str, Any]:
    """The arguments of a kernel: checked, and with exactly one batch dim."""
    check_arrays(query, key, value)
    mod = None if score_mod is None else ScoreMod.of(score_mod)
    located = locate(query.shape, key.shape, mask, bias, q_at, kv_at, mod)
    query, key, value = (flatten(x, query.shape[:-3]) for x in (query, key, value))
    scale, rows = scale_of(scale, query.shape[-1]), None
    if mod is not None:
        mod, rows = for_kernel(mod, query, scale, located["q_at"], located["kv_at"])
    return {
        "query": query,
        "key": key,
        "value": value,
        **located,
        "score_mod": mod,
        "rows": rows,
        "scale": scale,
        "dropout": dropout,
    }


def _sinks(sinks: Array | None, query: Array) -> Array | None:
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must be floating, got {sinks.dtype}")
    if sinks.shape != query.shape[-2:-1]:
        raise ValueError(f"sinks {sinks.shape} must be [N], one logit for each head {query.shape[-2:-1]}")
    return sinks


def _with_sinks(output: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Output `[B, T, N, V]` and log-sum-exp `[B, T, N]` with one more key for each head, whose value is 0."""
    scaled = output.astype(lse.dtype) * _share(lse, sinks)[..., None]
    empty, sinks = lse == -jnp.inf, jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape)
    return scaled.astype(output.dtype), jnp.where(empty, sinks, jnp.logaddexp(jnp.where(empty, 0, lse), sinks))


def _share(lse: Array, sinks: Array) -> Array:
    """What part of the softmax the keys keep beside the sink; of an empty row, which keeps nothing, any finite one."""
    return jax.nn.sigmoid(jnp.where(lse == -jnp.inf, 0, lse) - sinks.astype(lse.dtype))


def _names(implementation: str | Sequence[str] | None, query: Shaped, key: Shaped) -> list[str]:
    """The implementations to try, in order."""
    if implementation is None:
        return [name for name in _order(vendor.platform(query), query, key) if name in IMPLEMENTATIONS]
    names = [implementation] if isinstance(implementation, str) else list(implementation)
    if not names:
        raise ValueError(f"implementation is empty; give one or more of {', '.join(IMPLEMENTATIONS)}, or None")
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"implementation {unknown[0]!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return names


def _order(platform: str, query: Shaped, key: Shaped) -> tuple[str, ...]:
    """Names in the order in which `None` tries them; a name that is not there is passed over."""
    if platform in ("gpu", "cuda", "rocm"):
        return ("cudnn", "chunked", "xla", "reference")
    if platform == "tpu":
        return ("splash", "chunked", "xla", "reference")
    tiny = query.shape[-3] * key.shape[-3] <= TINY_PAIRS or query.shape[-3] < FEW_QUERIES
    return ("xla", "reference", "chunked") if tiny else ("chunked", "xla", "reference")


def _first_able(names: Sequence[str], given: dict[str, Any]) -> tuple[Array, Array]:
    """What the first of the named implementations returns that does not refuse."""
    reasons: dict[str, NotImplementedError] = {}
    for name in names:
        try:
            return IMPLEMENTATIONS[name].attend(**given)
        except NotImplementedError as reason:
            reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation can serve this call: {told}") from next(iter(reasons.values()), None)

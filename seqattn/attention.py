"""Attention functions over arrays: check the call, run the chosen implementation, and restore the shape."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout, check_dropout
from seqattn.kernels import reference
from seqattn.kernels.block_mask import opened
from seqattn.kernels.call import (
    Call,
    Columns,
    Visible,
    check_dtypes,
    check_heads,
    check_sinks,
    flatten,
    infinite_where_empty,
    locate,
)
from seqattn.kernels.dispatch import serve
from seqattn.kernels.shared_keys import Folding, fold
from seqattn.kernels.split import Split, repeats_keys
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreModLike


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
    split: Split | None = ...,
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
    split: Split | None = ...,
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
    split: Split | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Computes scaled dot-product attention with a mask over coordinates (Vaswani 2017, equation 1).

    `softmax(scale * query . key + bias) value`. The order is scale, bias, score modification, mask, softmax, dropout.

    Every implementation keeps the same contract. A fully masked query gives zeros with zero gradients. NaN or Inf in a
    masked key or value affects no output and no gradient; in a visible one it makes the row NaN. Softmax and
    log-sum-exp are computed in float32 or wider.

    Args:
        query: `[*batch, T, N, H]`, floating, with any number of leading batch dimensions. T, S and batch may be 0.
        key: `[*batch, S, K, H]`, of the same dtype. N must be a multiple of K (grouped-query attention, Ainslie 2023).
            A batch dimension of keys and values may be 1: all rows then read the same keys, without a copy.
        value: `[*batch, S, K, V]`, of the same dtype. V may differ from H.
        mask: a `Mask` over coordinates, or a boolean array that is True where a query may attend: `[T, S]`, or
            `[*batch, N, T, S]` with any dim 1. Defaults to no mask. A `BlockMask` also holds coordinates, and tiles
            that calls share.
        bias: added to the logits after scaling: `[T, S]`, or `[*batch, N, T, S]` with any dim 1, floating. An entry of
            -inf masks the pair.
        score_mod: modifies each score after scale and bias and before the mask: a `ScoreMod`, or a function
            `fn(score, query, key, head) -> score` of scalars. Gradients reach every array that it captures. A result of
            -inf masks the pair.
        sinks: attention sinks (Xiao 2023; gpt-oss 2025): `[N]` floating, for each head the learned logit of a key that
            every query sees and whose value is 0. The log-sum-exp includes it.
        q_at: coordinates of the queries, `[T]` or `[*batch, T]`. Defaults to one unpadded text from position 0.
        kv_at: coordinates of the keys, `[S]` or `[*batch, S]`. Defaults to one unpadded text from position 0. Give both
            `q_at` and `kv_at` or neither. A `Mask` or a `ScoreMod` requires them if T differs from S, because the
            alignment of the two sequences would be a guess.
        scale: multiplies the products; a number or a scalar array. Defaults to `1 / sqrt(H)`.
        dropout: drops attention weights after the softmax.
        implementation: a name such as "chunked", a sequence of names in order of preference, or None for the first
            implementation in the device's order that accepts the call. See `explain`.
        split: the mesh axes that split the call over devices, for kernels that the compiler cannot split. Defaults to
            the axes that the type of the queries names, as it does over Explicit mesh axes. See `Split`.
        return_lse: If True, also returns the log-sum-exp of the logits, which is differentiable. It is -inf for a fully
            masked query, or the sink if there is one.

    Returns:
        The output `[*batch, T, N, V]` in the query's dtype. With `return_lse` a pair of the output and the log-sum-exp
        `[*batch, T, N]`, float32 or wider.

    Raises:
        TypeError: dtypes differ or are not floating, or the mask is not boolean.
        ValueError: shapes do not fit, an implementation is unknown, coordinates are missing or would be ignored, or the
            axes of `split` do not divide the call.
        NotImplementedError: no candidate implementation can serve the call. The message holds each one's reason.

    See also: `explain`, `attention_weights`, `attend_scores`, `ring_attend`.

    >>> import numpy as np
    >>> from seqattn.masks import Causal

    Two encoder states with weights 0.7 and 0.3, as attention over the logits log 0.7 and log 0.3:

    >>> states = jnp.array([[0.8, 0.2], [0.1, 0.9]])[:, None]
    >>> weighted = attend(jnp.zeros((1, 1, 2)), states, states, bias=jnp.log(jnp.array([[0.7, 0.3]])))
    >>> print(np.asarray(0.7 * states[0, 0]).round(2), np.asarray(weighted[0, 0]).round(2))
    [0.56 0.14] [0.59 0.41]

    Two queries that continue a text of three cached keys:

    >>> query, cache = jnp.ones((2, 1, 4)), jnp.ones((5, 1, 4))
    >>> attend(query, cache, cache, mask=Causal(), q_at=Coordinates.range(2, start=3), kv_at=Coordinates.range(5)).shape
    (2, 1, 4)
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    sinks, folding = check_sinks(sinks, query), Folding.of(query, key, value)
    options: dict[str, Any] = {"mask": mask, "bias": bias, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at}
    options |= {"scale": scale, "dropout": dropout}
    # Rows that share their keys become queries of one row, unless a mesh splits the rows.
    folded, key, value, options = fold(query, key, value, options, repeat=repeats_keys(split))
    call = Call.of(folded, key, value, **options)
    # The sink is not a key of any kernel: its effect follows from the log-sum-exp alone, for all implementations.
    output, lse = serve(implementation, call, split)
    if sinks is not None:
        output, lse = _with_sinks(output, lse, sinks.reshape(1, 1, -1))
    output, lse = (x.reshape(*folded.shape[:-3], *x.shape[1:]) for x in (output, lse))
    if folded is not query:
        output, lse = folding.unfold(output), folding.unfold(lse)
    return (output, infinite_where_empty(lse)) if return_lse else output


def attend_columns(
    query: Float[Array, "B T N H"],
    columns: Columns,
    *,
    mask: Visible = None,
    score_mod: ScoreModLike = None,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    scale: float | Array | None = None,
    dropout: Dropout | None = None,
    implementation: str | Sequence[str] | None = None,
    split: Split | None = None,
) -> Float[Array, "B T N V"]:
    """Like `attend`, for keys and values in the layout of a cache (see `Columns`), with one batch dimension.

    With `implementation=None` a step of few queries runs on `cached`, which reads this layout, or on a TPU on
    `tpu_cached`, which reads only the slots that a query may see. `hopper_cached` does the same on a GPU, by name only.
    More queries run in the order of `attend`. All other kernels receive keys and values in rows.

    Raises:
        TypeError: an array has a wrong dtype, or as `attend`.
        ValueError: queries and columns do not fit each other, or as `attend`.
        NotImplementedError: no implementation can serve the call.

    >>> columns = Columns(jnp.ones((1, 1, 2, 3)), jnp.arange(3.0).reshape(1, 1, 3, 1), jnp.ones((1, 3), bool))
    >>> print(attend_columns(jnp.ones((1, 1, 1, 2)), columns)[0, 0, 0])
    [1.]
    """
    located: dict[str, Any] = {"mask": mask, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at}
    call = Call.of_columns(query, columns, **located, scale=scale, dropout=dropout)
    return serve(implementation, call, split)[0]


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
    """Returns the weights that `attend` gives to each key, for inspection.

    Args:
        query: `[*batch, T, N, H]`, floating.
        key: `[*batch, S, K, H]`, of the same dtype.
        mask: as in `attend`.
        bias: as in `attend`.
        score_mod: as in `attend`.
        sinks: as in `attend`.
        q_at: as in `attend`.
        kv_at: as in `attend`.
        scale: as in `attend`.

    Returns:
        `[*batch, N, T, S]`, float32 or wider. Each row sums to 1, or to less if there is a sink. The weights of a fully
        masked row are 0.

    Raises:
        TypeError: as `attend`.
        ValueError: as `attend`.

    >>> import numpy as np
    >>> from seqattn.masks import Causal

    A causal mask over "[START] The chef who", with equal scores:

    >>> states = jnp.zeros((4, 1, 2))
    >>> print(np.asarray(attention_weights(states, states, mask=Causal())[0]).round(2))
    [[1.   0.   0.   0.  ]
     [0.5  0.5  0.   0.  ]
     [0.33 0.33 0.33 0.  ]
     [0.25 0.25 0.25 0.25]]
    """
    query, key = jnp.asarray(query), jnp.asarray(key)
    if Folding.of(query, key, key).shared:
        key = jnp.broadcast_to(key, (*query.shape[:-3], *key.shape[-3:]))
    call = Call.of(
        query, key, key, mask=mask, bias=bias, score_mod=score_mod, q_at=q_at, kv_at=kv_at, scale=scale, dropout=None
    )
    weights, lse = reference.softmax(*reference.logits(call))
    if (sinks := check_sinks(sinks, query)) is not None:
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
    """Computes attention from given scores (additive, bilinear, ...), with the mask and the contract of `attend`.

    Use it with the functions of `seqattn.scores`.

    Args:
        scores: logits `[*batch, N, T, S]`, floating.
        value: `[*batch, S, K, V]`, of the same dtype. N must be a multiple of K.
        mask: as in `attend`.
        q_at: as in `attend`.
        kv_at: as in `attend`.
        dropout: as in `attend`.

    Returns:
        The output `[*batch, T, N, V]` in the dtype of the values, and the weights before dropout `[*batch, N, T, S]`,
        float32 or wider.

    Raises:
        TypeError: dtypes differ or are not floating, or the mask is not boolean.
        ValueError: shapes do not fit, or coordinates are missing or would be ignored.

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
    check_dropout(dropout)
    check_heads(scores.shape[-3], value.shape[-2])
    num_heads, length, size = scores.shape[-3:]
    mask, q_at, kv_at, _ = opened(mask, q_at, kv_at)
    located = locate((*batch, length, num_heads, 1), (*batch, size, 1, 1), mask, None, q_at, kv_at)
    flat = flatten(scores, batch).astype(accumulator(scores.dtype))
    visible = reference.visibility((flat.shape[0], length, num_heads, 1), **located)
    shown = flat != -jnp.inf
    visible = shown if visible is None else visible & shown
    flat = jnp.where(shown, flat, jnp.zeros_like(flat))
    output, weights, _ = reference.mix(flat, flatten(value, batch), visible, dropout=dropout)
    output = output.astype(value.dtype)
    return output.reshape(*batch, *output.shape[1:]), weights.reshape(scores.shape)


def _with_sinks(output: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Adds one more key for each head, with a value of 0, to output `[B, T, N, V]` and log-sum-exp `[B, T, N]`."""
    scaled = output.astype(lse.dtype) * _share(lse, sinks)[..., None]
    return scaled.astype(output.dtype), jnp.logaddexp(lse, jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape))


def _share(lse: Array, sinks: Array) -> Array:
    """Returns the share of the softmax that the keys keep next to the sink; 0 for a fully masked row."""
    return jax.nn.sigmoid(lse - sinks.astype(lse.dtype))

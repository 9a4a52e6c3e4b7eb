"""What the library computes, written again in NumPy float64: row by row, the gradients by hand, nothing shared with it.

A masked key is never read here, so its NaN cannot leave a trace; an empty row is skipped, so it stays zero.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Predicate = Callable[[int, int, int, int], bool]
"""May the query at (position, segment) attend to the key at (position, segment)?"""


@dataclasses.dataclass
class Attended:
    """`output [*batch, T, N, V]`, `lse [*batch, T, N]`, `weights [*batch, N, T, S]` before dropout."""

    output: np.ndarray
    lse: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass
class Row:
    """One query and the keys that it sees, as indices: `at [B, T, N]`, `keys [B, S, K]`, `pairs [B, N, T, S]`."""

    at: tuple
    keys: tuple
    pairs: tuple


def attention(query, key, value, *, visible=True, bias=0.0, scale=None, kept=1.0, cap=np.inf) -> Attended:
    """Softmax attention; `kept` multiplies the weights after the softmax (dropout).

    A finite `cap` makes `cap * tanh(score / cap)` of each scaled product, before the bias.
    """
    call = _Call(query, key, value, visible, bias, scale, kept, cap)
    output = np.zeros((*call.query.shape[:-1], call.value.shape[-1]))
    lse, weights = np.full(call.query.shape[:-1], -np.inf), np.zeros(call.visible.shape)
    for row in call.rows():
        weights[row.pairs], lse[row.at] = call.softmax(row)
        output[row.at] = (weights[row.pairs] * call.kept[row.pairs]) @ call.value[row.keys]
    batch = np.shape(query)[:-3]
    return Attended(*(x.reshape(*batch, *x.shape[1:]) for x in (output, lse, weights)))


def attention_gradients(
    query, key, value, d_output, d_lse, *, visible=True, bias=0.0, scale=None, kept=1.0, cap=np.inf
) -> dict[str, np.ndarray]:
    """Gradients of `sum(d_output * output) + sum(d_lse * lse)` by query, key, value, bias, scale and a finite cap."""
    call = _Call(query, key, value, visible, bias, scale, kept, cap)
    d_output, d_lse = _one_batch(d_output, 3), _one_batch(d_lse, 2)
    d_query, d_key, d_value = (np.zeros_like(x) for x in (call.query, call.key, call.value))
    d_bias, d_scale, d_cap = np.zeros(call.visible.shape), 0.0, 0.0
    for row in call.rows():
        weights, _ = call.softmax(row)
        keys, kept_here, d_row = call.key[row.keys], call.kept[row.pairs], d_output[row.at]
        d_value[row.keys] += np.outer(kept_here * weights, d_row)
        d_weights = kept_here * (call.value[row.keys] @ d_row)
        d_logits = weights * (d_weights - weights @ d_weights) + weights * d_lse[row.at]
        d_bias[row.pairs] = d_logits
        if np.isfinite(cap):
            part = call.products(row) / cap
            bent = np.tanh(part)
            d_cap += d_logits @ (bent - part * (1 - bent**2))
            d_logits = d_logits * (1 - bent**2)
        d_scale += d_logits @ (keys @ call.query[row.at])
        d_query[row.at] = call.scale * d_logits @ keys
        d_key[row.keys] += call.scale * np.outer(d_logits, call.query[row.at])
    pairs = (*np.shape(query)[:-3], *d_bias.shape[1:])
    of_cap = {"cap": np.asarray(d_cap)} if np.isfinite(cap) else {}
    return of_cap | {
        "query": d_query.reshape(np.shape(query)),
        "key": d_key.reshape(np.shape(key)),
        "value": d_value.reshape(np.shape(value)),
        "bias": _sum_to(d_bias.reshape(pairs), np.shape(bias)),
        "scale": np.asarray(d_scale),
    }


class _Call:
    """The arguments in float64 with one batch dim, the pairs broadcast to `[B, N, T, S]`."""

    def __init__(self, query, key, value, visible, bias, scale, kept, cap) -> None:
        full = (*np.shape(query)[:-3], np.shape(query)[-2], np.shape(query)[-3], np.shape(key)[-3])
        self.query, self.key, self.value = (_one_batch(x, 3) for x in (query, key, value))
        self.bias, self.kept = (_one_batch(np.broadcast_to(_wide(x), full), 3) for x in (bias, kept))
        self.visible = _one_batch(np.broadcast_to(np.asarray(visible), full), 3).astype(bool) & (self.bias != -np.inf)
        self.scale = self.query.shape[-1] ** -0.5 if scale is None else float(scale)
        self.cap = float(cap)

    def rows(self) -> Iterator[Row]:
        batch, num_heads, length, _ = self.visible.shape
        group = num_heads // self.key.shape[2]
        for b, n, t in np.ndindex(batch, num_heads, length):
            seen = np.flatnonzero(self.visible[b, n, t])
            if seen.size:
                yield Row((b, t, n), (b, seen, n // group), (b, n, t, seen))

    def products(self, row: Row) -> np.ndarray:
        return self.scale * (self.key[row.keys] @ self.query[row.at])

    def softmax(self, row: Row) -> tuple[np.ndarray, float]:
        scores = self.products(row)
        if np.isfinite(self.cap):
            scores = self.cap * np.tanh(scores / self.cap)
        logits = scores + self.bias[row.pairs]
        peak = logits.max()
        total = np.exp(logits - peak).sum()
        return np.exp(logits - peak) / total, peak + np.log(total)


def _wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _one_batch(x, inner: int) -> np.ndarray:
    """`[*batch, ...]` with `inner` dims after the batch as `[B, ...]` float64."""
    x = _wide(x)
    return x.reshape(int(np.prod(x.shape[: x.ndim - inner])), *x.shape[x.ndim - inner :])


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of broadcasting from `shape`: the sum over what was repeated."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=repeated, keepdims=True)


def pairs(predicate: Predicate, q_at, kv_at) -> np.ndarray:
    """`[*batch, T, S]`: the predicate for each pair of two `Coordinates`, in plain loops."""
    qp, qs, kp, ks = (np.asarray(x) for x in (q_at.position, q_at.segment, kv_at.position, kv_at.segment))
    batch = np.broadcast_shapes(qp.shape[:-1], qs.shape[:-1], kp.shape[:-1], ks.shape[:-1])
    qp, qs, kp, ks = (np.broadcast_to(x, (*batch, x.shape[-1])) for x in (qp, qs, kp, ks))
    result = np.zeros((*batch, qp.shape[-1], kp.shape[-1]), bool)
    for *row, t, s in np.ndindex(*result.shape):
        query, key = (*row, t), (*row, s)
        result[(*row, t, s)] = predicate(int(qp[query]), int(qs[query]), int(kp[key]), int(ks[key]))
    return result


def cross_entropy(logits, labels, *, weights=None, label_smoothing=0.0) -> tuple[float, float, np.ndarray]:
    """The weighted sum of cross entropies against the smoothed target, the sum of weights, the gradient by logits."""
    logits, labels = _wide(logits), np.asarray(labels)
    weights = np.ones(labels.shape) if weights is None else _wide(weights)
    total, count, gradient = 0.0, 0.0, np.zeros_like(logits)
    for index in np.ndindex(*labels.shape):
        if weights[index] == 0 or labels[index] < 0:
            continue
        row = logits[index] - logits[index].max()
        log_probability = row - np.log(np.exp(row).sum())
        target = np.full(row.size, label_smoothing / row.size)
        target[labels[index]] += 1 - label_smoothing
        some = target > 0
        total += weights[index] * -(target[some] @ log_probability[some])
        count += weights[index]
        gradient[index] = weights[index] * (np.exp(log_probability) - target)
    return total, count, gradient

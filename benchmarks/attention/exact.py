"""Exact attention in float64, and the error of another result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.attention import patterns
from benchmarks.attention.case import AttentionCase

NAMES = ("output", "d_query", "d_key", "d_value")

TOLERANCES = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3}
"""Maximum error relative to the exact values, by dtype."""

_TILE = 1 << 21  # scores held at once
_PAIRS = 1 << 27  # maximum number of scores to check; a sample of heads if there are more

Answer = dict[str, np.ndarray]
"""Float64 arrays by name, `[T, G, D]` or `[S, D]`: for one key head and the G query heads that share it."""


@dataclass(frozen=True)
class Error:
    """The error of a result over the output and all gradients."""

    largest: float
    """Largest absolute error of any number."""
    relative: float
    """Root mean square of the error divided by that of the exact values; the maximum over output and gradients."""
    right: bool
    """Whether the relative error, and the largest error divided by the largest exact value, are within tolerance."""


@dataclass(frozen=True)
class Scored:
    """What is done to the scores of the query heads that share a key head."""

    slopes: np.ndarray
    """ALiBi's penalty per token of distance, `[G]`."""
    cap: float = 0.0
    """The limit of a soft cap; 0 for none."""


@dataclass(frozen=True)
class Exact:
    """Exact answers for (batch row, key head) pairs; a random sample if all would take too long."""

    answers: Mapping[tuple[int, int], Answer]
    tolerance: float

    def error(self, results: Sequence[np.ndarray]) -> Error:
        """Returns the error of the output `[B, T, N, D]` and, if given, of the gradients of query, key and value."""
        each = [self._error_of(name, result) for name, result in zip(NAMES, results, strict=False)]
        largest, relative = (float(np.max([getattr(e, name) for e in each])) for name in ("largest", "relative"))
        return Error(largest, relative, all(e.right for e in each))

    def _error_of(self, name: str, result: np.ndarray) -> Error:
        errors, sizes, largest, most = 0.0, 0.0, 0.0, 0.0
        for (b, k), answer in self.answers.items():
            exact = answer[name]
            group = exact.shape[1] if exact.ndim == 3 else 1
            mine = result[b, :, k * group : (k + 1) * group].astype(np.float64).reshape(exact.shape)
            error = np.abs(mine - exact)
            errors, sizes = errors + np.square(error).sum(), sizes + np.square(exact).sum()
            # np.maximum propagates NaN; max would drop it.
            largest, most = np.maximum(largest, error.max()), max(most, np.abs(exact).max())
        relative = np.sqrt(errors / sizes) if sizes else np.sqrt(errors)
        right = relative <= self.tolerance and largest <= self.tolerance * most
        return Error(float(largest), float(relative), bool(right))


def solve(case: AttentionCase, tolerance: float | None = None) -> Exact:
    """Solves a case in float64 from inputs rounded to its dtype, with gradients if the case has them."""
    shape = case.shape
    inputs = list(case.inputs())
    spans, slopes = patterns.spans(case.pattern, shape), patterns.slopes(case.pattern, shape)
    group = shape.num_heads // shape.kv_heads
    answers = {}
    for b, k in _checked(case):
        heads = slice(k * group, (k + 1) * group)
        of = [heads, slice(k, k + 1), slice(k, k + 1), heads]
        query, key, value, *d_output = (x[b, :, h].astype(np.float64) for x, h in zip(inputs, of, strict=False))
        row = spans.row(b)
        scored = Scored(slopes[heads], patterns.cap(case.pattern))
        answers[b, k] = _attend(query, key[:, 0], value[:, 0], d_output[0] if d_output else None, row, scored)
    return Exact(answers, TOLERANCES[case.dtype] if tolerance is None else tolerance)


def _checked(case: AttentionCase) -> list[tuple[int, int]]:
    """Returns the (row, key head) pairs to compute: all, or a random sample within the budget, at least one."""
    shape = case.shape
    every = [(b, k) for b in range(shape.batch) for k in range(shape.kv_heads)]
    allowed = max(1, _PAIRS * len(every) // (case.pairs * shape.num_heads))
    chosen = np.random.default_rng(len(every)).permutation(len(every))[:allowed]
    return [every[i] for i in sorted(chosen)]


def _attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    d_output: np.ndarray | None,
    spans: patterns.Spans,
    scored: Scored,
) -> Answer:
    """Attends queries `[T, G, D]` to keys and values `[S, D]` tile by tile; adds gradients if there is a cotangent."""
    scale = query.shape[-1] ** -0.5
    answer = {"output": np.zeros_like(query)}
    if d_output is not None:
        answer |= {"d_query": np.zeros_like(query), "d_key": np.zeros_like(key), "d_value": np.zeros_like(value)}
    for g, slope in enumerate(scored.slopes):
        for rows in _tiles(spans):
            keys = slice(int(spans.first[rows].min()), int(spans.beyond[rows].max()))
            logits, slant = _capped(query[rows, g] @ (scale * key[keys].T), scored.cap)
            weights = _weights(logits, rows, keys, spans, slope)
            answer["output"][rows, g] = weights @ value[keys]
            if d_output is not None:
                d_rows = d_output[rows, g]
                answer["d_value"][keys] += weights.T @ d_rows
                d_logits = d_rows @ value[keys].T
                d_logits -= (weights * d_logits).sum(axis=1, keepdims=True)
                d_logits *= scale * weights * slant
                answer["d_query"][rows, g] = d_logits @ key[keys]
                answer["d_key"][keys] += d_logits.T @ query[rows, g]
    return answer


def _tiles(spans: patterns.Spans) -> list[slice]:
    length = len(spans.first)
    step = max(16, _TILE // int(spans.beyond.max()))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _capped(logits: np.ndarray, cap: float) -> tuple[np.ndarray, np.ndarray | float]:
    """Returns softly capped scores, and their derivative by the scores."""
    if not cap:
        return logits, 1.0
    bent = np.tanh(logits / cap)
    return cap * bent, 1 - np.square(bent)


def _weights(logits: np.ndarray, rows: slice, keys: slice, spans: patterns.Spans, slope: float) -> np.ndarray:
    """Applies the softmax to a tile of scores over the spans of its rows, in place."""
    at = np.arange(keys.start, keys.stop)
    if slope:
        logits -= slope * (np.arange(rows.start, rows.stop)[:, None] - at)
    hidden = (at < spans.first[rows, None]) | (at >= spans.beyond[rows, None])
    logits[hidden] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits

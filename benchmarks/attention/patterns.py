"""The benchmarked masks. In each, a query sees one contiguous span of keys, so visible pairs can be counted exactly."""

from dataclasses import dataclass

import numpy as np

from benchmarks.attention.shapes import Shape
from benchmarks.bench import machine

WINDOW = 256
LONG_WINDOW = 512
DOCUMENTS = 16
CAP = 3.0  # the inputs have scores of some -5 to 5: a result without the cap is wrong, and the time is the same
_SEED = 20261101

PATTERNS = {
    "full": "every key",
    "causal": "the query's own key and those before it",
    "window": f"the {WINDOW} latest keys",
    "documents": f"{DOCUMENTS} packed documents of random lengths, causal in each",
    "prefix": "causal, and the first quarter of the keys for every query",
    "alibi": "causal, with ALiBi's slopes added to the scores",
    "window-512": f"the {LONG_WINDOW} latest keys",
    "cap": f"causal, with scores capped softly at {CAP:g}",
}


@dataclass(frozen=True)
class Spans:
    """The keys that each query sees, from `first` to before `beyond`: integers `[B or 1, T]`."""

    first: np.ndarray
    beyond: np.ndarray

    def pairs(self, batch: int) -> int:
        """Returns the number of visible pairs over `batch` rows, for one head."""
        return int((self.beyond - self.first).sum()) * batch // len(self.first)

    def row(self, b: int) -> "Spans":
        """Returns the spans `[T]` of one row of the batch."""
        b %= len(self.first)
        return Spans(self.first[b], self.beyond[b])

    def visible(self, size: int) -> np.ndarray:
        """Returns `[B or 1, T, S]` bool, True where a query sees a key."""
        key = np.arange(size)
        return (self.first[..., None] <= key) & (key < self.beyond[..., None])


def fits(pattern: str, shape: Shape) -> bool:
    """Whether the mask makes sense for a shape: all except `full` need queries and keys of one sequence."""
    return pattern == "full" or shape.size == shape.length


def spans(pattern: str, shape: Shape) -> Spans:
    """Returns the spans of a mask: per row of the batch for `documents`, shared by all rows otherwise."""
    query = np.arange(shape.length)[None]
    zero = np.zeros_like(query)
    if pattern == "full":
        return Spans(zero, zero + shape.size)
    if size := window(pattern):
        return Spans(np.maximum(zero, query - size + 1), query + 1)
    if pattern == "prefix":
        return Spans(zero, np.maximum(query + 1, prefix_length(shape)))
    if pattern == "documents":
        segment = segments(shape)
        starts = np.diff(segment, axis=1, prepend=0) != 0
        return Spans(
            np.maximum.accumulate(np.where(starts, query, 0), axis=1), np.broadcast_to(query + 1, segment.shape)
        )
    return Spans(zero, query + 1)


def window(pattern: str) -> int:
    """Returns the number of latest keys that a query of a window sees; 0 for other masks."""
    return {"window": WINDOW, "window-512": LONG_WINDOW}.get(pattern, 0)


def cap(pattern: str) -> float:
    """Returns the value that no score exceeds: a score s becomes cap * tanh(s / cap). 0 for masks without one."""
    return CAP if pattern == "cap" else 0.0


def refuse_cap(pattern: str, library: str) -> None:
    """Raises NotImplementedError for a soft cap, in the name of a library that has none."""
    if cap(pattern):
        raise NotImplementedError(f"{library} has no soft cap")


def segments(shape: Shape) -> np.ndarray:
    """Returns the document of each token, counted from 1: int32 `[B, T]`, the same in every run."""
    rng = np.random.default_rng([_SEED, shape.batch, shape.length])
    count = min(DOCUMENTS, shape.length)
    rows = []
    for _ in range(shape.batch):
        starts = rng.choice(np.arange(1, shape.length), count - 1, replace=False)
        rows.append(1 + np.isin(np.arange(shape.length), starts).cumsum())
    return np.stack(rows).astype(np.int32)


def prefix_length(shape: Shape) -> int:
    """Returns the number of keys that every query of `prefix` sees."""
    return shape.size // 4


def slopes(pattern: str, shape: Shape) -> np.ndarray:
    """Returns ALiBi's penalty per token of distance, float64 `[N]`; zeros for all masks except `alibi`.

    The slopes of Press 2022, section 3; head counts between powers of two follow the authors' code.
    """
    if pattern != "alibi":
        return np.zeros(shape.num_heads)
    whole = 1 << (shape.num_heads.bit_length() - 1)
    exponents = np.concatenate([np.arange(1, whole + 1) / whole, np.arange(1, 2 * whole, 2) / (2 * whole)])
    return 2.0 ** (-8 * exponents[: shape.num_heads])


def dense_mask(pattern: str, shape: Shape) -> np.ndarray:
    """Returns a bool mask `[B or 1, 1, T, S]`, for libraries that support no other form."""
    rows = shape.batch if pattern == "documents" else 1
    machine.require(rows * shape.length * shape.size, "a dense mask")
    return spans(pattern, shape).visible(shape.size)[:, None]


def dense_bias(pattern: str, shape: Shape) -> np.ndarray:
    """Returns a float32 bias `[B or 1, N or 1, T, S]` to add to the scores, -inf where a query sees no key."""
    heads = shape.num_heads if pattern == "alibi" else 1
    rows = shape.batch if pattern == "documents" else 1
    machine.require(4 * rows * heads * shape.length * shape.size, "a dense bias")
    back = np.arange(shape.length, dtype=np.float32)[:, None] - np.arange(shape.size, dtype=np.float32)
    slope = slopes(pattern, shape).astype(np.float32)[:heads, None, None]
    return np.where(dense_mask(pattern, shape), -slope * back, np.float32(-np.inf))

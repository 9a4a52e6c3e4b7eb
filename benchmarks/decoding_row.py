"""One row of the decoding benchmark: one implementation on one case; and rows as people read them."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks import machine, table
from benchmarks.marian import Case
from benchmarks.memory import Peak
from benchmarks.timing import Times
from benchmarks.translators import PEERS

_COLUMNS = {  # width in lines
    "implementation": 14,
    "tokens/s": 9,
    "min - max": 15,
    **{f"by {name}": 16 for name in PEERS},
    "first token ms": 14,
    "MiB": 7,
    "rows equal": 10,
    "compile s": 9,
}

LEGEND = (
    "tokens/s: of the best hypotheses, by the median of the rounds, and their range. by: how many times that of the "
    "peer. first token ms: the same call with room for one token, encoder included. MiB: what a process that does "
    "nothing else came to hold beyond Python and libraries: weights, compilation, one call. rows equal: share of the "
    "sources for which all tokens are those of the first peer. compile s: once, not in the times."
)

_ENOUGH = 0.9  # share of equal rows by which a beam search is right: hypotheses that tie in float32 may change places


@dataclass(frozen=True)
class Agreement:
    """How a result `[B, L]` compares with that of another implementation."""

    equal: float
    """Share of the rows in which all tokens are equal."""
    score_difference: float
    """The largest difference of the rows' mean log probability of a token, by our model."""

    @staticmethod
    def of(tokens: np.ndarray, scores: np.ndarray, others: np.ndarray, their_scores: np.ndarray) -> "Agreement":
        """Of tokens `[B, L]` and scores `[B]`.

        Raises:
            ValueError: the tokens are not as many.
        """
        if tokens.shape != others.shape:
            raise ValueError(f"tokens must have the shape {others.shape}, got {tokens.shape}")
        difference = np.abs(np.asarray(scores, np.float64) - their_scores)
        return Agreement(float((tokens == others).all(axis=1).mean()), float(difference.max()))

    def is_right(self, beam_size: int) -> bool:
        """All rows are equal; with beams, nearly all, as long as the others are as good."""
        return self.equal >= (1.0 if beam_size == 1 else _ENOUGH) and self.score_difference < 0.1


@dataclass(frozen=True)
class DecodingRow:
    """What came of an implementation on a case."""

    case: Case
    implementation: str
    status: str
    reason: str = ""
    agreement: Agreement | None = None
    compile_seconds: float | None = None
    times: Times | None = None
    first: Times | None = None
    """Of calls with room for one token."""
    peak: Peak | None = None
    peers: Mapping[str, Times] = field(default_factory=dict)
    """The times of those that ours are compared with, on this case."""

    @property
    def rate(self) -> float | None:
        """Tokens a second, by the median."""
        return self.case.tokens / self.times.median if self.times else None

    def speed(self, peer: str) -> float | None:
        """How many times as fast as a peer, by the medians."""
        return self.peers[peer].median / self.times.median if self.times and peer in self.peers else None

    def record(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        times, first = self.times, self.first
        return {
            **asdict(self.case.sizes),
            "batch": self.case.batch,
            "beam_size": self.case.beam_size,
            "length": self.case.length,
            "dtype": "float32",
            "implementation": self.implementation,
            "status": self.status,
            "reason": self.reason,
            "tokens_per_second": self.rate,
            "median_seconds": times.median if times else None,
            "min_seconds": min(times.seconds) if times else None,
            "max_seconds": max(times.seconds) if times else None,
            "seconds": times.seconds if times else None,
            "calls_per_round": times.calls if times else None,
            "first_token_median_seconds": first.median if first else None,
            "first_token_seconds": first.seconds if first else None,
            **{f"speed_by_{name}": self.speed(name) for name in PEERS},
            "rows_equal": self.agreement.equal if self.agreement else None,
            "score_difference": self.agreement.score_difference if self.agreement else None,
            "compile_seconds": self.compile_seconds,
            **(asdict(self.peak) if self.peak else {}),
            **machine.describe(),
        }


def lines(rows: Sequence[DecodingRow]) -> list[str]:
    """The rows of one case under its name."""
    return [rows[0].case.name, *(table.aligned(_cells(row), _COLUMNS) for row in rows)]


def header() -> list[str]:
    """The names of the columns."""
    return [table.aligned(list(_COLUMNS), _COLUMNS)]


def footer() -> list[str]:
    """What the columns mean, and the machine."""
    return [*textwrap.wrap(LEGEND, 120), table.measured_on()]


def _cells(row: DecodingRow) -> list[str]:
    times, tokens, beyond = row.times, row.case.tokens, 0
    if row.peak:
        beyond = row.peak.process_peak_bytes - row.peak.process_idle_bytes
    slowest, fastest = (tokens / seconds for seconds in (max(times.seconds), min(times.seconds))) if times else (0, 0)
    speeds = [row.speed(name) for name in PEERS]
    return [
        row.implementation,
        table.number(tokens / times.median) if times else row.status.replace("-", " "),
        f"{table.number(slowest)} - {table.number(fastest)}" if times else "",
        *(f"{speed:.2f}x" if speed else "" for speed in speeds),
        table.number(row.first.median * 1e3) if row.first else "",
        table.number(beyond / 2**20) if row.peak else "",
        f"{row.agreement.equal:.1%}" if row.agreement else "",
        table.number(row.compile_seconds) if row.compile_seconds else "",
    ]

"""What came of one implementation of decoding on one case."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.bench.record import Record, seconds_of
from benchmarks.bench.timing import Times
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.implementations import PEERS

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


@dataclass(frozen=True, kw_only=True)
class DecodingRecord(Record):
    """A record with the times of first tokens and of peers, and how the tokens agree."""

    case: DecodingCase
    agreement: Agreement | None = None
    first: Times | None = None
    """Of calls with room for one token."""
    peers: Mapping[str, Times] = field(default_factory=dict)
    """The times of those that ours are compared with, on this case."""

    @property
    def rate(self) -> float | None:
        """Tokens a second, by the median."""
        return self.case.tokens / self.times.median if self.times else None

    def speed(self, peer: str) -> float | None:
        """How many times as fast as a peer, by the medians."""
        return self.speed_by(self.peers.get(peer))

    def own_fields(self) -> dict[str, Any]:
        """Rates, speeds and agreement, in units without prefixes."""
        return {
            "tokens_per_second": self.rate,
            **seconds_of(self.first, "first_token_"),
            **{f"speed_by_{name}": self.speed(name) for name in PEERS},
            "rows_equal": self.agreement.equal if self.agreement else None,
            "score_difference": self.agreement.score_difference if self.agreement else None,
        }

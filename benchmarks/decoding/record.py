"""The result of one implementation of decoding on one case."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.bench.record import Record, seconds_of
from benchmarks.bench.timing import Times
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.implementations import PEERS

_ENOUGH = 0.9  # required share of equal rows in beam search: float32 ties may be broken differently


@dataclass(frozen=True)
class Agreement:
    """How a result `[B, L]` compares with that of another implementation."""

    equal: float
    """Share of rows with all tokens equal."""
    score_difference: float
    """Largest difference between mean log probabilities per token of the rows, under our model."""

    @staticmethod
    def of(tokens: np.ndarray, scores: np.ndarray, others: np.ndarray, their_scores: np.ndarray) -> "Agreement":
        """Compares tokens `[B, L]` and scores `[B]`.

        Raises:
            ValueError: the shapes of the tokens differ.
        """
        if tokens.shape != others.shape:
            raise ValueError(f"tokens must have the shape {others.shape}, got {tokens.shape}")
        difference = np.abs(np.asarray(scores, np.float64) - their_scores)
        return Agreement(float((tokens == others).all(axis=1).mean()), float(difference.max()))

    def is_right(self, beam_size: int) -> bool:
        """Whether all rows are equal; with a beam, nearly all, if the others score as well."""
        return self.equal >= (1.0 if beam_size == 1 else _ENOUGH) and self.score_difference < 0.1


@dataclass(frozen=True, kw_only=True)
class DecodingRecord(Record):
    """A record with the times of first tokens and of other libraries, and the agreement of the tokens."""

    case: DecodingCase
    agreement: Agreement | None = None
    first: Times | None = None
    """Times of calls that decode a single token."""
    peers: Mapping[str, Times] = field(default_factory=dict)
    """Times of the libraries we compare with, on this case."""

    @property
    def rate(self) -> float | None:
        """Tokens per second, by the median."""
        return self.case.tokens / self.times.median if self.times else None

    def speed(self, peer: str) -> float | None:
        """Speed relative to another library, by the medians."""
        return self.speed_by(self.peers.get(peer))

    def own_fields(self) -> dict[str, Any]:
        """Returns rates, speeds and agreement, in base units."""
        return {
            "tokens_per_second": self.rate,
            **seconds_of(self.first, "first_token_"),
            **{f"speed_by_{name}": self.speed(name) for name in PEERS},
            "rows_equal": self.agreement.equal if self.agreement else None,
            "score_difference": self.agreement.score_difference if self.agreement else None,
        }

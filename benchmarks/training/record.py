"""What came of one implementation of updates on one model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.bench.record import Record, seconds_of
from benchmarks.bench.timing import Times
from benchmarks.training.case import TrainingCase

_TOLERANCES = {"loss": 1e-4, "gradient_norm": 1e-3, "next_loss": 1e-3}
"""Relative. An update changes each weight by the rate at first, however small its gradient: rounding decides some."""


@dataclass(frozen=True)
class Beginning:
    """What the first update came to, without dropout, and so what can be compared."""

    loss: float
    gradient_norm: float
    next_loss: float
    """That of the second update: what the first one's optimizer made of the gradient."""

    def differs(self, reference: "Beginning") -> str:
        """In what this is not as the reference; empty where it is."""
        theirs = asdict(reference)
        found = [
            f"{name.replace('_', ' ')} {value:.6g}, not {theirs[name]:.6g}"
            for name, value in asdict(self).items()
            if not abs(value - theirs[name]) <= _TOLERANCES[name] * abs(theirs[name])  # nor is what is not finite
        ]
        return ", ".join(found)


@dataclass(frozen=True)
class Work:
    """What an update of a case has to do, whoever does it, and what it is done on."""

    tokens: int
    """Without padding."""
    padded_tokens: int
    flop_per_token: float
    """F: floating-point operations of the products of our loss, forward, for a padded token."""
    peak_flop_per_second: float
    """P."""
    peak_source: str
    """Where that is from."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(Record):
    """A record with the work of an update, what the first one came to, and the times of its parts and of peers."""

    case: TrainingCase
    work: Work
    beginning: Beginning | None = None
    forward: Times | None = None
    """Of the loss alone."""
    gradient: Times | None = None
    """Of the loss and its gradient."""
    peers: Mapping[str, Times] = field(default_factory=dict)
    """The times of those that ours are compared with, on this case."""

    @property
    def rate(self) -> float | None:
        """Tokens a second without padding, by the median."""
        return self.work.tokens / self.times.median if self.times else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, as `train.engine.meter.Meter` has it."""
        return 3 * self.work.flop_per_token * self.rate / self.work.peak_flop_per_second if self.rate else None

    @property
    def speed(self) -> float | None:
        """How many times as fast as the faster peer, by the medians."""
        return self.speed_by(min(self.peers.values(), key=lambda times: times.median, default=None))

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """Of an update's time, by the medians: the loss, its gradient, and what the optimizer makes of it."""
        if not (self.times and self.forward and self.gradient):
            return None
        whole, gradient, forward = (x.median for x in (self.times, self.gradient, self.forward))
        return forward / whole, (gradient - forward) / whole, (whole - gradient) / whole

    def own_fields(self) -> dict[str, Any]:
        """Parts, rates, work, and what the first update came to, in units without prefixes."""
        return {
            **seconds_of(self.forward, "forward_"),
            **seconds_of(self.gradient, "gradient_"),
            "tokens_per_second": self.rate,
            "mfu": self.mfu,
            "speed_by_faster_peer": self.speed,
            **asdict(self.work),
            **(asdict(self.beginning) if self.beginning else {}),
        }

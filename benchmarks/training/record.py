"""The result of one implementation of updates on one model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.bench.record import Record, seconds_of
from benchmarks.bench.timing import Times
from benchmarks.training.case import TrainingCase

_TOLERANCES = {"loss": 1e-4, "gradient_norm": 1e-3, "next_loss": 1e-3}
"""Relative tolerances. AdamW's first update has the size of the learning rate even for tiny gradients, so rounding may
decide its sign.
"""


@dataclass(frozen=True)
class Beginning:
    """The results of the first update without dropout, which are comparable."""

    loss: float
    gradient_norm: float
    next_loss: float
    """Loss of the second update: checks the optimizer's step."""

    def differs(self, reference: "Beginning") -> str:
        """Returns how this differs from the reference; empty if it does not."""
        theirs = asdict(reference)
        found = [
            f"{name.replace('_', ' ')} {value:.6g}, not {theirs[name]:.6g}"
            for name, value in asdict(self).items()
            if not abs(value - theirs[name]) <= _TOLERANCES[name] * abs(theirs[name])  # also catches NaN
        ]
        return ", ".join(found)


@dataclass(frozen=True)
class Work:
    """The work of an update, independent of the implementation, and the device's peak."""

    tokens: int
    """Number of tokens without padding."""
    padded_tokens: int
    flop_per_token: float
    """F: forward floating-point operations of our loss's products, per padded token."""
    peak_flop_per_second: float
    """P: peak floating-point operations per second of the device."""
    peak_source: str
    """The source of P."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(Record):
    """A record with the work of an update, its first results, and the times of its parts and of other libraries."""

    case: TrainingCase
    work: Work
    beginning: Beginning | None = None
    forward: Times | None = None
    """Times of the loss alone."""
    gradient: Times | None = None
    """Times of the loss and its gradient."""
    peers: Mapping[str, Times] = field(default_factory=dict)
    """Times of the libraries we compare with, on this case."""

    @property
    def rate(self) -> float | None:
        """Tokens per second without padding, by the median."""
        return self.work.tokens / self.times.median if self.times else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, as defined in `train.engine.meter.Meter`."""
        return 3 * self.work.flop_per_token * self.rate / self.work.peak_flop_per_second if self.rate else None

    @property
    def speed(self) -> float | None:
        """Speed relative to the faster of the other libraries, by the medians."""
        return self.speed_by(min(self.peers.values(), key=lambda times: times.median, default=None))

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """Shares of an update's time, by the medians: the loss, its gradient, and the optimizer."""
        if not (self.times and self.forward and self.gradient):
            return None
        whole, gradient, forward = (x.median for x in (self.times, self.gradient, self.forward))
        return forward / whole, (gradient - forward) / whole, (whole - gradient) / whole

    def own_fields(self) -> dict[str, Any]:
        """Returns parts, rates, work and the results of the first update, in base units."""
        return {
            **seconds_of(self.forward, "forward_"),
            **seconds_of(self.gradient, "gradient_"),
            "tokens_per_second": self.rate,
            "mfu": self.mfu,
            "speed_by_faster_peer": self.speed,
            **asdict(self.work),
            **(asdict(self.beginning) if self.beginning else {}),
        }

"""One row of the training benchmark: one implementation on one model; and rows as people read them."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import machine, table
from benchmarks.memory import Peak
from benchmarks.timing import Times
from benchmarks.training_case import TrainingCase

_COLUMNS = {  # width in lines
    "implementation": 14,
    "step ms": 9,
    "min - max": 17,
    "tokens/s": 9,
    "MFU": 6,
    "by faster peer": 15,
    "fwd bwd opt %": 14,
    "MiB": 7,
    "loss": 8,
    "compile s": 9,
}

LEGEND = (
    "step ms: one update, the median of the rounds, and their range. tokens/s: of source and target, padding not "
    "counted. MFU: 3 F U / (t P), F operations of the products of our loss for a padded token, U tokens without "
    "padding in t seconds, P what the device could do. by faster peer: how many times the tokens/s of the faster one "
    "of those in PyTorch. fwd bwd opt %: of a step's time, that of the loss alone, what its gradient adds, and what "
    "AdamW adds, each timed as a program of its own in the same rounds (--parts). MiB: what a process that does "
    "nothing else came to hold beyond Python, libraries and the given weights: compilation, state, updates. loss: "
    "before the first update, without dropout. compile s: how much longer the first update took than the second; not "
    "in the times."
)

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


@dataclass(frozen=True)
class TrainingRow:
    """What came of an implementation on a case."""

    case: TrainingCase
    implementation: str
    status: str
    work: Work
    reason: str = ""
    beginning: Beginning | None = None
    compile_seconds: float | None = None
    times: Times | None = None
    forward: Times | None = None
    """Of the loss alone."""
    gradient: Times | None = None
    """Of the loss and its gradient."""
    peak: Peak | None = None
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
        fastest = min((times.median for times in self.peers.values()), default=None)
        return fastest / self.times.median if self.times and fastest else None

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """Of an update's time, by the medians: the loss, its gradient, and what the optimizer makes of it."""
        if not (self.times and self.forward and self.gradient):
            return None
        whole, gradient, forward = (x.median for x in (self.times, self.gradient, self.forward))
        return forward / whole, (gradient - forward) / whole, (whole - gradient) / whole

    def record(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        times, case = self.times, self.case
        return {
            "model": case.name,
            **asdict(case.sizes),
            "target_length": case.target_length,
            "rows": case.rows,
            "dropout_rate": case.dropout_rate,
            "label_smoothing": case.label_smoothing,
            "dtype": "float32",
            "implementation": self.implementation,
            "status": self.status,
            "reason": self.reason,
            "median_seconds": times.median if times else None,
            "min_seconds": min(times.seconds) if times else None,
            "max_seconds": max(times.seconds) if times else None,
            "seconds": times.seconds if times else None,
            "calls_per_round": times.calls if times else None,
            "forward_median_seconds": self.forward.median if self.forward else None,
            "forward_seconds": self.forward.seconds if self.forward else None,
            "gradient_median_seconds": self.gradient.median if self.gradient else None,
            "gradient_seconds": self.gradient.seconds if self.gradient else None,
            "tokens_per_second": self.rate,
            "mfu": self.mfu,
            "speed_by_faster_peer": self.speed,
            **asdict(self.work),
            **(asdict(self.beginning) if self.beginning else {}),
            "compile_seconds": self.compile_seconds,
            **(asdict(self.peak) if self.peak else {}),
            **machine.describe(),
        }


def lines(rows: Sequence[TrainingRow]) -> list[str]:
    """The rows of one case under its name and sizes."""
    case, work = rows[0].case, rows[0].work
    sizes = case.sizes
    title = (
        f"{case.name}: {sizes.num_layers} + {sizes.num_layers} layers of {sizes.model_dim}, hidden "
        f"{sizes.hidden_dim}, vocabulary {sizes.vocab_size:,}, dropout {case.dropout_rate}; {case.rows} rows of "
        f"{sizes.source_length} + {case.target_length}, {work.tokens:,} of {work.padded_tokens:,} tokens"
    )
    return [title, *(table.aligned(_cells(row), _COLUMNS) for row in rows)]


def header() -> list[str]:
    """The names of the columns."""
    return [table.aligned(list(_COLUMNS), _COLUMNS)]


def footer(rows: Sequence[TrainingRow]) -> list[str]:
    """What the columns mean, P, and the machine."""
    sources = dict.fromkeys(f"P: {row.work.peak_source}" for row in rows)
    return [*textwrap.wrap(LEGEND, 120), *sources, table.measured_on()]


def _cells(row: TrainingRow) -> list[str]:
    times, milli, beyond = row.times, 1e3, 0
    if row.peak:
        beyond = row.peak.process_peak_bytes - row.peak.process_idle_bytes
    return [
        row.implementation,
        table.number(times.median * milli) if times else row.status.replace("-", " "),
        f"{table.number(min(times.seconds) * milli)} - {table.number(max(times.seconds) * milli)}" if times else "",
        table.number(row.rate) if row.rate else "",
        f"{row.mfu:.1%}" if row.mfu else "",
        f"{row.speed:.2f}x" if row.speed else "",
        " ".join(f"{100 * share:.0f}" for share in row.shares) if row.shares else "",
        table.number(beyond / 2**20) if row.peak else "",
        f"{row.beginning.loss:.4f}" if row.beginning else "",
        table.number(row.compile_seconds) if row.compile_seconds is not None else "",
    ]

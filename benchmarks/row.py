"""One row of a benchmark: one implementation on one case, with everything that is known of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine
from benchmarks.case import Case
from benchmarks.exact import Error
from benchmarks.memory import Peak
from benchmarks.timing import Times

TIMED, CHECKED, WRONG, NOT_INSTALLED, REFUSED, FAILED = "timed checked WRONG not-installed refused failed".split()
"""Only what is right is timed; `checked` is what was right and not to be timed."""

_REASON = 200  # letters


@dataclass(frozen=True)
class Rate:
    """The times of a matrix product in the same rounds."""

    size: int
    times: Times

    @property
    def flops(self) -> float:
        """Floating-point operations a second."""
        return 2 * self.size**3 / self.times.median


@dataclass(frozen=True)
class Row:
    """What came of an implementation on a case."""

    case: Case
    implementation: str
    status: str
    reason: str = ""
    how: str = ""
    error: Error | None = None
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    peak: Peak | None = None
    times: Times | None = None
    product: Rate | None = None
    baseline: str = ""
    baseline_times: Times | None = None

    @property
    def speed(self) -> float | None:
        """How many times as fast as the baseline, by the medians."""
        return self.baseline_times.median / self.times.median if self.times and self.baseline_times else None

    @property
    def flops(self) -> float | None:
        """Useful operations a second."""
        return self.case.flops / self.times.median if self.times else None

    @property
    def product_share(self) -> float | None:
        """Useful operations a second, by those of the matrix product."""
        return self.flops / self.product.flops if self.flops and self.product else None

    def record(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        case, times = self.case, self.times
        return {
            "shape": case.shape.name,
            "origin": case.shape.origin,
            "batch": case.shape.batch,
            "length": case.shape.length,
            "num_keys": case.shape.size,
            "num_heads": case.shape.num_heads,
            "num_kv_heads": case.shape.kv_heads,
            "head_dim": case.shape.head_dim,
            "mask": case.pattern,
            "pass": case.direction,
            "dtype": case.dtype,
            "implementation": self.implementation,
            "mask_as": self.how,
            "status": self.status,
            "reason": self.reason,
            "median_seconds": times.median if times else None,
            "min_seconds": min(times.seconds) if times else None,
            "max_seconds": max(times.seconds) if times else None,
            "seconds": times.seconds if times else None,
            "calls_per_round": times.calls if times else None,
            "baseline": self.baseline,
            "speed": self.speed,
            "pairs": case.pairs,
            "useful_flop": case.flops,
            "flop_per_second": self.flops,
            "product_size": self.product.size if self.product else None,
            "product_flop_per_second": self.product.flops if self.product else None,
            "product_share": self.product_share,
            "planned_bytes": self.planned_bytes,
            **(asdict(self.peak) if self.peak else {}),
            "largest_error": self.error.largest if self.error else None,
            "relative_error": self.error.relative if self.error else None,
            "compile_seconds": self.compile_seconds,
            **machine.describe(),
        }

    def line(self) -> str:
        """The record as a line of JSON; what is not finite, for which JSON has no word, as text."""
        return line(self.record())


def line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON; what is not finite, for which JSON has no word, as text."""
    plain = {name: _finite(value) for name, value in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def refusal(exception: Exception) -> tuple[str, str]:
    """The status and the reason of an implementation that raised this."""
    if isinstance(exception, ModuleNotFoundError):
        return NOT_INSTALLED, str(exception)
    causes = exception.exceptions if isinstance(exception, ExceptionGroup) else (exception,)
    refused = all(isinstance(cause, NotImplementedError) for cause in causes)
    words = [str(cause) if refused else f"{type(cause).__name__}: {cause}" for cause in causes]
    reason = "; ".join(" ".join(word.split()) for word in dict.fromkeys(words))
    return REFUSED if refused else FAILED, reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

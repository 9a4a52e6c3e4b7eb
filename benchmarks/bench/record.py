"""What came of one implementation on one case: what every benchmark records of it, and its file of JSON lines."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from benchmarks.bench import machine
from benchmarks.bench.memory import Peak
from benchmarks.bench.program import Program
from benchmarks.bench.timing import Times

TIMED, CHECKED, WRONG, NOT_INSTALLED, REFUSED, FAILED = "timed checked WRONG not-installed refused failed".split()
"""Only what is right is timed; `checked` is what was right and not to be timed."""

Line = Mapping[str, Any]
"""A record as its line of JSON holds it. Pictures are drawn from lines, whether of this run or read from a file."""

_REASON = 200  # letters


class Case(Protocol):
    """What every implementation computes and is compared on."""

    @property
    def name(self) -> str:
        """As people read it, such as "64 sources, beam 4"."""
        ...

    def fields(self) -> dict[str, Any]:
        """Everything that decides what is computed, in units without prefixes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """What came of an implementation on a case. Each benchmark adds what it alone measures."""

    case: Case
    implementation: str
    status: str = CHECKED
    reason: str = ""
    times: Times | None = None
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    peak: Peak | None = None

    def own_fields(self) -> dict[str, Any]:
        """What this benchmark alone measures, in units without prefixes."""
        return {}

    def fields(self) -> dict[str, Any]:
        """Everything, in units without prefixes, with the machine it was measured on."""
        times = self.times
        return {
            **self.case.fields(),
            "implementation": self.implementation,
            "status": self.status,
            "reason": self.reason,
            **seconds_of(times),
            "min_seconds": min(times.seconds) if times else None,
            "max_seconds": max(times.seconds) if times else None,
            "calls_per_round": times.calls if times else None,
            **self.own_fields(),
            "compile_seconds": self.compile_seconds,
            "planned_bytes": self.planned_bytes,
            **(asdict(self.peak) if self.peak else {}),
            **machine.describe(),
        }

    def speed_by(self, others: Times | None) -> float | None:
        """How many times as fast as another one, by the medians."""
        return others.median / self.times.median if self.times and others else None

    def prepared(self, program: Program) -> Self:
        """The record with what is known of its program before it runs."""
        return replace(self, compile_seconds=program.compile_seconds, planned_bytes=program.planned_bytes)

    def wrong(self, reason: str) -> Self:
        """The record of a result that is not right."""
        return replace(self, status=WRONG, reason=f"{self.case.name}: {reason}")

    def refused(self, exception: Exception) -> Self:
        """The record of an implementation that raised this."""
        status, reason = _refusal(exception)
        return replace(self, status=status, reason=reason)

    def with_peak(self, measure: Callable[[], Peak]) -> Self:
        """The record with its peak where it is right; why there is none is told in `reason`."""
        if self.status not in (CHECKED, TIMED):
            return self
        try:
            return replace(self, peak=measure())
        except RuntimeError as error:
            return replace(self, reason=f"peak memory unknown: {error}")


def seconds_of(times: Times | None, prefix: str = "") -> dict[str, Any]:
    """The fields of some times: `median_seconds` and the `seconds` of all rounds, or None in both."""
    return {f"{prefix}median_seconds": times and times.median, f"{prefix}seconds": times and times.seconds}


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds a line of JSON for each record to a file; its folder need not be there.

    What is not finite, for which JSON has no word, is written as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            plain = {name: _finite(value) for name, value in record.fields().items()}
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of a file that `append` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _refusal(exception: Exception) -> tuple[str, str]:
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

"""The result of one implementation on one case: fields shared by all benchmarks, and the file of JSON lines."""

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

TIMED, CHECKED, COMPILED = "timed checked compiled".split()
WRONG, NOT_INSTALLED, REFUSED, FAILED = "WRONG not-installed refused failed".split()
"""Only right results are timed. `checked` marks a right result without timing, `compiled` one for other devices."""

Line = Mapping[str, Any]
"""A record as its line of JSON holds it. Charts are drawn from lines, of this run or of a file."""

_REASON = 200  # characters


class Case(Protocol):
    """What each implementation computes."""

    @property
    def name(self) -> str:
        """A readable name, for example "64 sources, beam 4"."""
        ...

    def fields(self) -> dict[str, Any]:
        """Everything that determines the computation, in base units."""
        ...


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of an implementation on a case. Each benchmark adds its own measurements."""

    case: Case
    implementation: str
    status: str = CHECKED
    reason: str = ""
    times: Times | None = None
    compile_seconds: float | None = None
    planned_bytes: int | None = None
    peak: Peak | None = None

    def own_fields(self) -> dict[str, Any]:
        """Returns the measurements of this benchmark alone, in base units."""
        return {}

    def fields(self) -> dict[str, Any]:
        """Returns everything in base units, with the machine that measured it."""
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
        """Speed relative to another implementation, by the medians."""
        return others.median / self.times.median if self.times and others else None

    def prepared(self, program: Program) -> Self:
        """Returns the record with what is known of its program before it runs."""
        return replace(self, compile_seconds=program.compile_seconds, planned_bytes=program.planned_bytes)

    def wrong(self, reason: str) -> Self:
        """Returns the record marked as wrong."""
        return replace(self, status=WRONG, reason=f"{self.case.name}: {reason}")

    def refused(self, exception: Exception) -> Self:
        """Returns the record of an implementation that raised this exception."""
        status, reason = _refusal(exception)
        return replace(self, status=status, reason=reason)

    def with_peak(self, measure: Callable[[], Peak]) -> Self:
        """Returns the record with its peak memory if its result is right; a failure goes into `reason`."""
        if self.status not in (CHECKED, TIMED):
            return self
        try:
            return replace(self, peak=measure())
        except RuntimeError as error:
            return replace(self, reason=f"peak memory unknown: {error}")


def seconds_of(times: Times | None, prefix: str = "") -> dict[str, Any]:
    """Returns the fields `median_seconds` and `seconds` (all rounds); None in both without times."""
    return {f"{prefix}median_seconds": times and times.median, f"{prefix}seconds": times and times.seconds}


def append(path: Path, records: Iterable[Record]) -> None:
    """Appends one line of JSON per record to a file, and creates its folder.

    Writes non-finite numbers as strings, since JSON has no form for them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            plain = {name: _finite(value) for name, value in record.fields().items()}
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> list[Line]:
    """Reads the lines of a file that `append` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _refusal(exception: Exception) -> tuple[str, str]:
    """Returns the status and the reason of an implementation that raised this exception."""
    if isinstance(exception, ModuleNotFoundError):
        return NOT_INSTALLED, str(exception)
    causes = exception.exceptions if isinstance(exception, ExceptionGroup) else (exception,)
    refused = all(isinstance(cause, NotImplementedError) for cause in causes)
    words = [str(cause) if refused else f"{type(cause).__name__}: {cause}" for cause in causes]
    reason = "; ".join(" ".join(word.split()) for word in dict.fromkeys(words))
    return REFUSED if refused else FAILED, reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

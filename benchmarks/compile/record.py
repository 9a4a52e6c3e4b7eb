"""The result of compiling one program for one target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.bench import machine
from benchmarks.bench.record import COMPILED, Record
from benchmarks.compile.program import Program
from benchmarks.compile.targets import Target

_REASON = 120  # characters


@dataclass(frozen=True)
class TargetCase:
    """The devices that programs are compiled for."""

    target: Target
    hello: Mapping[str, Any] = field(default_factory=dict)
    """The kind of the devices and the versions of their compiler, as the worker tells them."""

    @property
    def name(self) -> str:
        """The name of the target."""
        return self.target.name

    def fields(self) -> dict[str, Any]:
        """Returns what determines the devices."""
        return {
            "target": self.name,
            "topology": self.target.topology,
            "devices": self.target.count,
            "device_bytes": self.target.memory,
            "target_device": self.hello.get("device"),
            "target_versions": self.hello.get("versions"),
        }


@dataclass(frozen=True, kw_only=True)
class CompileRecord(Record):
    """What is known of a compiled program. `implementation` is its name, `planned_bytes` its peak on one device."""

    case: TargetCase
    sizes: Mapping[str, Any]
    """What the program computes, in base units."""
    answer: Mapping[str, Any]
    """What `benchmarks.compile.worker` answered."""

    @property
    def compiled(self) -> bool:
        """Whether there is a compiled program."""
        return self.status == COMPILED

    @property
    def fits(self) -> bool:
        """Whether there is a compiled program, and each device has the memory for it.

        The compiler for TPUs refuses a program that does not fit, that for GPUs does not.
        """
        return self.compiled and (self.planned_bytes or 0) <= self.case.target.memory

    @property
    def flop(self) -> float | None:
        """Floating-point operations of one device, if the devices share the work evenly."""
        return self.answer["flop"] / self.case.target.count if self.compiled else None

    @property
    def traffic(self) -> Sequence[Mapping[str, Any]]:
        """The collectives, by kind."""
        return self.answer.get("collectives", ())

    @property
    def warnings(self) -> Sequence[str]:
        """What the partitioner warned of."""
        return self.answer.get("warnings", ())

    def fields(self) -> dict[str, Any]:
        """Returns everything in base units, with the machine that compiled it."""
        answer = {name: value for name, value in self.answer.items() if name not in ("status", "reason", "flop")}
        return {
            "program": self.implementation,
            **self.case.fields(),
            **self.sizes,
            "status": self.status,
            "reason": self.reason,
            **answer,
            "planned_bytes": self.planned_bytes,
            "fits": self.fits,
            "flop_per_device": self.flop,
            **machine.describe(),
        }


def record_of(program: Program, target: Target, answer: Mapping[str, Any], hello: Mapping[str, Any]) -> CompileRecord:
    """Makes the record of an answer of the worker."""
    reason = answer.get("reason", "")
    parts = [answer.get(f"{part}_bytes") for part in ("argument", "output", "temp")]
    return CompileRecord(
        case=TargetCase(target, hello),
        implementation=program.name,
        status=answer["status"],
        reason=reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…",
        compile_seconds=answer.get("compile_seconds"),
        planned_bytes=None if None in parts else sum(part for part in parts if part is not None),
        sizes=program.sizes,
        answer=answer,
    )

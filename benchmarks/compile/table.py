"""The table of compiled programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bench import table
from benchmarks.bench.table import Column, Table, number
from benchmarks.compile.record import CompileRecord

_LEGEND = (
    "Everything is of one device. temp MiB: temporaries. moved MiB: what instructions and kernels read from the main "
    "memory and write to it, >= if a kernel or a loop counts once. peak GiB: arguments, results and temporaries, as "
    "the compiler plans them; donated arguments count once. collectives: bytes of the arrays (the result of an all- "
    "gather, else the operand) times how often, and the number of runs in brackets; '+' if a loop runs an unknown "
    "number of times and counts once. GFLOP: our own count of matrix products, shared evenly over the devices: >= if "
    "a loop counts once, <= if a kernel may skip tiles. computed: GFLOP of the products in the compiled program, "
    "without kernels (Pallas, cuDNN); more than GFLOP if devices repeat work. SPMD: warnings of the partitioner."
)
_SHORT = {
    "all-gather": "gather",
    "all-reduce": "reduce",
    "reduce-scatter": "scatter",
    "collective-permute": "permute",
    "all-to-all": "all-to-all",
}


def title(record: CompileRecord) -> str:
    """Returns the name of the target and its devices."""
    case = record.case
    versions = ", ".join(f"{name} {version}" for name, version in case.hello.get("versions", {}).items())
    return f"{case.name}: {case.target.count} x {case.hello.get('device', case.target.kind)} ({versions})"


def remarks(records: Sequence[CompileRecord]) -> list[str]:
    """Returns the warnings of the partitioner, each one once."""
    found: dict[str, list[str]] = {}
    for record in records:
        for warning in dict.fromkeys(each[:160] for each in record.warnings):
            found.setdefault(warning, []).append(f"{record.implementation} on {record.case.name}")
    return [f"[SPMD] {warning} ... ({', '.join(names)})" for warning, names in found.items()]


def size(count: float) -> str:
    """Formats a number of bytes.

    >>> [size(x) for x in (512, 3 * 2**20, 5 * 2**30)]
    ['0.5 KiB', '3.00 MiB', '5.00 GiB']
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 2 ** (10 * power) or power == 1:
            return f"{number(count / 2 ** (10 * power))} {unit}"
    raise AssertionError


def collectives(record: CompileRecord) -> str:
    """Returns the bytes and runs of each kind of collective and the kernels of a GPU, or why there is no program."""
    if not record.compiled:
        return record.reason
    found = [
        f"{_SHORT[each['kind']]} {size(each['bytes'])} ({each['runs']}{'' if each['exact'] else '+'})"
        for each in record.traffic
    ]
    memory = [] if record.fits else [f"more than the {size(record.case.target.memory)} of the device"]
    return ", ".join([*memory, *found, *map(_kernel, record.answer["kernels"])])


def _kernel(found: Mapping[str, Any]) -> str:
    shared = size(found["shared_bytes"])
    return f"{found['name']}: {found['registers']} registers, {found['spill_bytes']} B of spills, {shared}"


def _computed(record: CompileRecord) -> str:
    found = record.answer
    return f"{found['products_bound']}{number(found['products_flop'] / 1e9)}" if record.compiled else ""


def _moved(record: CompileRecord) -> str:
    found = record.answer
    if not record.compiled:
        return ""
    bound = "" if found["moved_exact"] else ">="
    return f"{bound}{number((found['moved_bytes'] + (found['kernel_bytes'] or 0)) / 2**20)}"


def _flop(record: CompileRecord) -> str:
    return f"{record.answer['flop_bound']}{number(record.flop / 1e9)}" if record.flop is not None else ""


TABLE = Table[CompileRecord](
    (
        Column("program", 39, table.implementation, left=True),
        Column("status", 8, table.without_times, left=True),
        Column("compile s", 9, table.compile_seconds),
        Column("temp MiB", 9, lambda record: number(record.answer["temp_bytes"] / 2**20) if record.compiled else ""),
        Column("moved MiB", 9, _moved),
        Column("peak GiB", 8, lambda record: number(record.planned_bytes / 2**30) if record.planned_bytes else ""),
        Column("GFLOP", 9, _flop),
        Column("computed", 9, _computed),
        Column("SPMD", 4, lambda record: str(len(record.warnings) or "") if record.compiled else ""),
        Column("collectives, or the reason", 26, collectives, left=True),
    ),
    title,
    _LEGEND,
    remarks,
)

"""Profiles the slowest row of a file: `python -m benchmarks.attention.profile ROWS --json FILE`.

    python -m benchmarks.attention.profile benchmarks/results/h200.jsonl --json benchmarks/results/h200-profile.jsonl

The slowest row has the fewest useful operations per second, among the rows of this library unless told otherwise. A
trace of some calls is reduced to the kernels with the most time, a line of JSON each.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.profiler import ProfileData

from benchmarks.attention import implementations
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.shapes import Shape
from benchmarks.bench import machine
from benchmarks.bench.program import Program
from benchmarks.bench.record import TIMED, Line, read
from benchmarks.bench.table import number
from train.devices import environment
from train.reports.profile import newest, own_times

_CALLS = 5


@dataclass(frozen=True)
class ProfileArguments:
    """Profiles the slowest row of a file."""

    rows: Annotated[Path, tyro.conf.Positional]
    """The file of JSON lines that `python -m benchmarks.attention --json` has written."""
    json: Path | None = None
    """File to append one line of JSON per kernel to."""
    implementation: str = "seqattn"
    """Only rows of implementations whose name begins so."""
    kernels: int = 12
    """The largest number of kernels to list."""


@dataclass(frozen=True)
class Kernel:
    """The time of one kernel of the device, over all calls in a trace."""

    kernel: str
    times_per_call: float
    """How often it runs in a call."""
    seconds_per_call: float
    """Its time in a call, without operations that are nested in it."""
    share: float
    """Its share of the time of all kernels."""


def slowest(lines: Iterable[Line], implementation: str = "") -> Line:
    """Returns the timed row with the fewest useful operations per second.

    Raises:
        ValueError: no row of such an implementation has a time.
    """
    timed = [line for line in lines if line["status"] == TIMED and line["implementation"].startswith(implementation)]
    if not timed:
        raise ValueError(f"no row of {implementation or 'any implementation'} has a time")
    return min(timed, key=lambda line: line["flop_per_second"])


def case_of(line: Line) -> AttentionCase:
    """Returns the case of a row.

    >>> from benchmarks.attention.shapes import named
    >>> case = AttentionCase(named("b1-t5-s7-n4-k2-d8")[0], "full", "fwd", "float32")
    >>> case_of(case.fields()) == case
    True
    """
    batch, length, heads, dim = (line[name] for name in ("batch", "length", "num_heads", "head_dim"))
    kv_heads = line["num_kv_heads"] if line["num_kv_heads"] != line["num_heads"] else 0
    num_keys = line["num_keys"] if line["num_keys"] != line["length"] else 0
    shape = Shape(line["shape"], batch, length, heads, dim, line["origin"], kv_heads, num_keys)
    return AttentionCase(shape, line["mask"], line["pass"], line["dtype"])


def trace(program: Program, calls: int = _CALLS) -> ProfileData:
    """Runs a program once to warm up, and returns a trace of some further calls."""
    program.wait(program.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = program.run()
            program.wait(result)
        return newest(Path(folder))


def kernels(found: ProfileData, calls: int = _CALLS) -> list[Kernel]:
    """Returns the kernels in a trace, those with the most time first.

    On a GPU these are the kernels and copies of its streams, elsewhere the operations of XLA.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    times: defaultdict[str, float] = defaultdict(float)
    for name, nanoseconds in _on_streams(found) or own_times(found):
        counts[name] += 1
        times[name] += nanoseconds
    total = sum(times.values()) or 1.0
    order = sorted(times, key=lambda name: -times[name])
    return [Kernel(name, counts[name] / calls, times[name] / calls / 1e9, times[name] / total) for name in order]


def _on_streams(found: ProfileData) -> list[tuple[str, float]]:
    """Returns name and nanoseconds of each kernel and copy on the streams of GPUs."""
    return [
        (event.name, event.duration_ns)
        for plane in found.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if re.match(r"Stream", line.name)
        for event in line.events
    ]


def lines_of(line: Line, found: Sequence[Kernel], most: int) -> list[dict[str, Any]]:
    """Returns the lines of JSON: the kernels with the most time, and the rest in one line."""
    of_row = {name: line[name] for name in ("shape", "mask", "pass", "dtype", "implementation", "median_seconds")}
    rest = found[most:]
    shown = [*found[:most]]
    if rest:
        parts = ([getattr(each, name) for each in rest] for name in ("times_per_call", "seconds_per_call", "share"))
        shown.append(Kernel(f"{len(rest)} others", *(sum(part) for part in parts)))
    return [of_row | asdict(each) | machine.describe() for each in shown]


def main(arguments: ProfileArguments) -> int:
    """Prints the kernels, and appends them to the file. Returns 1 if the trace has none, else 0."""
    row = slowest(read(arguments.rows), arguments.implementation)
    case = case_of(row)
    program = implementations.NAMES[row["implementation"]](case, case.inputs())
    lines = lines_of(row, kernels(trace(program)), arguments.kernels)
    print(f"{row['implementation']}, {case.name}: {number(row['median_seconds'] * 1e3)} ms a call in the table")
    for line in lines:
        print(
            f"{number(line['seconds_per_call'] * 1e3):>9} ms {line['share']:6.1%} {line['times_per_call']:7.1f} times  "
            f"{line['kernel'][:90]}"
        )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        with arguments.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return int(not lines)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(ProfileArguments, prog="python -m benchmarks.attention.profile")))

"""Compiles programs of this library for TPUs and GPUs, on a machine without them: `python -m benchmarks.compile`.

    python -m benchmarks.compile --short                      # what `make bench-compile` runs: some minutes
    python -m benchmarks.compile --json benchmarks/results/compile.jsonl --plot benchmarks/results/compile.png
    python -m benchmarks.compile --programs update/base-scan ring --targets v5e-8
    python -m benchmarks.compile --list

The compilers of Google (libtpu) and of NVIDIA (the CUDA plugin of JAX) compile ahead of time on any machine. A row says
whether they accept a program and, if so, how much memory it takes, what its devices send to each other, and how many
operations it has. Nothing runs, so a row says nothing of results and time.

Each target is compiled in a process of its own, with the packages of `.venv-aot-tpu` or `.venv-aot-gpu`, which `make`
installs. A program that crashes the compiler or takes too long is a row with the reason.
"""

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.bench import command
from benchmarks.bench.record import append
from benchmarks.bench.table import measured_on
from benchmarks.compile import programs, targets
from benchmarks.compile.chart import temporaries
from benchmarks.compile.child import Child
from benchmarks.compile.program import Program, matching
from benchmarks.compile.record import CompileRecord, record_of
from benchmarks.compile.table import TABLE
from benchmarks.compile.targets import TARGETS, Target, check_installed
from train.devices import environment
from train.reports.progress import Progress


@dataclass(frozen=True)
class CompileArguments:
    """Compiles each program for each target with as many devices as it is made for.

    Lists are words separated by spaces or commas.
    """

    programs: command.Words = ()
    """Names of programs, or their beginnings, such as attention/chunked; see --list. All if not given."""
    targets: command.Words = ()
    """Any of v5e, v5p, v6e with 1, 4, 8 or 256 chips, such as v5e-8, and h200-1, h200-8. All if not given."""
    short: bool = False
    """Attention with two masks for v5e and H200 alone, unless programs or targets are given."""
    seconds: int | None = None
    """Time limit for each program, in place of its own."""
    json: Path | None = None
    """File to append one line of JSON per row to."""
    plot: Path | None = None
    """Chart of the temporaries of attention, written as PNG and SVG."""
    show_list: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the names of all programs and targets, and compile nothing."""


def plan(arguments: CompileArguments) -> list[tuple[Target, list[Program]]]:
    """Resolves the arguments to programs for each target.

    Raises:
        ValueError: a name is unknown, no program is made for the targets, or a compiler is not installed.
    """
    names = command.words(arguments.targets) or (targets.SHORT if arguments.short else tuple(TARGETS))
    command.check("target", names, TARGETS)
    wanted = command.words(arguments.programs) or (programs.SHORT if arguments.short else tuple(programs.PROGRAMS))
    found = matching(wanted, programs.PROGRAMS)
    if arguments.seconds is not None and arguments.seconds < 1:
        raise ValueError(f"seconds ({arguments.seconds}) must be at least 1")
    pairs = [(TARGETS[name], [each for each in found if each.is_for(TARGETS[name])]) for name in names]
    pairs = [(target, made) for target, made in pairs if made]
    if not pairs:
        made_for = [name for name, target in TARGETS.items() if any(program.is_for(target) for program in found)]
        raise ValueError(f"these programs are made for {', '.join(made_for)}, not for {', '.join(names)}")
    check_installed([target for target, _ in pairs])
    return pairs


def compile_all(pairs: Sequence[tuple[Target, Sequence[Program]]], limit: int | None) -> Iterator[CompileRecord]:
    """Yields a record for each program and target."""
    for target, made in pairs:
        with Child(target, limit) as child:
            for program in made:
                answer = child.compile(program.name, program.seconds)
                yield record_of(program, target, answer, child.hello)


def parse(arguments: Sequence[str] | None = None) -> CompileArguments:
    """Parses a command line. Defaults to that of this process."""
    return tyro.cli(CompileArguments, prog="python -m benchmarks.compile", args=arguments)


def main(arguments: CompileArguments) -> int:
    """Prints the table. Returns 1 if no program compiles, else 0."""
    if arguments.show_list:
        print(*programs.PROGRAMS, *TARGETS, sep="\n")
        return 0
    pairs = plan(arguments)
    records: list[CompileRecord] = []
    with Progress(sum(len(made) for _, made in pairs)) as progress:
        progress.print(TABLE.header())
        for record in compile_all(pairs, arguments.seconds):
            lines = TABLE.lines([record])
            is_first = not records or records[-1].case.target != record.case.target
            progress.print("\n".join(lines if is_first else lines[1:]))
            records.append(record)
            if arguments.json is not None:
                append(arguments.json, [record])
            progress.update(len(records))
    # Unlike other tables, this one has its reasons in the rows.
    print(*textwrap.wrap(TABLE.legend, 120), *TABLE.remarks(records), measured_on(), sep="\n")
    command.plot(records, temporaries, arguments.plot)
    return int(not any(record.compiled for record in records))


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
    environment.command(lambda: main(parse()))

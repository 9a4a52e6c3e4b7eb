"""Runs the compiled programs of one device, and compares their results with the CPU's.

    python -m benchmarks.compile.execution --json benchmarks/results/h200-compiled.jsonl
    python -m benchmarks.compile.execution --programs kernel attention/hopper --seconds 60

The programs are those of `python -m benchmarks.compile` for one device of this machine. Every input is drawn from a
seed, so that a second process, on the CPU, gets the same ones: it computes `chunked` attention in the place of the
device's kernel, and the same update and step of decoding. Programs are compared in the order of the list until the time
is over.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.bench import command, machine
from benchmarks.bench.record import NOT_INSTALLED, REFUSED, WRONG
from benchmarks.compile.arguments import arguments_of
from benchmarks.compile.attention_programs import LENGTH, attention_programs
from benchmarks.compile.decoding_programs import decoding_programs
from benchmarks.compile.kernel_programs import kernel_programs
from benchmarks.compile.program import Program, first_line, matching
from train.devices import environment

AGREES, NOT_COMPARED, FAILED = "agrees", "not compared", "failed"
_TOLERANCES = {"attention": 2e-2, "kernel": 2e-2, "decode": 5e-2, "update": 1e-1}
"""The largest error of an array relative to the CPU's, root mean square, by the group of programs. All compute in
bfloat16; an update squares gradients."""
_SUM = 5
"""How much larger the error of an array of at most one dim may be, whose numbers are sums over all pairs."""


@dataclass(frozen=True)
class ExecutionArguments:
    """Runs the programs for one device, and compares their results with the CPU's."""

    programs: command.Words = ()
    """Names of programs, or their beginnings, such as attention/hopper. All if not given."""
    length: int = LENGTH
    """Number of queries and keys of attention, a multiple of 128. The names of programs contain it."""
    seconds: float = 300
    """No program is begun after this time. Both processes have it."""
    json: Path | None = None
    """File to append one line of JSON per program to."""
    write: Path | None = None
    """Compute on this process's device, and only write the results into a folder."""
    against: Path | None = None
    """Compare with the results in a folder, instead of computing them in a second process."""


def programs_here(length: int) -> tuple[dict[str, Program], dict[str, str]]:
    """Returns the programs for one GPU, and for groups whose libraries are missing the reason."""
    found, missing = [*kernel_programs(length), *attention_programs(length, long=None), *decoding_programs()], {}
    try:
        from benchmarks.compile.update_programs import update_programs

        found += update_programs()
    except ModuleNotFoundError as error:
        missing["update"] = str(error)
    here = [each for each in found if 1 in each.counts and "gpu" in each.platforms]
    # Backward programs have the results of the forward ones, too.
    here.sort(key=lambda each: each.name.endswith("/fwd"))
    return {each.name: each for each in here}, missing


def reference_of(name: str) -> str:
    """Returns the program that the CPU computes in the place of one.

    >>> reference_of("attention/hopper/causal/t8192/fwd"), reference_of("decode/base/t4096")
    ('attention/chunked/causal/t8192/fwd', 'decode/base/t4096')
    """
    return re.sub(r"^attention/[^/]+/", "attention/chunked/", name)


def run(program: Program, device: jax.Device) -> tuple[list[np.ndarray], dict[str, int]]:
    """Returns the results of a program on a device, and the libraries and kernels that it calls, with their numbers."""
    built = program.build([device], device.platform)
    compiled = built.lowered.compile()
    called = Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text() or ""))
    args, kwargs = arguments_of(program, built.lowered.args_info)
    results = compiled(*args, **kwargs)
    return [np.asarray(x) for x in jax.tree.leaves(results)], dict(called)


def errors(results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Returns for each array its error relative to the expected one, root mean square; inf for NaN in another place."""
    found = []
    for mine, wanted in zip(results, expected, strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (mine, wanted))
        if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
            found.append(float("inf"))
            continue
        finite = np.isfinite(b)
        off, size = (float(np.sqrt(np.square(x[finite]).sum())) for x in (a - b, b))
        found.append(off / size if size else off)
    return found


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.npz"


def write_all(programs: dict[str, Program], folder: Path, deadline: float) -> None:
    """Writes what the CPU computes for each program, until the deadline."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        if time.monotonic() > deadline:
            print(f"{name}: the time is over", flush=True)
            return
        begun = time.monotonic()
        try:
            results, _ = run(program, jax.devices()[0])
        except Exception as error:  # a failure of one program must not end the others
            print(f"{name}: {first_line(error)}", flush=True)
            continue
        # The other process must not read a part of a file.
        partial = _path(folder, name).with_suffix(".part")
        with partial.open("wb") as file:
            np.savez(file, *map(_widened, results))
        partial.rename(_path(folder, name))
        print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)


def _widened(x: np.ndarray) -> np.ndarray:
    """Returns an array that NumPy's files can hold: they know no bfloat16."""
    return x.astype(np.float32) if x.dtype == jax.numpy.bfloat16 else x


def compare(program: Program, folder: Path) -> dict[str, Any]:
    """Runs a program and compares its results with those in a folder. Returns the fields of its line."""
    wanted = _path(folder, reference_of(program.name))
    if not wanted.exists():
        return {"status": NOT_COMPARED, "reason": "there is no result of the CPU: it failed, or its time was over"}
    begun = time.perf_counter()
    try:
        results, called = run(program, jax.devices()[0])
        with np.load(wanted) as file:
            found = errors(results, [file[name] for name in file.files])
        _check_called(program, called)
    except NotImplementedError as error:
        return {"status": REFUSED, "reason": first_line(error)}
    except Exception as error:  # a failure of one program must not end the others
        return {"status": FAILED, "reason": first_line(error)[:200]}
    tolerance, worst = _TOLERANCES[program.group], max(found)
    wrong = [i for i, x in enumerate(results) if not found[i] <= tolerance * (1 if x.ndim > 1 else _SUM)]
    return {
        "status": WRONG if wrong else AGREES,
        "reason": f"array {wrong[0]} of {len(found)} differs by {found[wrong[0]]:.2g}" if wrong else "",
        "largest_relative_error": worst if np.isfinite(worst) else str(worst),
        "relative_errors": [each if np.isfinite(each) else str(each) for each in found[:8]],
        "tolerance": tolerance,
        "calls": called,
        "seconds_with_compilation": time.perf_counter() - begun,
    }


_CALLS = {"hopper": "mosaic_gpu", "hopper_cached": "mosaic_gpu", "cudnn": "__cudnn"}
"""What the calls of a kernel for GPUs are named after, by the word in a program's name."""


def _check_called(program: Program, called: dict[str, int]) -> None:
    """Raises RuntimeError if a program on a GPU does without the kernel that it is about."""
    if machine.platform_name() != "gpu":
        return
    for word in program.name.split("/"):
        if word in _CALLS and not any(_CALLS[word] in name for name in called):
            raise RuntimeError(f"the program does not call {word}, but {', '.join(called) or 'nothing'}")


def compare_all(
    programs: dict[str, Program], folder: Path, deadline: float
) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Yields the outcome of each program, in order."""
    for program in programs.values():
        is_late = time.monotonic() > deadline
        yield program, {"status": NOT_COMPARED, "reason": "the time was over"} if is_late else compare(program, folder)


def _on_the_cpu(arguments: ExecutionArguments, folder: Path) -> None:
    """Computes the results of the CPU in a process that has no other device."""
    words = ["--write", str(folder), "--length", str(arguments.length), "--seconds", str(arguments.seconds)]
    words += ["--programs", *arguments.programs] if arguments.programs else []
    call = [sys.executable, "-m", "benchmarks.compile.execution", *words]
    subprocess.run(call, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2], check=False)


def main(arguments: ExecutionArguments) -> int:
    """Prints a line for each program.

    Returns 1 if a result is wrong, a program fails, or none is compared or written; else 0.
    """
    if arguments.length < 128 or arguments.length % 128:
        raise ValueError(f"length ({arguments.length}) must be a multiple of 128")
    begun = time.monotonic()
    every, missing = programs_here(arguments.length)
    # Groups whose libraries are missing are told, not unknown.
    words = [word for word in command.words(arguments.programs) if word.split("/")[0] not in missing]
    named = {word.split("/")[0] for word in command.words(arguments.programs)} or set(missing)
    chosen = matching(words, every) if words or arguments.programs else list(every.values())
    programs = {each.name: each for each in chosen}
    if arguments.write is not None:
        write_all(
            {name: every[name] for name in map(reference_of, programs)}, arguments.write, begun + arguments.seconds
        )
        written = any(arguments.write.glob("**/*.npz"))
        return int(not written)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.against or Path(temporary)
        if arguments.against is None:
            _on_the_cpu(arguments, folder)
            begun = time.monotonic()
        outcomes = []
        for program, fields in compare_all(programs, folder, begun + arguments.seconds):
            outcomes.append(fields["status"])
            _show(program.name, program.sizes, fields, arguments.json)
    for group, reason in missing.items():
        if group in named:
            _show(group, {}, {"status": NOT_INSTALLED, "reason": reason}, arguments.json)
    print(*(f"{count} {status}" for status, count in Counter(outcomes).items()), sep=", ")
    return int(AGREES not in outcomes or WRONG in outcomes or FAILED in outcomes)


def _show(name: str, sizes: dict[str, Any], fields: dict[str, Any], json_file: Path | None) -> None:
    error = fields.get("largest_relative_error", "")
    error = f"{error:.1e}" if isinstance(error, float) else error
    print(f"{name:42} {fields['status']:13} {error:9} {fields['reason']}".rstrip(), flush=True)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with json_file.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"program": name, **sizes, **fields, **machine.describe()}, ensure_ascii=False) + "\n"
            )


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(ExecutionArguments, prog="python -m benchmarks.compile.execution")))

"""The process that compiles for one target: reads names of programs, a line each, and answers each with a line of JSON.

    .venv-aot-tpu/bin/python -m benchmarks.compile.worker v5e-8

It runs in the environment that holds the target's compiler. `benchmarks.compile.child` starts it, ends it if it takes
too long, and reads what the compiler prints to stderr.
"""

import json
import os
import re
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from benchmarks.compile.collectives import traffic
from benchmarks.compile.kernels import kernels, tpu_kernels, variables
from benchmarks.compile.moved import moved
from benchmarks.compile.products import products
from benchmarks.compile.program import Program, first_line
from benchmarks.compile.programs import PROGRAMS
from benchmarks.compile.targets import TARGETS, Target

_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def answer(program: Program, target: Target, devices: Any, reports: Path) -> dict[str, Any]:
    """Compiles a program. Returns what is known of it, or why it did not compile.

    Args:
        program: the program.
        target: what it is compiled for.
        devices: the target's devices.
        reports: the folder of `kernels.variables`, which is emptied first.
    """
    for report in reports.iterdir():
        report.unlink()
    begun = time.perf_counter()
    try:
        built = program.build(devices, target.platform)
        lowered = time.perf_counter()
        compiled = built.lowered.compile()
    except NotImplementedError as error:
        return {"status": "refused", "reason": first_line(error)}
    except Exception as error:  # the compiler's own, of many types
        return {"status": "failed", "reason": first_line(error), "seconds": time.perf_counter() - begun}
    done, memory, text = time.perf_counter(), compiled.memory_analysis(), compiled.as_text() or ""
    if memory is None:
        return {"status": "failed", "reason": "the compiler does not say how much memory the program takes"}
    done_by_each, bytes_moved = products(text), moved(text, kernels=built.kernel_bytes is None)
    return {
        "status": "compiled",
        "lower_seconds": lowered - begun,
        "compile_seconds": done - lowered,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "text_bytes": len(text),
        "kernels": [vars(each) for each in kernels(reports)],
        "tpu_kernels": tpu_kernels(text),
        "loops": len(re.findall(r" while\(", text)),
        "collectives": [vars(each) for each in traffic(text)],
        "moved_bytes": bytes_moved.main,
        "moved_in_any_memory_bytes": bytes_moved.all,
        "moved_exact": bytes_moved.exact,
        "kernel_bytes": built.kernel_bytes,
        "products_flop": done_by_each.flop,
        "products_bound": done_by_each.bound,
        "flop": built.work.flop,
        "flop_bound": built.work.bound,
    }


def main(name: str) -> None:
    """Answers until there are no more names."""
    # Only answers go to stdout: what a compiler prints there joins stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= variables(Path(folder))
        _answer_all(TARGETS[name], Path(folder), answers)


def _answer_all(target: Target, reports: Path, answers: TextIO) -> None:
    devices = target.devices()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    say({"device": devices[0].device_kind, "versions": _versions()})
    for line in sys.stdin:
        say(answer(PROGRAMS[line.strip()], target, devices, reports))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])

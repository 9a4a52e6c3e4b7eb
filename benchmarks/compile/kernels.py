"""Pallas kernels in compiled programs: for NVIDIA GPUs (Mosaic) with registers, spills and shared memory, as their
assembler reports them; for TPUs by name."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATIC = re.compile(r"(\d+) bytes smem")
_TPU = re.compile(r"%(\w+?)(?:\.\d+)? = [^\n]* custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"")
_DYNAMIC = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")


@dataclass(frozen=True)
class Kernel:
    """What one kernel occupies."""

    name: str
    registers: int
    """Registers of each thread."""
    spill_bytes: int
    """Bytes of registers that a thread stores in memory for lack of registers, and loads again."""
    shared_bytes: int
    """Bytes of shared memory of each block; at most 232,448 on an H200."""


def variables(folder: Path) -> Mapping[str, str]:
    """Returns the environment variables with which JAX writes the reports of all kernels that it compiles."""
    return {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_PTX": "1"}


def kernels(folder: Path) -> list[Kernel]:
    """Reads the reports in a folder, in the order in which the kernels were compiled."""
    reports = sorted(folder.glob("*.ptxas"), key=lambda path: path.stat().st_mtime_ns)
    found = []
    for report in reports:
        passes = report.with_suffix(".mlir-passes.log")
        found += read(report.read_text(), passes.read_text() if passes.exists() else "")
    return found


def read(report: str, passes: str = "") -> list[Kernel]:
    """Reads what `ptxas -v` prints, and the size of the dynamic shared memory in the program before assembly.

    >>> read('''
    ... ptxas info    : Compiling entry function 'kern' for 'sm_90a'
    ...     0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
    ... ptxas info    : Used 68 registers, used 2 barriers, 1 bytes smem
    ... ''', "dynamic_shared_memory_size %c32776_i32")
    [Kernel(name='kern', registers=68, spill_bytes=24, shared_bytes=32777)]
    """
    dynamic = _DYNAMIC.search(passes)
    found = []
    for name, text in zip(_ENTRY.findall(report), _ENTRY.split(report)[2::2], strict=True):
        spills, registers, static = _SPILLS.search(text), _REGISTERS.search(text), _STATIC.search(text)
        found.append(
            Kernel(
                name,
                int(registers[1]) if registers else 0,
                int(spills[1]) + int(spills[2]) if spills else 0,
                (int(static[1]) if static else 0) + (int(dynamic[1]) if dynamic else 0),
            )
        )
    return found


def tpu_kernels(text: str) -> dict[str, int]:
    """Returns the Pallas kernels for TPUs in the text of a compiled program, with their numbers.

    >>> line = '%splash.3 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    >>> tpu_kernels(f"{line}\\n{line.replace('.3', '.4')}")
    {'splash': 2}
    """
    return dict(Counter(_TPU.findall(text)))

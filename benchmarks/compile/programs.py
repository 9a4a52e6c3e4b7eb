"""All programs, by name."""

from benchmarks.compile.attention_programs import attention_programs, ring_programs, split_programs
from benchmarks.compile.decoding_programs import decoding_programs
from benchmarks.compile.kernel_programs import kernel_programs
from benchmarks.compile.program import Program
from benchmarks.compile.update_programs import evaluation_programs, update_programs

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        *attention_programs(),
        *kernel_programs(),
        *split_programs(),
        *ring_programs(),
        *update_programs(),
        *evaluation_programs(),
        *decoding_programs(),
    )
}

SHORT = tuple(
    name
    for name, program in PROGRAMS.items()
    if program.group == "attention" and "/t8192/" in name and program.sizes["mask"] in ("causal", "documents")
)
"""Attention of every implementation, forward and backward."""

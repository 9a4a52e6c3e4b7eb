"""The table of attention records."""

from collections.abc import Sequence

from benchmarks.attention.case import BACKWARD
from benchmarks.attention.record import AttentionRecord
from benchmarks.bench import table
from benchmarks.bench.table import Column, Table, number

_LEGEND = (
    "ms: median over the rounds, with their range. speed: relative to the baseline. TFLOP/s: useful operations, for "
    f"visible pairs only; bwd is forward and backward, counted as {BACKWARD} times the forward pass. of product: share "
    "of the throughput of a plain matrix product in the same rounds. planned MiB: arguments, results and temporaries "
    "in XLA's plan (PyTorch on a GPU: the peak of its allocator). peak MiB: of a process for this case alone, with "
    "Python and JAX. error: largest absolute error against float64. compile s: once per shape, not part of ms."
)


def title(record: AttentionRecord) -> str:
    """Returns the name of the case and its sizes."""
    case, shape = record.case, record.case.shape
    sizes = f"B{shape.batch} T{shape.length} N{shape.num_heads} D{shape.head_dim}"
    sizes += f" S{shape.size}" if shape.num_keys else ""
    sizes += f" K{shape.kv_heads}" if shape.num_kv_heads else ""
    return f"{case.name} ({sizes}, {case.dtype})"


def remarks(records: Sequence[AttentionRecord]) -> list[str]:
    """Returns the baseline and the throughput of the matrix product."""
    lines = [f"baseline: {records[0].baseline}"] if records else []
    products = sorted((record.product for record in records if record.product), key=lambda product: product.flops)
    if products:
        size, (slowest, fastest) = products[0].size, (number(products[i].flops / 1e12) for i in (0, -1))
        lines.append(f"product of {size} x {size}: {slowest} to {fastest} TFLOP/s")
    return lines


TABLE = Table[AttentionRecord](
    (
        Column("implementation", 20, table.implementation, left=True),
        Column("ms", 13, table.milliseconds),
        Column("min - max", 19, table.milliseconds_range),
        Column("speed", 9, lambda record: f"{record.speed:.2f}x" if record.speed else ""),
        Column("TFLOP/s", 9, lambda record: number(record.flops / 1e12) if record.flops else ""),
        Column("of product", 11, lambda record: f"{record.product_share:.0%}" if record.product_share else ""),
        Column("planned MiB", 12, table.planned_mebibytes),
        Column("peak MiB", 9, lambda record: number(record.peak.process_peak_bytes / 2**20) if record.peak else ""),
        Column("error", 9, lambda record: f"{record.error.largest:.1e}" if record.error else ""),
        Column("compile s", 10, table.compile_seconds),
        Column("mask as", 30, lambda record: record.how, left=True),
    ),
    title,
    _LEGEND,
    remarks,
)

"""The table of training records."""

from collections.abc import Sequence

from benchmarks.bench import table
from benchmarks.bench.table import Column, Table, number
from benchmarks.training.record import TrainingRecord

_LEGEND = (
    "step ms: one update, median over the rounds, with their range. tokens/s: source and target tokens without "
    "padding. MFU: 3 F U / (t P), with F operations of our loss's products per padded token, U tokens without padding "
    "in t seconds, and P the peak of the device. by faster peer: tokens/s relative to the faster of the PyTorch "
    "implementations. fwd bwd opt %: shares of a step's time: the loss alone, what its gradient adds, what AdamW adds, "
    "each timed as its own program in the same rounds (--parts). MiB: peak memory of a process for this case alone, "
    "beyond Python, libraries and the given weights: compilation, state, updates. loss: before the first update, "
    "without dropout. compile s: how much longer the first update took than the second; not part of the times."
)


def title(record: TrainingRecord) -> str:
    """Returns the name of the case and its sizes."""
    case, sizes, work = record.case, record.case.sizes, record.work
    return (
        f"{case.name}: {sizes.num_layers} + {sizes.num_layers} layers of {sizes.model_dim}, hidden "
        f"{sizes.hidden_dim}, vocabulary {sizes.vocab_size:,}, dropout {case.dropout_rate}; {case.rows} rows of "
        f"{sizes.source_length} + {case.target_length}, {work.tokens:,} of {work.padded_tokens:,} tokens"
    )


def remarks(records: Sequence[TrainingRecord]) -> list[str]:
    """Returns the source of P."""
    return list(dict.fromkeys(f"P: {record.work.peak_source}" for record in records))


def _shares(record: TrainingRecord) -> str:
    return " ".join(f"{100 * share:.0f}" for share in record.shares) if record.shares else ""


TABLE = Table[TrainingRecord](
    (
        Column("implementation", 14, table.implementation, left=True),
        Column("step ms", 9, table.milliseconds),
        Column("min - max", 17, table.milliseconds_range),
        Column("tokens/s", 9, lambda record: number(record.rate) if record.rate else ""),
        Column("MFU", 6, lambda record: f"{record.mfu:.1%}" if record.mfu else ""),
        Column("by faster peer", 15, lambda record: f"{record.speed:.2f}x" if record.speed else ""),
        Column("fwd bwd opt %", 14, _shares),
        Column("MiB", 7, table.mebibytes_beyond_idle),
        Column("loss", 8, lambda record: f"{record.beginning.loss:.4f}" if record.beginning else ""),
        Column("compile s", 9, table.compile_seconds),
    ),
    title,
    _LEGEND,
    remarks,
)

"""The table of decoding records."""

from collections.abc import Callable

from benchmarks.bench import table
from benchmarks.bench.table import Column, Table, number
from benchmarks.decoding.implementations import PEERS
from benchmarks.decoding.record import DecodingRecord

_LEGEND = (
    "tokens/s: tokens of the best hypotheses, by the median over the rounds, with the range. by: tokens/s relative to "
    "this library. first token ms: the same call for a single token, encoder included. MiB: peak memory of a process "
    "for this case alone, beyond Python and libraries: weights, compilation, one call. rows equal: share of sources "
    "with exactly the tokens of the first other library. compile s: once, not part of the times."
)


def _rate(record: DecodingRecord) -> str:
    return number(record.rate) if record.rate else table.without_times(record)


def _rate_range(record: DecodingRecord) -> str:
    times, tokens = record.times, record.case.tokens
    return f"{number(tokens / max(times.seconds))} - {number(tokens / min(times.seconds))}" if times else ""


def _speed(peer: str) -> Callable[[DecodingRecord], str]:
    def text(record: DecodingRecord) -> str:
        speed = record.speed(peer)
        return f"{speed:.2f}x" if speed else ""

    return text


TABLE = Table[DecodingRecord](
    (
        Column("implementation", 14, table.implementation, left=True),
        Column("tokens/s", 9, _rate),
        Column("min - max", 15, _rate_range),
        *(Column(f"by {peer}", 16, _speed(peer)) for peer in PEERS),
        Column("first token ms", 14, lambda record: number(record.first.median * 1e3) if record.first else ""),
        Column("MiB", 7, table.mebibytes_beyond_idle),
        Column("rows equal", 10, lambda record: f"{record.agreement.equal:.1%}" if record.agreement else ""),
        Column("compile s", 9, table.compile_seconds),
    ),
    lambda record: record.case.name,
    _LEGEND,
)

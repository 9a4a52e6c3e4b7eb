"""Records of attention as people read them."""

import io

from benchmarks.attention.case import AttentionCase
from benchmarks.attention.exact import Error
from benchmarks.attention.product import ProductRate
from benchmarks.attention.record import AttentionRecord
from benchmarks.attention.shapes import named
from benchmarks.attention.table import TABLE
from benchmarks.bench.record import REFUSED, TIMED
from benchmarks.bench.timing import Times

CASE = AttentionCase(named("b1-t1000-n5-d10")[0], "full", "bwd", "float32")
FAST = AttentionRecord(
    case=CASE,
    implementation="fast",
    status=TIMED,
    error=Error(1e-6, 1e-7, True),
    how="is_causal",
    times=Times((0.2, 0.1, 0.4), 1),
    product=ProductRate(1000, Times((0.01,), 1)),
    planned_bytes=3 << 20,
    baseline="slow",
    baseline_times=Times((0.6,), 1),
)
NONE = AttentionRecord(case=CASE, implementation="none", status=REFUSED, reason="too small")


def test_units():
    # 1000 x 1000 pairs x 5 heads x dim 10 x 4 x 3.5 = 7e8 in 0.2 s; the product does 2e9 in 0.01 s.
    expected = ["fast", "200", "100 - 400", "3.00x", "0.0035", "2%", "3.00", "", "1.0e-06", "", "is_causal"]
    assert TABLE.cells(FAST) == expected


def test_lines_are_aligned_and_tell_what_has_no_time():
    header, (title, fast, none) = TABLE.header(), TABLE.lines([FAST, NONE])
    assert title == "b1-t1000-n5-d10 full bwd (B1 T1000 N5 D10, float32)"
    assert fast.index("200") + 3 == header.index("ms") + 2 == none.index("refused") + len("refused")
    assert len(fast) <= TABLE.width


def test_a_terminal_gets_one_table():
    stream = io.StringIO()
    TABLE.draw([FAST, NONE], stream)
    assert stream.getvalue().count("implementation") <= 1


def test_the_footer_says_why_there_is_no_time_and_what_is_compared_with():
    footer = TABLE.footer([FAST, NONE, NONE])
    assert footer[0] == "none: refused: too small (2 rows)"
    assert "baseline: slow" in footer
    assert any(line.startswith("product of 1000 x 1000: 0.2") for line in footer)

"""The picture needs something to compare."""

from dataclasses import replace

import pytest

from benchmarks.attention.case import AttentionCase
from benchmarks.attention.chart import speeds
from benchmarks.attention.record import AttentionRecord
from benchmarks.attention.shapes import named
from benchmarks.bench.record import REFUSED, TIMED
from benchmarks.bench.timing import Times

CASE = AttentionCase(named("b1-t2-n1-d2")[0], "full", "fwd", "float32")
TIMES = Times((2.0,), 1)
BASELINE = AttentionRecord(case=CASE, implementation="a", status=TIMED, times=TIMES, baseline="a", baseline_times=TIMES)


def test_more_implementations_than_colours(tmp_path):
    others = [replace(BASELINE, implementation=f"b{i}", times=Times((i + 0.5,), 1)) for i in range(11)]
    lines = [record.fields() for record in (BASELINE, *others)]
    png, svg = speeds(lines, tmp_path / "deep" / "speeds.png")
    assert png.suffix == ".png"
    assert svg.parent == png.parent == tmp_path / "deep"
    assert "<svg" in svg.read_text("utf-8")


@pytest.mark.parametrize(
    "records", [[], [BASELINE], [AttentionRecord(case=CASE, implementation="b", status=REFUSED, baseline="a")]]
)
def test_nothing_to_draw(records, tmp_path):
    with pytest.raises(ValueError, match=f"none of {len(records)} rows has speed"):
        speeds([record.fields() for record in records], tmp_path / "speeds")

"""The picture needs something to compare."""

import pytest

from benchmarks.case import Case
from benchmarks.chart import speeds
from benchmarks.row import TIMED, Row
from benchmarks.shapes import named
from benchmarks.timing import Times

CASE = Case(named("b1-t2-n1-d2")[0], "full", "fwd", "float32")
BASELINE = Row(CASE, "a", TIMED, times=Times((2.0,), 1), baseline="a", baseline_times=Times((2.0,), 1))


def test_more_implementations_than_colours(tmp_path):
    others = [
        Row(CASE, f"b{i}", TIMED, times=Times((i + 0.5,), 1), baseline="a", baseline_times=BASELINE.times)
        for i in range(11)
    ]
    png, svg = speeds([BASELINE, *others], tmp_path / "deep" / "speeds.png")
    assert png.suffix == ".png"
    assert svg.parent == png.parent == tmp_path / "deep"
    assert "<svg" in svg.read_text("utf-8")


@pytest.mark.parametrize("rows", [[], [BASELINE], [Row(CASE, "b", "refused", baseline="a")]])
def test_nothing_to_draw(rows, tmp_path):
    with pytest.raises(ValueError, match="speed"):
        speeds(rows, tmp_path / "speeds")

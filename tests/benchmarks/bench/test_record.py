"""Records as lines of JSON: those of today, and those that are kept in benchmarks/results."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.attention.case import AttentionCase
from benchmarks.attention.record import AttentionRecord
from benchmarks.attention.shapes import named
from benchmarks.bench.marian import Sizes
from benchmarks.bench.memory import Peak
from benchmarks.bench.record import CHECKED, FAILED, TIMED, WRONG, Record, append, read
from benchmarks.bench.timing import Times
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.record import DecodingRecord
from benchmarks.training.case import MODELS
from benchmarks.training.long_sequences import LongSequenceCase, LongSequenceRecord
from benchmarks.training.record import Beginning, TrainingRecord, Work

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
SHARED = {"implementation": "seqattn", "times": Times((0.2, 0.1, 0.4), 3), "peak": Peak(3, 1, None)}


@dataclass(frozen=True)
class Length:
    length: float = 5
    name: str = "5 tokens"

    def fields(self):
        return {"length": self.length}


RECORD = Record(case=Length(), **SHARED)


def test_a_line_holds_the_case_the_times_and_the_machine(tmp_path):
    append(tmp_path / "deep" / "rows.jsonl", [RECORD, Record(case=Length(math.nan), implementation="numpy")])
    timed, checked = read(tmp_path / "deep" / "rows.jsonl")
    assert (timed["length"], timed["implementation"], timed["process_peak_bytes"]) == (5, "seqattn", 3)
    assert [timed[f"{name}_seconds"] for name in ("median", "min", "max")] == [0.2, 0.1, 0.4]
    assert (timed["seconds"], timed["calls_per_round"]) == ([0.2, 0.1, 0.4], 3)
    assert timed["device"]
    assert (checked["status"], checked["length"], checked["median_seconds"]) == (CHECKED, "nan", None)
    assert "process_peak_bytes" not in checked


def test_what_is_not_right_has_a_reason_and_no_peak():
    wrong, failed = RECORD.wrong("too large"), RECORD.refused(ValueError("no\n luck"))
    assert (wrong.status, wrong.reason) == (WRONG, "5 tokens: too large")
    assert (failed.status, failed.reason) == (FAILED, "ValueError: no luck")
    assert failed.with_peak(pytest.fail) is failed
    assert RECORD.with_peak(lambda: Peak(7, 2, None)).peak == Peak(7, 2, None)


ONE_OF_EACH = {
    "cpu": AttentionRecord(case=AttentionCase(named("decode")[0], "full", "fwd", "float32"), **SHARED),
    "decoding-cpu": DecodingRecord(case=DecodingCase(Sizes(), 1, 1, 1), **SHARED),
    "training-cpu": TrainingRecord(
        case=MODELS["base256"], work=Work(1, 1, 1.0, 1.0, ""), beginning=Beginning(1.0, 1.0, 1.0), **SHARED
    ),
    "long-sequences": LongSequenceRecord(case=LongSequenceCase(1), **SHARED),
}


def test_every_file_of_results_has_a_record():
    # The fields of compiled programs differ from program to program: tests/benchmarks/compile/test_record.py.
    assert {path.stem for path in RESULTS.glob("*.jsonl")} == {*ONE_OF_EACH, "compile"}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_new_lines_have_the_fields_of_those_that_are_kept(name):
    record = ONE_OF_EACH[name].fields()
    for line in read(RESULTS / f"{name}.jsonl"):
        assert set(line) <= set(record)
        assert line["status"] != TIMED or line["median_seconds"] > 0

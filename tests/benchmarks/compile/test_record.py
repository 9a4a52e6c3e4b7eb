"""The kept rows of compiled programs: programs and targets that exist, compiled or refused with a reason."""

from pathlib import Path

import pytest

from benchmarks.bench.record import COMPILED, read
from benchmarks.compile.programs import PROGRAMS
from benchmarks.compile.targets import TARGETS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ROWS = {(row["program"], row["target"]): row for row in read(RESULTS / "compile.jsonl")}


def test_rows_are_of_programs_and_targets_that_exist():
    assert {program for program, _ in ROWS} <= set(PROGRAMS)
    assert {target for _, target in ROWS} <= set(TARGETS)


@pytest.mark.parametrize("key", ROWS, ids="-on-".join)
def test_a_row_has_its_memory_or_a_reason(key):
    row = ROWS[key]
    if row["status"] == COMPILED:
        assert row["temp_bytes"] >= 0
        assert PROGRAMS[key[0]].is_for(TARGETS[key[1]])
    else:
        assert row["reason"]


def test_kept_updates_over_a_mesh_have_no_warning():
    updates = [row for (program, target), row in ROWS.items() if program.startswith("update") and target.endswith("-8")]
    assert updates
    assert not [row["program"] for row in updates if row["warnings"]]

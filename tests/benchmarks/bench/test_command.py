"""What all commands share: words, numbers, rounds, and how records are shown."""

import os
import sys

import pytest

from benchmarks.bench import command, table
from benchmarks.bench.command import Arguments, PeerArguments
from benchmarks.bench.record import read
from benchmarks.bench.table import Column, Table
from benchmarks.bench.timing import Times
from benchmarks.training.long_sequences import LongSequenceCase, LongSequenceRecord

RECORD = LongSequenceRecord(case=LongSequenceCase(5), implementation="seqattn", times=Times((0.2,), 1))
TABLE = Table((Column("by", 9, table.implementation, left=True), Column("ms", 9, table.milliseconds)), str, "ms: time.")


@pytest.mark.parametrize(
    ("arguments", "turns"),
    [
        (Arguments(), 9),
        (Arguments(rounds=0), 0),
        (PeerArguments(), 9),
        (PeerArguments(short=True), 3),
        (PeerArguments(short=True, rounds=11), 11),
    ],
)
def test_rounds_that_are_given_go_before_the_short_form(arguments, turns):
    assert arguments.turns(9) == turns


def test_what_is_no_number_of_rounds_or_of_anything_is_refused():
    with pytest.raises(ValueError, match=r"rounds \(-1\) must be at least 0"):
        Arguments(rounds=-1).turns(9)
    with pytest.raises(ValueError, match=r"batches \(0, 3\) must be numbers of at least 1"):
        command.numbers("batches", ("0,3",))
    assert command.numbers("batches", ("7,3", "7")) == [7, 3]


@pytest.mark.parametrize(("terminal", "columns", "lines"), [(False, 10, True), (True, 19, True), (True, 18, False)])
def test_a_terminal_that_is_too_narrow_for_lines_gets_a_table_at_the_end(
    terminal, columns, lines, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(command.shutil, "get_terminal_size", lambda **_: os.terminal_size((columns, 24)))
    shown = command.show([[RECORD], [RECORD]], 2, TABLE, tmp_path / "rows.jsonl")
    assert shown == [RECORD] * 2
    assert [row["implementation"] for row in read(tmp_path / "rows.jsonl")] == ["seqattn"] * 2
    printed = capsys.readouterr().out
    assert "ms: time." in printed
    assert printed.count("seqattn         200\n") == (2 if lines else 0)
    assert ("─" in printed) != lines

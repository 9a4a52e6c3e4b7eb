"""Training measured from end to end, on tiny sizes, beside peers that are made up; the real ones where installed."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench.marian import Sizes
from benchmarks.bench.memory import Peak
from benchmarks.bench.program import Program
from benchmarks.bench.record import CHECKED, FAILED, NOT_INSTALLED, REFUSED, TIMED, WRONG, read
from benchmarks.bench.timing import Times
from benchmarks.training import implementations, measurement, memory
from benchmarks.training.__main__ import main, parse, plan
from benchmarks.training.case import MODELS, TrainingCase, tokens
from benchmarks.training.chart import rates
from benchmarks.training.implementations import NAMES, PARTS, PEERS, UPDATE
from benchmarks.training.measurement import TrainingPlan, measure
from benchmarks.training.record import Beginning, TrainingRecord, Work
from benchmarks.training.table import TABLE

SIZES = Sizes(num_layers=1, model_dim=12, hidden_dim=7, num_heads=2, vocab_size=53, source_length=5)
CASE = TrainingCase("tiny", SIZES, target_length=8, rows=11, dropout_rate=0.25)
WORK = Work(110, 143, flop_per_token=1e6, peak_flop_per_second=1e9, peak_source="made up")
RIGHT = Beginning(5.0, 2.0, 4.5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, CASE.name, CASE)
    monkeypatch.setattr(measurement, "peak", lambda device: (WORK.peak_flop_per_second, WORK.peak_source))


@pytest.fixture
def made_up(monkeypatch):
    """Nothing of ours is compiled."""
    monkeypatch.setattr(TrainingCase, "weights", lambda case: {})
    monkeypatch.setattr(measurement, "operations", lambda case, weights: WORK.flop_per_token)


def answering(monkeypatch, name, answer=RIGHT):
    """An implementation whose first updates come to this; the dropout rates and the parts that it ran."""
    ran = []

    def prepare(case, weights, part):
        first, others = (answer.loss, answer.gradient_norm), (answer.next_loss, 1.0)
        left = iter([first])
        return Program(
            lambda: ran.append((case.dropout_rate, part)) or next(left, others), lambda _: None, lambda found: found
        )

    monkeypatch.setitem(NAMES, name, prepare)
    return ran


def planned(*words) -> TrainingPlan:
    return plan(parse(["--models=tiny", *words]))


def rows_of(wanted: TrainingPlan) -> dict[str, TrainingRecord]:
    (found,) = measure(wanted)
    return {row.implementation: row for row in found}


def test_from_end_to_end(tmp_path, capsys, monkeypatch):
    ours, said = NAMES["seqattn"], {}

    def recording(case, weights, part):
        program, updates = ours(case, weights, part), said.setdefault(case.dropout_rate, [])
        return replace(program, arrays=lambda found: updates.append(program.arrays(found)) or updates[-1])

    def peer(case, weights, part):
        """It says what ours said."""
        updates = iter(said[case.dropout_rate])
        return Program(lambda: next(updates, None), lambda _: None, lambda found: found)

    monkeypatch.setitem(NAMES, "seqattn", recording)
    for name in PEERS:
        monkeypatch.setitem(NAMES, name, peer)
    words = ["--models", "tiny", "--rounds", "2"]
    words += ["--json", str(tmp_path / "deep" / "rows.jsonl"), "--plot", str(tmp_path / "rates.png")]
    assert main(parse(words)) == 0
    rows = read(tmp_path / "deep" / "rows.jsonl")
    assert [row["implementation"] for row in rows] == ["seqattn", *PEERS]
    assert {(row["status"], row["model"], row["rows"], row["vocab_size"]) for row in rows} == {(TIMED, "tiny", 11, 53)}
    assert {row["tokens"] for row in rows} == {tokens(CASE.batch())}
    assert all(row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_seconds"]) for row in rows)
    assert all(row["mfu"] > 0 and row["device"] and len(row["seconds"]) == 2 for row in rows)
    assert rows[0]["compile_seconds"] > 0
    assert rows[0]["next_loss"] < rows[0]["loss"]
    assert max(row["speed_by_faster_peer"] for row in rows[1:]) == 1
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("rates.png", "rates.svg"))
    printed = capsys.readouterr().out
    assert "tiny: 1 + 1 layers of 12" in printed
    assert "P: made up" in printed


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "next_loss"])
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_one_that_computes_something_else_has_no_time(monkeypatch, made_up, name, factor):
    answering(monkeypatch, "seqattn")
    ran = answering(monkeypatch, "transformers", replace(RIGHT, **{name: factor * getattr(RIGHT, name)}))
    answering(monkeypatch, "torch", replace(RIGHT, loss=RIGHT.loss * 1.00001))
    rows = rows_of(planned("--rounds=2"))
    assert [row.status for row in rows.values()] == [TIMED, WRONG, TIMED]
    assert rows["transformers"].times is None
    assert rows["transformers"].reason.startswith(f"tiny: {name.replace('_', ' ')} ")
    assert "as seqattn" in rows["transformers"].reason
    assert ran == [(0, UPDATE)] * 2 + [(0.25, UPDATE)] * 2, (
        "what is compared is without dropout, and nothing is repeated"
    )
    assert rows["seqattn"].speed == rows["torch"].times.median / rows["seqattn"].times.median


def test_parts_are_timed_where_they_are_wanted(monkeypatch, made_up):
    ran = answering(monkeypatch, "seqattn")
    (row,) = rows_of(planned("--rounds=2", "--implementations=seqattn", "--parts")).values()
    assert {part for rate, part in ran if rate} == set(PARTS)
    assert sum(row.shares) == pytest.approx(1)
    assert len(row.fields()["forward_seconds"]) == len(row.fields()["gradient_seconds"]) == 2
    (row,) = rows_of(planned("--rounds=2", "--implementations=seqattn")).values()
    assert (row.status, row.shares, row.fields()["forward_seconds"]) == (TIMED, None, None)


def test_if_two_disagree_the_command_fails(monkeypatch, made_up, capsys):
    answering(monkeypatch, "seqattn")
    answering(monkeypatch, "torch", replace(RIGHT, loss=6.0))
    words = ["--models", "tiny", "--implementations", "seqattn,torch", "--rounds", "0"]
    assert main(parse(words)) == 1
    assert "torch: WRONG: tiny: loss 6, not 5 as seqattn" in capsys.readouterr().out


def test_without_ours_the_first_one_is_the_reference(monkeypatch, made_up):
    answering(monkeypatch, "transformers")
    answering(monkeypatch, "torch", replace(RIGHT, loss=6.0))
    rows = rows_of(planned("--rounds=1", "--implementations=transformers,torch"))
    assert [row.status for row in rows.values()] == [TIMED, WRONG]
    assert rows["transformers"].speed == 1


def test_what_is_not_installed_is_said_so(monkeypatch, made_up, capsys):
    arguments = parse(["--models=tiny", "--rounds=1"])  # before tyro finds a torch that is None
    answering(monkeypatch, "seqattn")
    for module in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = rows_of(plan(arguments))
    assert [rows[name].status for name in ("seqattn", *PEERS)] == [TIMED, NOT_INSTALLED, NOT_INSTALLED]
    assert rows["seqattn"].speed is None
    assert main(arguments) == 0
    assert "not installed" in capsys.readouterr().out


def test_a_failure_costs_one_row(monkeypatch, made_up):
    def breaks(case, weights, part):
        raise RuntimeError("out\n  of luck")

    monkeypatch.setitem(NAMES, "seqattn", breaks)
    answering(monkeypatch, "transformers")
    monkeypatch.setattr(implementations.machine, "platform_name", lambda: "gpu")
    rows = rows_of(planned("--rounds=0"))
    assert (rows["seqattn"].status, rows["seqattn"].reason) == (FAILED, "RuntimeError: out of luck")
    assert rows["transformers"].status == CHECKED
    assert rows["torch"].status == REFUSED
    assert main(parse(["--models=tiny", "--rounds=0"])) == 1


@pytest.mark.parametrize(
    "words", ["--models base", "--implementations numpy", "--rounds -1", "--dropout 1", "--models ,"]
)
def test_what_does_not_exist_is_refused(words):
    with pytest.raises(ValueError, match=r"^(no |[^\n]*must be)[^\n]*$"):
        plan(parse(words.split()))


def test_by_default_the_models_are_those_of_the_claim():
    wanted = plan(parse([]))
    assert [case.name for case in wanted.cases] == ["multi30k", "base256"]
    assert [case.sizes.num_layers for case in wanted.cases] == [4, 3]
    assert [case.rows * (case.sizes.source_length + case.target_length) for case in wanted.cases] == [8192, 4096]
    assert plan(parse(["--short"])).rounds < wanted.rounds
    assert plan(parse(["--short", "--rounds", "11"])).rounds == 11
    assert {case.dropout_rate for case in plan(parse(["--dropout", "0.2"])).cases} == {0.2}


def test_a_row_as_people_read_it():
    times, peers = Times((0.2, 0.1, 0.4), 1), {"transformers": Times((0.5,), 1), "torch": Times((0.3,), 1)}
    row = TrainingRecord(
        case=CASE,
        implementation="seqattn",
        status=TIMED,
        work=WORK,
        beginning=RIGHT,
        compile_seconds=1.5,
        times=times,
        peers=peers,
    )
    row = replace(row, forward=Times((0.05,), 1), gradient=Times((0.17,), 1))
    title, line = TABLE.lines([row])
    assert title.startswith("tiny: 1 + 1 layers of 12, hidden 7, vocabulary 53, dropout 0.25; 11 rows of 5 + 8, 110 of")
    assert line.split() == [
        "seqattn",
        "200",
        "100",
        "-",
        "400",
        "550",
        "165.0%",
        "1.50x",
        "25",
        "60",
        "15",
        "5.0000",
        "1.50",
    ]
    assert row.mfu == pytest.approx(3 * 1e6 * 110 / (0.2 * 1e9))
    assert row.fields()["gradient_norm"] == RIGHT.gradient_norm
    assert "P: made up" in TABLE.footer([row, row])


def test_a_row_without_times_says_why():
    row = TrainingRecord(
        case=CASE, implementation="torch", status=NOT_INSTALLED, work=WORK, reason="No module named 'torch'"
    )
    assert (row.rate, row.mfu, row.speed, row.fields()["median_seconds"]) == (None, None, None, None)
    assert TABLE.lines([row])[1].split() == ["torch", "not", "installed"]


def test_memory_is_told_where_it_is_wanted(monkeypatch, made_up):
    def peak(case, implementation, weights):
        if implementation == "torch":
            raise RuntimeError("ended by SIGKILL: out of memory?")
        return Peak(3 << 20, 1 << 20, None)

    monkeypatch.setattr(memory, "peak", peak)
    for name in NAMES:
        answering(monkeypatch, name)
    rows = rows_of(planned("--rounds=0", "--memory"))
    assert rows["seqattn"].fields()["process_peak_bytes"] == 3 << 20
    assert TABLE.lines([rows["seqattn"]])[1].split()[:4] == ["seqattn", "checked", "2.00", "5.0000"]
    assert (rows["torch"].peak, rows["torch"].status) == (None, CHECKED)
    assert rows["torch"].reason == "peak memory unknown: ended by SIGKILL: out of memory?"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows"):
        rates([TrainingRecord(case=CASE, implementation="seqattn", work=WORK).fields()], tmp_path / "rates")


def test_a_case_survives_the_command_line(monkeypatch):
    said = []
    monkeypatch.setattr(memory.memory, "alone", lambda module, words: said.append((module, words)))
    memory.peak(CASE, "torch", {"a.weight": np.ones(2, np.float32)})
    ((module, words),) = said
    assert sys.modules[module] is memory
    assert memory.parse(words) == (CASE, "torch", Path(words[1]))


@pytest.mark.parametrize("words", [[], ["numpy", "x.npz", "{}"]])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match=r"usage|no implementation"):
        memory.parse(words)


@pytest.mark.slow
def test_the_peak_of_a_process_alone():
    found = memory.peak(CASE, "seqattn", CASE.weights())
    assert 1 << 26 < found.process_idle_bytes < found.process_peak_bytes < 1 << 31

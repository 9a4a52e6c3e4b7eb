"""The command from end to end, on a tiny shape."""

import sys

import numpy as np
import pytest

from benchmarks.attention import exact, implementations, measurement
from benchmarks.attention.__main__ import main, parse, plan
from benchmarks.attention.case import AttentionCase
from benchmarks.attention.measurement import attempt, measure
from benchmarks.attention.shapes import named
from benchmarks.bench.program import Program
from benchmarks.bench.record import CHECKED, FAILED, NOT_INSTALLED, REFUSED, TIMED, WRONG, append, read

TINY = "b2-t23-n2-d4"
CASE = AttentionCase(named(TINY)[0], "causal", "fwd", "float32")


@pytest.fixture(autouse=True)
def environment_stays(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def answering(monkeypatch, name, answer):
    """An implementation `name` whose result is what `answer` returns; how often it ran."""
    ran = []

    def prepare(case, inputs):
        result = answer()
        return Program(lambda: ran.append(name), lambda _: None, lambda _: [result])

    monkeypatch.setitem(implementations.NAMES, name, prepare)
    return ran


def refusing(monkeypatch, name, exception):
    def prepare(case, inputs):
        raise exception

    monkeypatch.setitem(implementations.NAMES, name, prepare)


def right() -> np.ndarray:
    inputs = list(CASE.inputs())
    program = implementations.NAMES["jax.nn:xla"](CASE, inputs)
    return program.arrays(program.run())[0]


def test_from_end_to_end(tmp_path, capsys):
    words = ["--shapes", f"{TINY},b1-t3-s5-n2-d4", "--masks", "causal,documents", "full", "--rounds", "2"]
    words += ["--implementations", "seqattn:reference,jax.nn:xla", "--product-size", "8"]
    words += ["--json", str(tmp_path / "deep" / "rows.jsonl"), "--plot", str(tmp_path / "speeds.png")]
    assert main(parse(words)) == 0
    rows = read(tmp_path / "deep" / "rows.jsonl")
    assert len(rows) == (3 + 1) * 2 * 2  # masks of both shapes, passes, implementations
    assert {row["status"] for row in rows} == {TIMED}
    assert all(row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"] for row in rows)
    assert all(0 < row["largest_error"] < 1e-5 for row in rows)
    assert all(row["product_share"] > 0 and row["compile_seconds"] > 0 and row["planned_bytes"] > 0 for row in rows)
    assert {row["speed"] for row in rows if row["implementation"] == "jax.nn:xla"} == {1.0}
    assert {"jax", "jaxlib", "flax"} <= set(rows[0]["versions"])
    assert rows[0]["device"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("speeds.png", "speeds.svg"))
    printed = capsys.readouterr().out
    assert f"{TINY} causal bwd (B2 T23 N2 D4, float32)" in printed
    assert "baseline: jax.nn:xla" in printed


def test_lines_of_json_are_added(tmp_path, capsys):
    words = ["--shapes", TINY, "--masks", "full", "--pass", "fwd", "--implementations", "jax.nn:xla", "--rounds", "0"]
    for _ in range(2):
        assert main(parse([*words, "--json", str(tmp_path / "rows.jsonl")])) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert [(row["status"], row["median_seconds"]) for row in rows] == [(CHECKED, None)] * 2


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    ran = answering(monkeypatch, "wrong", lambda: right() + np.float32(0.01))
    answering(monkeypatch, "nan", lambda: right() * np.float32(np.nan))
    answering(monkeypatch, "right", right)
    words = ["--shapes", TINY, "--masks", CASE.pattern, "--pass", CASE.direction, "--product-size", "8"]
    words += ["--implementations", "wrong,right,nan", "--baseline", "right", "--rounds", "2"]
    (found,) = measure(plan(parse(words)))
    rows = {row.implementation: row for row in found}
    assert {name: row.status for name, row in rows.items()} == {"wrong": WRONG, "nan": WRONG, "right": TIMED}
    assert len(ran) == 1
    assert rows["wrong"].times is None
    assert rows["wrong"].error.largest == pytest.approx(0.01, rel=1e-2)
    assert "causal fwd" in rows["wrong"].reason
    append(tmp_path / "rows.jsonl", [rows["nan"]])
    assert read(tmp_path / "rows.jsonl")[0]["largest_error"] == "nan"


def test_one_of_ours_that_is_wrong_fails_the_command(monkeypatch, capsys):
    answering(monkeypatch, "seqattn", lambda: right() * 0)
    words = ["--shapes", TINY, "--masks", "causal", "--pass", "fwd", "--rounds", "1", "--product-size", "8"]
    assert main(parse([*words, "--implementations", "seqattn"])) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed


@pytest.mark.parametrize("name", ["torch:sdpa", "torch:flex", "torch:flash-2", "torch:flash-3", "tokamax"])
def test_what_is_not_installed_is_said_so(name, monkeypatch):
    for module in ("torch", "tokamax"):
        monkeypatch.setitem(sys.modules, module, None)
    tried = attempt(name, CASE, list(CASE.inputs()), exact.solve(CASE))
    assert (tried.record.status, tried.programs) == (NOT_INSTALLED, {})


@pytest.mark.parametrize(
    ("exception", "status", "reason"),
    [
        (NotImplementedError("no\n  windows"), REFUSED, "no windows"),
        (ExceptionGroup("all", [NotImplementedError("a"), NotImplementedError("b")]), REFUSED, "a; b"),
        (RuntimeError("cuDNN is not detected"), FAILED, "RuntimeError: cuDNN is not detected"),
        (ImportError("half of it"), FAILED, "ImportError: half of it"),
    ],
)
def test_a_refusal_is_one_line(exception, status, reason, monkeypatch):
    refusing(monkeypatch, "peer", exception)
    row = attempt("peer", CASE, list(CASE.inputs()), exact.solve(CASE)).record
    assert (row.status, row.reason) == (status, reason)


@pytest.mark.parametrize(
    "words", ["--masks diagonal", "--shapes b1", "--pass up", "--implementations numpy", "--baseline x", "--rounds -1"]
)
def test_what_does_not_exist_is_refused(words):
    with pytest.raises(ValueError, match=r"no |must be"):
        plan(parse(words.split()))


def test_what_is_given_goes_before_the_short_form():
    short = plan(parse(["--short"]))
    assert short.patterns == ("full", "causal", "window", "documents")
    assert short.rounds < plan(parse([])).rounds
    assert plan(parse(["--short", "--rounds", "9", "--masks", "alibi"])).rounds == 9


def test_the_exact_answer_is_computed_once_for_both_passes(monkeypatch):
    solved, original = [], exact.solve
    monkeypatch.setattr(exact, "solve", lambda case, tolerance: solved.append(case) or original(case, tolerance))
    words = ["--shapes", TINY, "--masks", "full", "--implementations", "jax.nn:xla", "--rounds", "0"]
    assert len(list(measure(plan(parse(words))))) == 2
    assert [case.direction for case in solved] == ["bwd"]


@pytest.mark.parametrize("spread", [False, True])
def test_spread_rounds_take_turns_among_all_cases_of_a_shape(spread, monkeypatch):
    together, original = [], measurement.interleaved

    def watched(programs, rounds):
        together.append({case.name for case, _ in programs})
        return original(programs, rounds)

    monkeypatch.setattr(measurement, "interleaved", watched)
    words = ["--shapes", TINY, "--masks", "full,causal", "--pass", "fwd", "--implementations", "jax.nn:xla"]
    words += ["--rounds", "1", "--product-size", "8", *(["--spread"] if spread else [])]
    rows = [row for found in measure(plan(parse(words))) for row in found]
    assert [row.status for row in rows] == [TIMED] * 2
    assert rows[0].times != rows[1].times
    names = [row.case.name for row in rows]
    assert together == ([set(names)] if spread else [{name} for name in names])

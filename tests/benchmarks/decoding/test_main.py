"""Decoding measured from end to end, on tiny sizes, beside peers that are made up; the real ones where installed."""

import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.bench.marian import END, RandomMarian, Sizes
from benchmarks.bench.program import Program
from benchmarks.bench.record import CHECKED, FAILED, NOT_INSTALLED, REFUSED, TIMED, WRONG, read
from benchmarks.bench.timing import Times
from benchmarks.decoding import implementations, measurement, memory
from benchmarks.decoding.__main__ import main, parse, plan
from benchmarks.decoding.case import DecodingCase
from benchmarks.decoding.chart import rates
from benchmarks.decoding.implementations import NAMES, PEERS
from benchmarks.decoding.measurement import DecodingPlan, measure
from benchmarks.decoding.record import Agreement, DecodingRecord
from benchmarks.decoding.table import TABLE
from seqattn.interop.huggingface import from_huggingface

SIZES = Sizes(num_layers=1, model_dim=12, hidden_dim=7, num_heads=2, vocab_size=53, source_length=5)
WORDS = [f"--sizes.{name.replace('_', '-')}={value}" for name, value in vars(SIZES).items()]
CASE = DecodingCase(SIZES, batch=11, beam_size=1, length=3)
RIGHT = np.arange(33, dtype=np.int32).reshape(11, 3)


def answering(monkeypatch, name, answer=lambda case: RIGHT[:, : case.length]):
    """An implementation that answers a case by a function; the names of the cases that it was run on."""
    ran = []

    def load(model):
        def prepare(case):
            return Program(lambda: ran.append(case) or answer(case), lambda _: None, lambda tokens: [tokens])

        return prepare

    monkeypatch.setitem(NAMES, name, load)
    return ran


@pytest.fixture
def unscored(monkeypatch):
    """Every row's score is 0: nothing of ours is compiled."""
    monkeypatch.setattr(measurement, "scores", lambda model, case, tokens: np.zeros(len(tokens)))


def planned(*words) -> DecodingPlan:
    return plan(parse([*WORDS, "--batches=11", "--beams=1", "--length=3", *words]))


def rows_of(wanted: DecodingPlan) -> dict[str, DecodingRecord]:
    (found,) = measure(wanted)
    return {row.implementation: row for row in found}


def test_from_end_to_end(tmp_path, capsys, monkeypatch):
    prepared = []

    def peer(model):
        """It says what ours says, by a way of its own: all tokens again for each new one."""
        prepared.append(model)

        def prepare(case):
            tokens = by_hand(model, case)
            return Program(lambda: None, lambda _: None, lambda _: [tokens])

        return prepare

    monkeypatch.setitem(NAMES, "transformers", peer)
    monkeypatch.setitem(NAMES, "ctranslate2", peer)
    words = [*WORDS, "--batches", "2", "--beams", "1", "--length", "3", "--rounds", "2"]
    words += ["--json", str(tmp_path / "deep" / "rows.jsonl"), "--plot", str(tmp_path / "rates.png")]
    assert main(parse(words)) == 0
    rows = read(tmp_path / "deep" / "rows.jsonl")
    assert [row["implementation"] for row in rows] == ["seqattn", "transformers", "ctranslate2"]
    assert {(row["status"], row["rows_equal"], row["batch"], row["length"]) for row in rows} == {(TIMED, 1.0, 2, 3)}
    assert all(row["tokens_per_second"] == pytest.approx(6 / row["median_seconds"]) for row in rows)
    assert all(row["first_token_median_seconds"] > 0 and row["device"] for row in rows)
    assert rows[0]["compile_seconds"] > 0
    assert rows[1]["speed_by_transformers"] == rows[2]["speed_by_ctranslate2"] == 1
    assert len(prepared) == 2, "the weights are loaded once, for all cases"
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("rates.png", "rates.svg"))
    printed = capsys.readouterr().out
    assert "2 sources, greedy" in printed
    assert "first token ms" in printed


def by_hand(model: RandomMarian, case: DecodingCase) -> np.ndarray:
    """Greedy, by the whole prefix at each step."""
    transformer, source = from_huggingface(model.config, model.arrays), jnp.asarray(case.sources())
    said = np.full((case.batch, 1), case.sizes.pad_token, np.int32)
    for _ in range(case.length):
        padded = jnp.asarray(np.pad(said, ((0, 0), (0, case.length + 1 - said.shape[1]))))
        logits = measurement._decode(transformer, source, padded)
        best = np.asarray(logits[:, said.shape[1] - 1].argmax(axis=-1))[:, None]
        said = np.concatenate([said, best], axis=1)
    return said[:, 1:]


def test_no_sequence_ends_early_and_sources_matter():
    model, case = RandomMarian(SIZES, Path()), replace(CASE, length=7)
    tokens = by_hand(model, case)
    assert not np.isin(tokens, [END, SIZES.pad_token]).any()
    assert len({tuple(row) for row in tokens}) > case.batch // 2
    assert not model.arrays["model.shared.weight"][SIZES.pad_token].any()
    again = RandomMarian(SIZES, Path("elsewhere")).arrays
    assert all(np.array_equal(x, again[name]) for name, x in model.arrays.items())


def test_scores_are_those_of_the_tokens():
    model, case = RandomMarian(SIZES, Path()), replace(CASE, batch=2, length=3)
    best = by_hand(model, case)
    others = np.where(best == 4, 5, 4).astype(np.int32)
    good, bad = measurement.scores(model, case, best), measurement.scores(model, case, others)
    assert good.shape == (2,)
    assert (bad < good).all()
    assert (good < 0).all()


def test_sources_end_and_are_the_same_in_every_run():
    source = CASE.sources()
    assert source.shape == (11, 5)
    assert (source[:, -1] == END).all()
    assert not np.isin(source[:, :-1], [END, SIZES.pad_token]).any()
    np.testing.assert_array_equal(source, CASE.sources())


def test_one_that_says_other_things_has_no_time(monkeypatch, unscored):
    wrong = answering(monkeypatch, "seqattn", lambda case: np.where(RIGHT == 7, 8, RIGHT)[:, : case.length])
    answering(monkeypatch, "transformers")
    answering(monkeypatch, "ctranslate2", lambda case: RIGHT[:, :1])
    rows = rows_of(planned("--rounds=2"))
    assert {name: row.status for name, row in rows.items()} == {
        "seqattn": WRONG,
        "transformers": TIMED,
        "ctranslate2": WRONG,
    }
    assert [case.length for case in wrong] == [3], "it is run once, to be compared"
    assert rows["seqattn"].agreement.equal == pytest.approx(10 / 11)
    assert "11 sources, greedy: 90.9% of the rows" in rows["seqattn"].reason
    assert "(11, 1), not (11, 3)" in rows["ctranslate2"].reason


def test_if_ours_is_wrong_the_command_fails(monkeypatch, unscored, capsys):
    answering(monkeypatch, "seqattn", lambda case: 0 * RIGHT[:, : case.length])
    answering(monkeypatch, "ctranslate2")
    words = [*WORDS, "--batches", "11", "--beams", "1", "--length", "3", "--rounds", "0"]
    assert main(parse([*words, "--implementations", "seqattn,ctranslate2"])) == 1
    assert "WRONG" in capsys.readouterr().out


def test_of_beams_nearly_all_must_be_equal():
    scores, near, far = np.zeros(11), np.eye(11)[3] * 0.01, np.eye(11)[3]
    one_other, two_others = RIGHT + (RIGHT == 7), RIGHT + (RIGHT == 7) + (RIGHT == 12)
    one = Agreement.of(one_other, near, RIGHT, scores)
    assert (one.equal, one.score_difference) == pytest.approx((10 / 11, 0.01))
    assert [one.is_right(beam_size) for beam_size in (1, 4)] == [False, True]
    assert not Agreement.of(one_other, far, RIGHT, scores).is_right(4)
    assert not Agreement.of(two_others, scores, RIGHT, scores).is_right(4)
    assert not Agreement.of(RIGHT, np.full(11, np.nan), RIGHT, scores).is_right(4)
    assert Agreement.of(RIGHT, scores, RIGHT, scores).is_right(1)


def test_what_is_not_installed_is_said_so(monkeypatch, unscored):
    wanted = planned("--rounds=1")  # before tyro finds a torch that is None
    answering(monkeypatch, "seqattn")
    for module in ("torch", "transformers", "ctranslate2"):
        monkeypatch.setitem(sys.modules, module, None)
    rows = rows_of(wanted)
    assert [rows[name].status for name in ("seqattn", *PEERS)] == [TIMED, NOT_INSTALLED, NOT_INSTALLED]
    assert rows["seqattn"].agreement is None
    assert rows["seqattn"].rate > 0


def test_a_failure_costs_one_row(monkeypatch, unscored):
    def breaks(case):
        raise RuntimeError("out\n  of luck")

    answering(monkeypatch, "seqattn", breaks)
    answering(monkeypatch, "transformers")
    monkeypatch.setattr(implementations.machine, "platform_name", lambda: "gpu")
    rows = rows_of(planned("--rounds=0"))
    assert (rows["seqattn"].status, rows["seqattn"].reason) == (FAILED, "RuntimeError: out of luck")
    assert rows["transformers"].status == CHECKED
    assert rows["ctranslate2"].status == REFUSED


@pytest.mark.parametrize(
    "words", ["--batches 0", "--beams 1,x", "--implementations numpy", "--rounds -1", "--length 0", "--batches ,"]
)
def test_what_does_not_exist_is_refused(words):
    with pytest.raises(ValueError, match=r"no |must be"):
        plan(parse(words.split()))


def test_by_default_the_sizes_are_those_of_the_measured_case():
    wanted = plan(parse([]))
    assert [(case.batch, case.beam_size, case.length) for case in wanted.cases] == [
        (1, 1, 24),
        (1, 4, 24),
        (64, 1, 24),
        (64, 4, 24),
    ]
    assert wanted.cases[0].sizes == Sizes(3, 256, 1024, 4, 8000, 24)
    assert plan(parse(["--short"])).rounds < wanted.rounds
    assert plan(parse(["--short", "--rounds", "11"])).rounds == 11


def test_a_row_as_people_read_it():
    times, peer = Times((0.2, 0.1, 0.4), 1), Times((0.3,), 1)
    row = DecodingRecord(
        case=CASE,
        implementation="seqattn",
        status=TIMED,
        times=times,
        first=Times((0.05,), 1),
        peers={"ctranslate2": peer},
    )
    title, line = TABLE.lines([row])
    assert title == "11 sources, greedy"
    assert line.split() == ["seqattn", "165", "82.5", "-", "330", "1.50x", "50.0"]
    assert row.speed("transformers") is None


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows"):
        rates([DecodingRecord(case=CASE, implementation="seqattn").fields()], tmp_path / "rates")


def test_a_case_survives_the_command_line(monkeypatch):
    said = []
    monkeypatch.setattr(memory.memory, "alone", lambda module, words: said.append((module, words)))
    memory.peak(CASE, "ctranslate2", Path("here"))
    ((module, words),) = said
    assert sys.modules[module] is memory
    assert memory.parse(words) == (CASE, "ctranslate2", Path("here"))


@pytest.mark.parametrize("words", [[], ["numpy", ".", "{}"]])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match=r"usage|no implementation"):
        memory.parse(words)


@pytest.mark.slow
def test_the_peak_of_a_process_alone(tmp_path):
    found = memory.peak(CASE, "seqattn", tmp_path)
    assert 1 << 26 < found.process_idle_bytes < found.process_peak_bytes < 1 << 31


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
def test_real_peers_say_the_same(beam_size):
    """Where they are installed, by the extra `bench`."""
    for module in ("torch", *PEERS):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e .[test,bench]")
    words = [*WORDS, "--batches=11", f"--beams={beam_size}", "--length=7", "--rounds=0"]
    (found,) = measure(plan(parse(words)))
    assert {row.implementation: row.status for row in found} == dict.fromkeys(NAMES, CHECKED)
    assert [row.agreement.equal for row in found] == [1.0] * 3

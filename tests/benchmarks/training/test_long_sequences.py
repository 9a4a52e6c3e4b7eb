"""What an update on a long text costs: kinds of attention that are compared before they are timed."""

import dataclasses
import math

import pytest
from flax import nnx

from benchmarks.bench import machine
from benchmarks.bench.attempt import WHOLE, Attempt
from benchmarks.bench.program import Program
from benchmarks.bench.record import CHECKED, REFUSED, TIMED, WRONG, append, read
from benchmarks.training import long_sequences
from benchmarks.training.long_sequences import (
    COMPRESSED,
    COMPRESSED_KEPT,
    KEPT,
    NAMES,
    TILED,
    LongSequenceArguments,
    LongSequenceCase,
    LongSequenceRecord,
    attempt,
    compare,
    main,
)
from seqattn.models import LanguageModelConfig, Sinusoidal
from seqattn.nn import BlockConfig, MemoryCompressedAttention, MultiHeadAttention
from train.experiments.docstrings_stream import DOCSTRINGS_STREAM

LENGTH = 331
SMALL = LanguageModelConfig(
    0, num_layers=2, block=BlockConfig(model_dim=8, hidden_dim=8, num_heads=2, dropout_rate=0.3), positions=Sinusoidal()
)


@pytest.fixture
def small(monkeypatch):
    stream = dataclasses.replace(DOCSTRINGS_STREAM, model=SMALL)
    monkeypatch.setattr(long_sequences, "DOCSTRINGS_STREAM", stream)


def test_every_kind_is_compared_planned_and_timed(small, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert main(LongSequenceArguments(lengths=(str(LENGTH),), rounds=1, json=file)) == 0
    rows = {row["attention"]: row for row in read(file)}
    assert set(rows) == set(NAMES)
    assert all(
        row["status"] == TIMED and row["median_seconds"] > 0 and row["length"] == LENGTH for row in rows.values()
    )
    assert rows[KEPT]["loss"] == pytest.approx(rows[TILED]["loss"], abs=1e-5)
    assert rows[COMPRESSED_KEPT]["loss"] == pytest.approx(rows[COMPRESSED]["loss"], abs=1e-5)
    assert abs(rows[COMPRESSED]["loss"] - rows[TILED]["loss"]) > 1e-5
    # Two heads of so many scores, forward or backward, which the tiles never hold.
    assert rows[KEPT]["planned_bytes"] - rows[TILED]["planned_bytes"] > 2 * 4 * LENGTH**2
    # Of two layers one is compressed, to a third.
    assert rows[KEPT]["planned_bytes"] - rows[COMPRESSED_KEPT]["planned_bytes"] > 2 * 4 * LENGTH**2 * 2 / 3
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        (KEPT, ["xla", "xla"]),
        (TILED, ["chunked", "chunked"]),
        (COMPRESSED_KEPT, ["chunked", "xla"]),
        (COMPRESSED, ["chunked", "chunked"]),
    ],
)
def test_the_layers_that_keep_their_scores(name, kernels):
    model = long_sequences.build(name, dataclasses.replace(SMALL, vocab_size=11))
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, MultiHeadAttention)]
    assert [layer.implementation for layer in layers] == kernels
    compressed = [isinstance(layer, MemoryCompressedAttention) for layer in layers]
    assert compressed == [False, name in (COMPRESSED_KEPT, COMPRESSED)]


@pytest.mark.parametrize("names", [(KEPT, TILED), (COMPRESSED_KEPT, COMPRESSED)])
@pytest.mark.parametrize("loss", [7.01, math.nan])
def test_an_attention_with_two_losses_is_wrong_and_not_timed(names, loss):
    case, program = LongSequenceCase(5), Program(lambda: None, lambda _: None, lambda _: [])

    def tried(name, loss):
        return Attempt(LongSequenceRecord(case=case, implementation=name, loss=loss), {WHOLE: program})

    pair, other = [tried(names[0], 7.0), tried(names[1], loss)], tried(COMPRESSED if KEPT in names else TILED, 9.0)
    compared = compare([*pair, other])
    assert [one.record.status for one in compared] == [WRONG, WRONG, CHECKED]
    assert [len(one.programs) for one in compared] == [0, 0, 1]
    assert compare([pair[0], other]) == [pair[0], other]


def test_an_update_beyond_the_memory_is_planned_and_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    tried = attempt(TILED, 11, SMALL)
    assert not tried.programs
    row = tried.record
    assert row.status == REFUSED
    assert "11 tokens" in row.reason
    assert "GiB are free" in row.reason
    assert row.planned_bytes > 1000
    assert math.isnan(row.loss)
    append(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl")[0]["loss"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (LongSequenceArguments(lengths=("0",)), r"lengths \(0\) must be numbers of at least 1"),
        (LongSequenceArguments(lengths=("1e3",)), r"lengths \(1e3\)"),
        (LongSequenceArguments(rounds=-1), r"rounds \(-1\) must be at least 0"),
        (LongSequenceArguments(attentions=("sparse",)), "no attention 'sparse': give full-scores-kept"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        long_sequences.plan(arguments)

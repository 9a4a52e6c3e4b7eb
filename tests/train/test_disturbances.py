"""What comes between a run and its end: signals, a thread that fails, a clock that jumps, bits that flip."""

import dataclasses
import itertools
import os
import signal
import time

import jax
import numpy as np
import pytest

from train.checkpoints import checkpoints, run
from train.checkpoints.lock import RunLock
from train.devices import parallel
from train.devices.parallel import Sharded
from train.engine import loop
from train.objectives import SequenceToSequence
from train.reports.metrics import read_metrics
from train.tasks import ParallelFiles


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_once):
    with compiled_once():
        yield


@pytest.fixture
def short(tiny, tmp_path, monkeypatch):
    """An experiment that saves and evaluates after every second update; what an evaluation finds is made up."""
    monkeypatch.setattr(SequenceToSequence, "evaluate", lambda *_: loop.Scores({"loss": 1.0}, []))
    monkeypatch.setattr(SequenceToSequence, "draw", lambda *_: [])
    monkeypatch.setattr(loop, "learning_curves", lambda *_: None)
    return dataclasses.replace(tiny, run=tmp_path / "run", steps=9, evaluate_every=2, log_every=1, bleu=False)


def disturb(monkeypatch, place, name, number, *, call=1):
    """A signal comes at the start of so many calls of a function."""
    before, count = getattr(place, name), itertools.count(1)

    def disturbed(*arguments, **options):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return before(*arguments, **options)

    is_static = isinstance(vars(place)[name], staticmethod)
    monkeypatch.setattr(place, name, staticmethod(disturbed) if is_static else disturbed)


@pytest.mark.parametrize(
    ("place", "name", "call", "number", "code", "steps"),
    [
        pytest.param(parallel._Mapped, "update", 3, signal.SIGINT, 130, [3], id="step"),
        pytest.param(SequenceToSequence, "evaluate", 1, signal.SIGTERM, 143, [3], id="evaluation"),
        # In the background: the step that is saved may just have ended, and so may later ones.
        pytest.param(checkpoints, "_begin", 1, signal.SIGINT, 130, [2, 3, 4, 5], id="save"),
    ],
)
def test_e1_a_signal_leaves_a_checkpoint(place, name, call, number, code, steps, short, monkeypatch, capsys):
    disturb(monkeypatch, place, name, number, call=call)
    assert loop.train(short) == code
    step = run.load(short.run).step
    assert step in steps
    assert max(row["step"] for row in read_metrics(short.run / "metrics.jsonl")) == step
    assert f"stopped by {number.name} after {step} updates; the same command resumes" in capsys.readouterr().out


def test_e1_a_signal_while_the_update_is_compiled_leaves_a_checkpoint(short, monkeypatch):
    disturb(monkeypatch, SequenceToSequence, "loss", signal.SIGTERM)  # called once, by the trace
    assert loop.train(dataclasses.replace(short, parallel=Sharded())) == 143
    assert run.load(short.run).step == 1


def test_c21_a_batch_that_cannot_be_made_ends_the_run_and_not_its_checkpoints(short, monkeypatch):
    def fail(index, batch):
        return batch if index < 2 else batch["nothing"]

    iterate = loop.iterate
    monkeypatch.setattr(loop, "iterate", lambda order, start: iterate(order.map_with_index(fail), start=start))
    with pytest.raises(KeyError, match="nothing"):
        loop.train(short)
    assert run.load(short.run).step == 2
    with RunLock(short.run):
        pass  # it is free to go on


def test_e15_e18_a_second_run_is_the_first_bit_by_bit_though_the_clock_runs_backwards(short, tmp_path, monkeypatch):
    assert short.model.block.dropout_rate > 0
    runs = [dataclasses.replace(short, run=tmp_path / name) for name in ("first", "second")]
    assert loop.train(runs[0]) == 0
    begun = time.time()
    clock = itertools.count(begun, -1000.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert loop.train(runs[1]) == 0
    assert time.time() <= begun
    first, second = (jax.tree.leaves(run.load(each.run).model) for each in runs)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [read_metrics(each.run / "metrics.jsonl") for each in runs]
    for one, other in zip(*rows, strict=True):
        assert [one[name] for name in ("step", "kind", "loss")] == [other[name] for name in ("step", "kind", "loss")]
        if one["kind"] == "train":
            assert one["gradient_norm"] == other["gradient_norm"]
            assert 0 < other["tokens_per_second"] < 1e7


def test_c14_a_flipped_bit_in_the_texts_of_a_run_is_noticed(tiny, tmp_path):
    for name in ("source", "target"):
        (tmp_path / name).write_text("".join(f"{name} {number}\n" for number in range(23)))
    task = ParallelFiles(source=tmp_path / "source", target=tmp_path / "target", validation_examples=2, test_examples=3)
    experiment = dataclasses.replace(tiny, task=task, run=tmp_path / "run")
    session = loop.prepare(experiment)
    with session.checkpoints:
        session.save()
    for name in ("source", "target"):
        for position in (0, -3):
            flip(tmp_path / name, position)
            with pytest.raises(ValueError, match=rf"the data changed since {tmp_path / 'run'} was trained"):
                loop.prepare(experiment)
            flip(tmp_path / name, position)
    loop.prepare(experiment).checkpoints.close()


def test_c14_a_flipped_bit_in_the_tokenizer_of_a_run_is_noticed(short, tmp_path):
    session = loop.prepare(short)
    with session.checkpoints:
        session.save()
    tokenizer = (short.run / "tokenizer.json").read_bytes()
    flip(short.run / "tokenizer.json", 99)  # a copy, for others
    loop.prepare(short).checkpoints.close()
    assert (short.run / "tokenizer.json").read_bytes() == tokenizer
    (file,) = (
        path for path in (short.run / "checkpoints").rglob("*") if path.is_file() and b"vocab" in path.read_bytes()
    )
    flip(file, file.read_bytes().index(b"vocab"))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        loop.prepare(short)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
